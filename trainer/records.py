"""Records read back: JSON and JSON lines that runs, submissions and tools wrote beside their results.

A record may be cut off, edited by hand, of another version, or no record at all. Whoever reads one gets values of the
types asked for, and for everything that is left out a sentence that says where and why: a damaged record ends no run.

    read_json    one file, any JSON              read_lines   a JSON lines file, a value a line
    read_record  one file as a dataclass         read_parts   one file of parts, those of another shape left out
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from trainer.errors import ConfigError

T = TypeVar("T")

MAX_BYTES = 256 * 2**20
"""Of one JSON file, and of one line: more is no record."""
MAX_DEPTH = 32
MAX_INTEGER = 2**63

Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""Unix seconds that a calendar holds."""


def ignore(text: str) -> None:
    """What hears of problems where nobody wants to."""


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or `ConfigError` for what is no JSON: another encoding, numbers that are not finite,
    integers of more than 64 bits, more than `MAX_DEPTH` levels, half a surrogate."""
    with _open(path) as file:
        content = file.read(MAX_BYTES + 1)
    try:
        return _parse(content)
    except ValueError as error:
        raise ConfigError(f"{path}{_line_of(error)}: this is no JSON ({error}); was it edited by hand?") from None


def read_record(path: Path, kind: type[T]) -> T:
    """The file as an instance of a dataclass; unknown fields are ignored. Raises as `read_json` does, and `ConfigError`
    where a field is missing or has another type."""
    value = read_json(path)
    try:
        return checked(value, kind)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; was it edited by hand, or written by another version?") from None


def read_parts(path: Path, kind: type[T], *, depth: int = 1, tell: Callable[[str], None] = ignore) -> T:
    """The file as a typed dictionary, without the parts of another shape; `tell` hears a sentence about each.

    A part is what `depth` keys lead to; `kind` allows every key to be absent. Nothing is raised: where nothing can be
    read there are no parts. That there is no file is no problem.
    """
    value: Any = {}
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: must be a JSON object, not a {_type_name(value)}")
    except FileNotFoundError:
        pass
    except (ConfigError, OSError) as error:
        tell(f"{error}; it is left out")
        value = {}
    while True:
        try:
            return _adapter(kind).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            wrong = {detail["loc"][:depth]: detail for detail in error.errors(include_url=False)}
        for detail in wrong.values():
            tell(f"{path}: {_sentence(detail)}; this is left out")
        for place in sorted(wrong, reverse=True, key=lambda place: place[-1] if isinstance(place[-1], int) else -1):
            holder: Any = value
            for part in place[:-1]:
                holder = holder[part]
            del holder[place[-1]]


def read_lines(
    path: Path,
    parse: Callable[[dict[str, Any]], T] = dict,  # type: ignore[assignment]
    *,
    tell: Callable[[str], None] = ignore,
) -> tuple[T, ...]:
    """The records of a JSON lines file; none where there is no file. `parse` makes a record of one, or raises
    ValueError. Lines that are no record are left out, and `tell` hears one sentence about all of them; a line that a
    killed process left unfinished at the end is left out. Raises OSError where the file cannot be read."""
    problems: list[str] = []
    records = []
    try:
        for number, line in _lines(path):
            try:
                value = _parse(line)
                if not isinstance(value, dict):
                    raise ValueError(f"must be a JSON object, not a {_type_name(value)}")
                records.append(parse(value))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    except FileNotFoundError:
        return ()
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        others = f", like {len(problems) - 1} more" if len(problems) > 1 else ""
        tell(f"{problems[0]}; this line is left out{others}")
    return tuple(records)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines with their numbers; of one that is too long, its beginning."""
    number = 0
    with _open(path) as file:
        while line := file.readline(MAX_BYTES + 1):
            number, rest = number + 1, line
            while len(rest) > MAX_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_BYTES + 1)
            if rest.endswith(b"\n"):
                yield number, line


def append_lines(path: Path) -> TextIO:
    """Open a JSON lines file for appending, after cutting off a last line that a killed process left unfinished."""
    if path.exists():
        with path.open("rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - 2**16)
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    end = begin + found + 1
                    break
                end = begin
            if end < size:
                file.truncate(end)
    return path.open("a", encoding="utf-8")


def checked(value: Any, kind: type[T]) -> T:
    """A value of JSON as a dataclass or typed dictionary, no type converted. Raises ValueError, in one sentence."""
    # pydantic takes a mapping for a dataclass without converting the types of its fields from JSON alone
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False)[0])) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place + ': ' if place else ''}{problem['msg'][0].lower()}{problem['msg'][1:]}"


def _open(path: Path) -> Any:
    """A file for reading bytes, without waiting for what is no file. Raises OSError, or `ConfigError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no file but a folder, a pipe or a device; a record is a file")
    return os.fdopen(descriptor, "rb")


def _parse(content: bytes) -> Any:
    """Raises ValueError, of which `json.JSONDecodeError` and `UnicodeDecodeError` are kinds."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 2**20} MiB")
    text = content.decode("utf-8")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"more than {MAX_DEPTH} levels")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate, which no text has") from None
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"the integer {digits[:24]} has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:24]} is no finite number")
    return number


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list) or not value:
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))


def _line_of(error: ValueError) -> str:
    return f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""


def _type_name(value: Any) -> str:
    names = {list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")

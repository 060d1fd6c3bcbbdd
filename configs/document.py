"""A YAML file plus `--set` overrides as plain values that remember where each of them came from.

A file of its own because origins are tracked here, while reading, and nowhere guessed afterwards. YAML by the 1.2 core
rules: `1e-4` is a number, `no` is text, only plain values, no tags that construct objects, no key twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from configs.errors import ConfigError
from configs.refusal import did_you_mean
from configs.secrets import find_secret, without_secrets

KeyPath = tuple[str | int, ...]
IsShort = Callable[[KeyPath], bool]

MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_BYTES = 128 * 2**10
"""Of a file: YAML is read in Python, some seconds for so much."""
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a line of a file, or an override as it was typed."""

    text: str  # "runs/a.yaml:7" or "--set training.steps=0"
    order: tuple[int, int]  # (0, line) or (1, number of the override)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing the user has to change."""

    origin: Origin
    path: KeyPath
    value: str | None  # as shown; None where there is none to show
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values, the origin of each path, and what is already known to be wrong."""

    tree: dict[str, Any]
    origins: dict[KeyPath, Origin]
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Of the value, or where it is missing of what encloses it."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]


def read_document(
    file: Path | None,
    overrides: Sequence[str],
    *,
    short_form: IsShort = lambda path: False,
    option: str = "--set",
) -> Document:
    """The file, or nothing, with the overrides applied in order. Raises `ConfigError` where there is no document to
    speak of; everything else that is wrong is in `problems`.

    Where `short_form` says so of a path, text such as `topk` is short for `{kind: topk}`: an override may add to it.
    `option` is how an override is given.
    """
    document = Document({}, {(): Origin(option, (0, 0))}) if file is None else _read_file(file)
    for number, override in enumerate(overrides):
        _apply(
            document,
            override,
            Origin(f"{option} {_shown(without_secrets(override))}", (1, number)),
            short_form,
            option,
        )
    return document


def _read_file(file: Path) -> Document:
    text = _read_text(file)
    try:
        node = _compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: this is not YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise ConfigError(f"{file}: this is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply (at most {MAX_DEPTH} levels)") from None
    if node is None:
        needs = "name, student, teacher, prompts and training"
        raise ConfigError(f"{file}: the file is empty; a run needs at least {needs}")
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: a configuration is a mapping, lines of `key: value`")
    document = Document({}, {(): Origin(f"{file}:1", (0, 0))})
    reader = _Reader(document, lambda line: Origin(f"{file}:{line}", (0, line)))
    document.tree.update(reader.value(node, ()))
    return document


def _compose(text: str) -> Node | None:
    with warnings.catch_warnings(action="ignore"):  # a name of an anchor may be used again
        return YAML(typ="safe", pure=True).compose(text)


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as content:  # a pipe too: `<(...)` of a shell is one
            text = content.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ConfigError(f"{file}: has more than {MAX_BYTES // 1024} KiB; a configuration is a page or two")
        return text.decode("utf-8-sig")
    except FileNotFoundError:
        folder = file.parent
        siblings = [f.name for f in folder.glob("[!.]*.y*ml")] if folder.is_dir() else []
        hint = did_you_mean(file.name, siblings)
        if not hint and siblings:
            hint = f" (in {folder}: {', '.join(sorted(siblings)[:8])})"
        where = "" if folder.is_dir() else f" (the folder {folder} does not exist either)"
        raise ConfigError(f"{file}: there is no such file{where}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _Reader:
    """Turns nodes into plain values, noting origins and problems in the document."""

    def __init__(self, document: Document, origin_of_line: Any) -> None:
        self.document = document
        self.origin_of_line = origin_of_line
        self.scalars = YAML(typ="safe", pure=True).constructor
        self.num_values = 0

    def value(self, node: Node, path: KeyPath) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise ConfigError(
                f"{self._origin(node).text}: more than {MAX_VALUES} values or {MAX_DEPTH} levels "
                "(an alias that contains itself?)"
            )
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._noted(item, (*path, index), item) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        return self._refuse(node, path, str(node.tag), "tags are refused: write a plain value")

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._refuse(key_node, path, None, "a key must be text")
                continue
            key = self._scalar(ScalarNode(_TAG + "str", key_node.value, key_node.start_mark), path)
            if key in found:
                text = f"the key '{key}' is given twice, first in line {first_line[key]}; keep one"
                self._refuse(key_node, (*path, key), None, text)
                continue
            first_line[key] = key_node.start_mark.line + 1
            found[key] = self._noted(value_node, (*path, key), key_node)
        return found

    def _noted(self, node: Node, path: KeyPath, place: Node) -> Any:
        self.document.origins[path] = self._origin(place)
        return self.value(node, path)

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return self.scalars.construct_yaml_bool(node)
            if kind == "int":
                number = self.scalars.construct_yaml_int(node)
                if abs(number) >= 2**63:
                    return self._refuse(node, path, node.value, "is too large: a whole number has at most 63 bits")
                return number
            if kind == "float":
                return float(self.scalars.construct_yaml_float(node))
        except (ValueError, KeyError):
            return self._refuse(node, path, node.value, f"cannot be read as {kind}; put it in quotes if it is text")
        if kind not in ("str", "timestamp"):
            return self._refuse(node, path, node.tag, f"tags such as {node.tag} are refused: write a plain value")
        if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
            return self._refuse(node, path, node.value, "holds a character that no text has (NUL or half a surrogate)")
        secret = find_secret(node.value)
        if secret is not None:
            text = (
                f"is {secret}, and a configuration is written into the run folder, its report and the model card: take "
                "it out, and give it as an environment variable (HF_TOKEN) or in ~/.netrc on the run's machines"
            )
            return self._refuse(node, path, without_secrets(node.value), text)
        return node.value

    def _refuse(self, node: Node, path: KeyPath, value: Any, text: str) -> None:
        self.document.problems.append(Problem(self._origin(node), path, None if value is None else show(value), text))

    def _origin(self, node: Node) -> Origin:
        return self.origin_of_line(node.start_mark.line + 1)


def _apply(
    document: Document, override: str, origin: Origin, short_form: Callable[[KeyPath], bool], option: str
) -> None:
    """Set one path. What cannot be set is a problem of the document."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    holder: Any = document.tree
    path: KeyPath = ()

    def refuse(reason: str) -> None:
        document.problems.append(Problem(origin, tuple(parts) if equals else (), None, reason))

    if not equals or not all(parts):
        example = ", for example --set training.steps=100" if option == "--set" else ""
        return refuse(f"write {option} path.to.key=value{example}")
    try:
        node = _compose(text)
    except MarkedYAMLError as error:
        return refuse(f"the value is not YAML: {error.problem or error.context}")
    except (YAMLError, RecursionError):
        return refuse("the value is not YAML")
    for position, part in enumerate(parts):
        key = _key(holder, part)
        if key is None:
            return refuse(_no_place(path, holder, part))
        path = (*path, key)
        if position == len(parts) - 1:
            break
        if isinstance(holder, dict) and holder.get(key) is None:
            if parts[position + 1].isdecimal():
                return refuse(f"{dotted(path)} is not given in the file, so it has no item to change: set it whole")
            holder[key] = {}
            document.origins[path] = origin
        elif isinstance(holder[key], str) and short_form(path):
            holder[key] = {"kind": holder[key]}
            document.origins[*path, "kind"] = document.origins[path]
        holder = holder[key]
    for inside in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[inside]
    document.origins[path] = origin
    holder[path[-1]] = None if node is None else _Reader(document, lambda line: origin).value(node, path)
    return None


def _key(holder: Any, part: str) -> str | int | None:
    if isinstance(holder, dict):
        return part
    if isinstance(holder, list) and part.isdecimal() and int(part) < len(holder):
        return int(part)
    return None


def _no_place(path: KeyPath, holder: Any, part: str) -> str:
    where = dotted(path)
    if isinstance(holder, list):
        return (
            f"{where} is a list of {len(holder)}: use 0 to {len(holder) - 1} in place of '{part}', or set {where} whole"
        )
    return f"{where} is {show(holder)}, which holds no '{part}'; set {where} whole, for example {where}={{{part}: ...}}"


def dotted(path: KeyPath) -> str:
    """`objective.0.weight`."""
    return ".".join(str(part) for part in path)


def _shown(override: str) -> str:
    return override if len(override) <= 200 else override[:197] + "..."


def show(value: Any) -> str:
    """`repr`, cut where it would drown the message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""A YAML file plus `--set` overrides as plain values, and where each of them was written.

YAML by the 1.2 core rules: `1e-4` is a number, `no` is text; plain values only, no tags, no key twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import YAMLError

from configs.errors import ConfigError
from configs.keys import KeyPath, dotted, tag_at
from configs.refusal import did_you_mean
from configs.secrets import find_secret, without_named_secrets, without_secrets

MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_BYTES = 128 * 2**10
"""Of a file. YAML is parsed in Python: this much takes some seconds."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = YAML(typ="safe", pure=True).constructor
_READ: dict[str, Callable[[ScalarNode], Any]] = {
    "null": lambda node: None,
    "bool": _SCALARS.construct_yaml_bool,
    "int": _SCALARS.construct_yaml_int,
    "float": lambda node: float(_SCALARS.construct_yaml_float(node)),
    "str": lambda node: node.value,
    "timestamp": lambda node: node.value,
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a line of a file, or an override as it was typed."""

    text: str  # "runs/a.yaml:7" or "--set training.steps=0"
    order: tuple[int, int]  # (0, line) or (1, number of the override)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration."""

    origin: Origin
    path: KeyPath
    value: str | None  # as shown; None where there is none to show
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values, the origin of each path, and the mistakes found so far."""

    tree: dict[str, Any]
    origins: dict[KeyPath, Origin]
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Of the value; where it is missing, of the section around it."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]


def read_document(
    file: Path | None, overrides: Sequence[str], *, model: type[BaseModel] | None = None, option: str = "--set"
) -> Document:
    """Read a file, or begin empty, and apply the overrides in order; `option` is the option that gives one. Raises
    `ConfigError` where there is nothing to parse; all other mistakes are collected in `problems`.

    Where `model` has a choice between kinds, text such as `topk` is short for `{kind: topk}`: an override may set a
    parameter of it.
    """
    document = Document({}, {(): Origin(option if file is None else f"{file}:1", (0, 0))})
    if file is not None:
        document.tree.update(_values(document, _root(file), (), partial(_origin, file)))
    for number, override in enumerate(overrides):
        name, equals, text = override.partition("=")
        parts = _parts(document.tree, name.strip())
        origin = Origin(f"{option} {show(without_named_secrets(override), str, longest=200)}", (1, number))
        try:
            if not equals or not all(parts):
                example = ", for example --set training.steps=100" if option == "--set" else ""
                raise ConfigError(f"write {option} path.to.key=value{example}")
            _set(document, parts, _compose(text), origin, model)
        except ConfigError as error:
            document.problems.append(Problem(origin, parts if equals else (), None, str(error)))
    return document


def _parts(tree: Any, name: str) -> tuple[str, ...]:
    """`a.b.c` as keys; one that is there and has dots in it, such as the name of a task, is one key."""
    left, parts, holder = name.split("."), [], tree
    while left:
        known = holder if isinstance(holder, dict) else {}
        num = next((n for n in range(len(left), 1, -1) if ".".join(left[:n]) in known), 1)
        parts.append(".".join(left[:num]))
        holder, left = known.get(parts[-1]), left[num:]
    return tuple(parts)


def dump(values: Any, stream: Any) -> None:
    """Write plain values as YAML that `read_document` reads back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.dump(values, stream)


def show(value: Any, form: Callable[[Any], str] = repr, *, longest: int = 60) -> str:
    """The value as text, truncated."""
    text = form(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _origin(file: Path, node: Node) -> Origin:
    line = node.start_mark.line + 1
    return Origin(f"{file}:{line}", (0, line))


def _root(file: Path) -> MappingNode:
    node = _compose(_read_text(file), str(file))
    if node is None:
        needs = "name, student, teacher, prompts and training"
        raise ConfigError(f"{file}: the file is empty; a run needs at least {needs}")
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: a configuration is a mapping, lines of `key: value`")
    return node


def _compose(text: str, name: str = "") -> Node | None:
    """The text of a file as nodes, or that of an override, which has no name. Raises `ConfigError` that begins with the
    name and the number of the line."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a name of an anchor may be used again
            return YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply (at most {MAX_DEPTH} levels)".removeprefix(": ")) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
        place = f"{name}:{mark.line + 1}" if mark and name else name
        raise ConfigError(f"{place}: this is not YAML: {reason}".removeprefix(": ")) from None


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as content:  # a pipe too: `<(...)` of a shell is one
            text = content.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ConfigError(f"{file}: has more than {MAX_BYTES // 1024} KiB; a configuration is a page or two")
        return text.decode("utf-8-sig")
    except FileNotFoundError:
        folder = file.parent
        if not folder.is_dir():
            raise ConfigError(f"{file}: there is no such file, and no folder {folder}") from None
        siblings = sorted(f.name for f in folder.glob("[!.]*.y*ml"))
        others = f" (in {folder}: {', '.join(siblings[:8])})" if siblings else ""
        raise ConfigError(f"{file}: there is no such file{did_you_mean(file.name, siblings) or others}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _values(document: Document, node: Node, path: KeyPath, origin_of: Callable[[Node], Origin]) -> Any:
    """The plain values of a node; their origins and problems are noted in the document."""
    if len(document.origins) > MAX_VALUES or len(path) > MAX_DEPTH:
        most = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels (an alias that contains itself?)"
        raise ConfigError(f"{origin_of(node).text}: {most}")
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return dict(_items(document, node, path, origin_of))
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        document.origins.update({(*path, index): origin_of(item) for index, item in enumerate(node.value)})
        return [_values(document, item, (*path, index), origin_of) for index, item in enumerate(node.value)]
    try:
        return _plain(node)
    except ValueError as error:
        value = show(without_secrets(node.value)) if isinstance(node, ScalarNode) else None
        document.problems.append(Problem(origin_of(node), path, value, str(error)))


def _items(
    document: Document, node: MappingNode, path: KeyPath, origin_of: Callable[[Node], Origin]
) -> Iterator[tuple[str, Any]]:
    for key_node, value in node.value:
        place, at = origin_of(key_node), path
        try:
            if not isinstance(key_node, ScalarNode):
                raise ValueError("a key must be text")
            key = _plain(ScalarNode(_TAG + "str", key_node.value))
            at = (*path, key)
            if at in document.origins:
                raise ValueError(f"the key '{key}' is given twice, first in {document.origins[at].text}; keep one")
        except ValueError as error:
            document.problems.append(Problem(place, at, None, str(error)))
            continue
        document.origins[at] = place
        yield key, _values(document, value, at, origin_of)


def _plain(node: Node) -> Any:
    """The value of a scalar. Raises `ValueError` for one that is not accepted."""
    kind = str(node.tag).removeprefix(_TAG)
    if kind not in _READ or not isinstance(node, ScalarNode):
        raise ValueError(f"tags such as {node.tag} are refused: write a plain value")
    try:
        value = _READ[kind](node)
    except (ValueError, KeyError):
        raise ValueError(f"cannot be read as {kind}; put it in quotes if it is text") from None
    if kind == "int" and abs(value) >= 2**63:
        raise ValueError("is too large: a whole number has at most 63 bits")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ValueError("holds a character that no text has (NUL or half a surrogate)")
    secret = find_secret(value) if isinstance(value, str) else None
    if secret is not None:
        raise ValueError(
            f"is {secret}, and a configuration is written into the run folder, its report and the model card: take "
            "it out, and give it as an environment variable (HF_TOKEN; notify takes webhook: ${NAME}) or in ~/.netrc "
            "on the run's machines"
        )
    return value


def _set(
    document: Document, parts: Sequence[str], node: Node | None, origin: Origin, model: type[BaseModel] | None
) -> None:
    """Set one path. Raises `ConfigError` where there is no such place."""
    holder: Any = document.tree
    path: KeyPath = ()
    for part, following in zip(parts, (*parts[1:], None), strict=True):
        path = (*path, _key(holder, part, path))
        if following is None:
            break
        given = holder.get(part) if isinstance(holder, dict) else holder[path[-1]]
        tag = tag_at(path, model, document.tree) if isinstance(given, str) and model is not None else None
        if given is None and isinstance(holder, dict):
            if following.isdecimal():
                raise ConfigError(f"{dotted(path)} is not given in the file, so it has no item to change: set it whole")
            holder[part] = {}
            document.origins[path] = origin
        elif tag is not None:
            holder[path[-1]] = {tag: given}
            document.origins[*path, tag] = document.origins[path]
        holder = holder[path[-1]]
    for inside in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[inside]
    document.origins[path] = origin
    holder[path[-1]] = None if node is None else _values(document, node, path, lambda _: origin)


def _key(holder: Any, part: str, path: KeyPath) -> str | int:
    if isinstance(holder, dict):
        return part
    where = dotted(path)
    if not isinstance(holder, list):
        example = f"set {where} whole, for example {where}={{{part}: ...}}"
        raise ConfigError(f"{where} is {show(holder)}, which holds no '{part}'; {example}")
    if not part.isdecimal() or int(part) >= len(holder):
        use = f"use 0 to {len(holder) - 1} in place of '{part}', or set {where} whole"
        raise ConfigError(f"{where} is a list of {len(holder)}: {use}")
    return int(part)

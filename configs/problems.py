"""What pydantic found wrong, said to a person: place, value, what is allowed, and the word that was probably meant.

A file of its own so that no message ever speaks of validators, inputs or extra fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.document import Document, KeyPath, Problem, dotted, show
from configs.meant import meant
from configs.refusal import did_you_mean
from configs.schema import Run
from configs.section import NAME
from configs.stations import Station

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping, lines of `key: value`",
    "none_required": "null",
}
BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
PATTERNS = {NAME: "1 to 80 letters, digits, dots, dashes and underscores, beginning with a letter or digit"}


def find_problems(document: Document, error: ValidationError, model: type[BaseModel] = Run) -> list[Problem]:
    """Everything wrong with the document as an instance of `model`; the alternatives that one place allows are one
    problem."""
    expected: dict[KeyPath, list[str]] = {}
    found = list(document.problems)
    known = {problem.path for problem in found}
    details = error.errors(include_url=False)
    holders = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    for detail in details:
        path = _place(document.tree, detail["loc"])
        if path in known or (detail["type"] == "too_short" and detail["loc"] in holders):
            continue  # said already; a list is also called too short when its items are wrong
        allowed = _expected(detail)
        if allowed is None:
            value = None if detail["type"] == "missing" else _value(document.tree, path, detail["input"])
            found.append(Problem(document.origin(path), path, value, _sentence(document, path, detail, model)))
        elif path in expected:
            expected[path].append(allowed)
        else:
            expected[path] = [allowed]
    for path, alternatives in expected.items():
        value = _look(document.tree, path)
        text = "must be " + " or ".join(dict.fromkeys(alternatives)) + _hint(value, alternatives)
        if isinstance(value, str) and "path" in _fields(document.tree, path, model):
            text += f", here {{path: {value}}}"
        found.append(Problem(document.origin(path), path, show(value), text))
    return found


def render(title: str, problems: Sequence[Problem]) -> str:
    """The text of a `ConfigError`: a count, then, in the order of the file, origin, path, value and what to write."""
    lines = [f"{title}: {len(problems)} problem{'s' if len(problems) != 1 else ''}"]
    for problem in sorted(problems, key=lambda problem: problem.origin.order):
        value = "" if problem.value is None else f" = {problem.value}"
        lines.append(f"  {problem.origin.text}: {dotted(problem.path)}{value}".rstrip(": "))
        lines.append(f"      {problem.text}")
    return "\n".join(lines)


def _place(tree: Any, location: KeyPath) -> KeyPath:
    """pydantic's location without the branches of unions it tried, which are no part of the path."""
    path: KeyPath = ()
    node, outside = tree, False
    for part in location:
        if part == "[key]":
            continue  # of a mapping: the key itself is wrong, and part of the path already
        if outside or (isinstance(node, dict) and part not in node):
            path, outside = (*path, part), True
        elif isinstance(node, dict) or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            path, node = (*path, part), node[part]
        elif isinstance(node, list) and isinstance(part, int):
            path, outside = (*path, part), True
    return path


def _look(tree: Any, path: KeyPath) -> Any:
    for part in path:
        is_item = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not is_item and not (isinstance(tree, dict) and part in tree):
            return None
        tree = tree[part]
    return tree


def _value(tree: Any, path: KeyPath, given: Any) -> str | None:
    value = _look(tree, path)
    value = given if value is None else value
    return None if isinstance(value, dict | list | BaseModel) or value is None else show(value)


def _expected(detail: Any) -> str | None:
    """What would have been allowed, where the problem is of that sort; to be joined by "or"."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return context["expected"]
    if kind in BOUNDS:
        key, phrase = BOUNDS[kind]
        return f"{phrase} {context[key]:.15g}"
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
    if kind in ("string_too_short", "too_short"):
        least = context["min_length"]
        return ("text" if kind.startswith("string") else "a list") + (
            " that is not empty" if least == 1 else f" of at least {least}"
        )
    if kind in ("string_too_long", "too_long"):
        return f"at most {context['max_length']} long"
    stem = re.sub(r"_(type|parsing|parsing_size|from_float|attributes_type|sub_type)$", "", kind)
    return EXPECTED.get(stem)


def _hint(value: Any, alternatives: list[str]) -> str:
    if "text" in alternatives and isinstance(value, bool | int | float):
        return f" (in quotes: '{value}')"
    if isinstance(value, str) and any("number" in a for a in alternatives) and re.fullmatch(r"[-+\d.eE]+", value):
        return " (without quotes)"
    words = [word for text in alternatives for word in re.findall(r"'([^']*)'", text)]
    return did_you_mean(value, words) if isinstance(value, str) else ""


def _sentence(document: Document, path: KeyPath, detail: Any, model: type[BaseModel]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(document, path, model)
    if kind == "missing" and isinstance(path[-1], int):
        return f"item {path[-1]} of the list is missing"
    if kind == "missing":
        field = _fields(document.tree, path[:-1], model).get(str(path[-1]))
        meaning = f": {field.description}" if field is not None and field.description else ""
        return f"'{path[-1]}' is missing; it is required{meaning}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return detail["msg"]


def _unknown_key(document: Document, path: KeyPath, model: type[BaseModel]) -> str:
    here = list(_fields(document.tree, path[:-1], model))
    keys = _all_keys(document, model)
    others = keys.get(tuple(part for part in path if isinstance(part, str)))
    if others:
        return f"unknown key '{path[-1]}': remove {path[-1]}, only {' and '.join(others)} have it"
    return f"unknown key '{path[-1]}'{meant(path, here, keys)}"


def _all_keys(document: Document, model: type[BaseModel]) -> dict[KeyPath, list[str]]:
    """Every key, and for parameters of kinds that are not chosen the kinds that have them."""
    keys: dict[KeyPath, list[str]] = {}
    for path, field in all_paths(model):
        keys[path] = []
        station = _station(field)
        if station is None:
            continue
        chosen = _chosen(station, _look(document.tree, path))
        having: dict[str, list[str]] = {}
        for one in station.built_in:
            for name in one.model_fields:
                having.setdefault(name, []).append(station.kind_of(one))
        keys |= {(*path, name): [] if chosen in kinds else kinds for name, kinds in having.items()}
    return keys


def _chosen(station: Station, given: Any) -> Any:
    """The kind that is meant by what was written."""
    return given.get(station.tag, station.default) if isinstance(given, dict) else given or station.default


def _fields(tree: Any, path: KeyPath, model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that the schema knows at a path, those of the chosen kinds included; none for names of a user's."""
    fields: dict[str, FieldInfo] = dict(model.model_fields)
    annotation: Any = model
    for depth, part in enumerate(path):
        if get_origin(annotation) in (dict, tuple):
            annotation = next(item for item in reversed(get_args(annotation)) if item is not ...)
        elif part not in fields:
            return {}
        else:
            annotation = _without_none(fields[str(part)])
        station, section = _find(annotation, Station), _section(annotation)
        if get_origin(annotation) in (dict, tuple) or (station is None and section is None):
            fields = {}
        elif station is None:
            fields = dict(section.model_fields)
        else:
            try:
                fields = dict(station.parameters_of(_chosen(station, _look(tree, path[: depth + 1]))).model_fields)
            except ValueError:  # the kind itself is among the problems
                return {}
    return fields


def _without_none(field: FieldInfo) -> Any:
    """The annotation of a field with what pydantic took out of it, and without `| None`."""
    stations = [item for item in field.metadata if isinstance(item, Station)]
    annotation: Any = Annotated[field.annotation, stations[0]] if stations else field.annotation
    if get_origin(annotation) in (Union, UnionType):
        return next(argument for argument in get_args(annotation) if argument is not type(None))
    return annotation


def _find(annotation: Any, wanted: type[Station]) -> Station | None:
    """The station of an annotation, or of the items of its list."""
    found = (item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, wanted))
    inside = get_args(annotation) if get_origin(annotation) in (Union, UnionType, tuple) else ()
    return next(found, None) or next((one for one in (_find(a, wanted) for a in inside) if one), None)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None`, `tuple[Model, ...]` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple, dict):
        return next((found for found in map(_section, get_args(annotation)) if found is not None), None)
    return None


def all_paths(model: type[BaseModel] = Run, above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every field of the schema with its path, parameters of stations and what stands below names of a user's
    excepted."""
    for name, field in model.model_fields.items():
        yield (*above, name), field
        annotation = _without_none(field)
        section = _section(annotation)
        if section is not None and _station(field) is None and get_origin(annotation) is not dict:
            yield from all_paths(section, (*above, name))


def is_choice(path: KeyPath, model: type[BaseModel] = Run) -> bool:
    """Whether the schema takes a kind at a path."""
    field = _fields({}, path[:-1], model).get(str(path[-1])) if path else None
    return field is not None and _station(field) is not None


def _station(field: FieldInfo) -> Station | None:
    return _find(_without_none(field), Station)

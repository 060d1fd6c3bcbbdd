"""What pydantic found wrong, said to a person: place, value, what is allowed, and the word that was probably meant.

A file of its own so that no message ever speaks of validators, inputs or extra fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.document import Document, KeyPath, Problem, dotted, show
from configs.meant import meant
from configs.refusal import did_you_mean
from configs.schema import Run
from configs.section import NAME
from configs.stations import Station

Holder = type[BaseModel] | Station | None
"""What describes the keys of a mapping."""

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
    keys = _all_keys(document, model)
    key, others = path[-1], keys.get(tuple(part for part in path if isinstance(part, str)))
    if others:
        return f"unknown key '{key}': remove {key}, only {' and '.join(others)} have it"
    return f"unknown key '{key}'{meant(path, list(_fields(document.tree, path[:-1], model)), keys)}"


def _all_keys(document: Document, model: type[BaseModel]) -> dict[KeyPath, list[str]]:
    """Every key, and for parameters of kinds that are not chosen the kinds that have them."""
    keys: dict[KeyPath, list[str]] = {}
    for path, field in _all_paths(model, document.tree):
        keys[path] = []
        station = _holds(field)
        if not isinstance(station, Station):
            continue
        chosen = _chosen(station, _look(document.tree, path))
        for name in dict.fromkeys(name for one in station.built_in for name in one.model_fields):
            kinds = [station.kind_of(one) for one in station.built_in if name in one.model_fields]
            keys[*path, name] = [] if chosen in kinds else kinds
    return keys


def _all_paths(model: type[BaseModel], tree: Any, above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every field of the schema with its path, below the names that the tree gives; not the parameters of kinds."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield path, field
        given, inside = _look(tree, path), _holds(field)
        if isinstance(inside, type):
            places = (
                [(*path, key) for key in given or ()] if _by_name(field) and isinstance(given, dict | None) else [path]
            )
            for place in places:
                yield from _all_paths(inside, tree, place)


def is_choice(path: KeyPath) -> bool:
    """Whether a run takes a kind at this path."""
    return bool(path) and isinstance(_holds(_fields({}, path[:-1], Run).get(str(path[-1]))), Station)


def _fields(tree: Any, path: KeyPath, model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that may stand at a path, those of the chosen kind included; none where the keys are a user's."""
    holder: Holder = model
    inside_many = False  # whether the next part is a name or an index, of something that `holder` describes
    for depth, part in enumerate(path):
        if not inside_many and not isinstance(part, int):
            field = _members(holder, _look(tree, path[:depth])).get(part)
            holder = _holds(field)
        inside_many = not inside_many and field is not None and _by_name(field)
    return {} if inside_many else _members(holder, _look(tree, path))


def _members(holder: Holder, given: Any) -> dict[str, FieldInfo]:
    if isinstance(holder, Station):
        try:
            holder = holder.parameters_of(_chosen(holder, given))
        except ValueError:  # the kind itself is among the problems
            return {}
    return {} if holder is None else dict(holder.model_fields)


def _chosen(station: Station, given: Any) -> Any:
    """The kind that is meant by what was written."""
    return given.get(station.tag, station.default) if isinstance(given, dict) else given or station.default


def _holds(field: FieldInfo | None) -> Holder:
    """The section or station of a field, whatever is around it: `None |`, a list, names."""

    def search(annotation: Any) -> Holder:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        station = next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Station)), None)
        return station or next(filter(None, map(search, get_args(annotation))), None)

    if field is None:
        return None
    return next((mark for mark in field.metadata if isinstance(mark, Station)), None) or search(field.annotation)


def _by_name(field: FieldInfo) -> bool:
    """Whether a field is a mapping whose keys are a user's names."""
    return dict in (get_origin(field.annotation), *map(get_origin, get_args(field.annotation)))

"""User-facing messages from pydantic's errors: place, value, what is allowed, and the word that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.document import Document, Problem, show
from configs.keys import Key, KeyPath, dotted, keys_of, unknown_key
from configs.refusal import did_you_mean
from configs.secrets import MASK, says_secret
from configs.section import NAME

PLAINLY = {
    r"^\w+ should (?=have|be|match)": "must ",
    r"^Input is not ": "must be ",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid (array|list|tuple)": "a list",
    "an object|a valid dictionary": "a mapping, lines of `key: value`",
    "less than or equal to": "at most",
    "greater than or equal to": "at least",
    " after validation, not .*": "",
    re.escape(f"match pattern '{NAME}'"): "be 1 to 80 letters, digits, dots, dashes and underscores, beginning with a "
    "letter or digit",
}
"""Patterns in pydantic's messages and their replacements."""


def find_problems(document: Document, error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Everything wrong with the document as an instance of `model`; the alternatives that one place allows are one
    problem."""
    keys = list(keys_of(model, document.tree))
    known = {problem.path for problem in document.problems}
    details = error.errors(include_url=False)
    holders = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    found: dict[tuple[KeyPath, str], tuple[Any, str]] = {}  # the value and what is wrong with it
    for detail in details:
        path = _place(document.tree, detail["loc"])
        if path in known or (detail["type"] == "too_short" and detail["loc"] in holders):
            continue  # said already; a list is also called too short when its items are wrong
        if detail["type"] in ("value_error", "rule") and any(bad[: len(path)] == path for bad in known):
            continue  # a rule of a section, asked without the value below that could not be read
        text = _sentence(path, detail, keys)
        one = path, "must be" if text.startswith("must be ") else text
        _, before = found.get(one, (None, ""))
        if before and text not in before:
            text = f"{before} or {text.removeprefix('must be ')}"
        found[one] = (None if detail["type"] == "missing" else detail["input"], text)
    problems = list(document.problems)
    for (path, _), (value, text) in found.items():
        shown = None if isinstance(value, dict | BaseModel | None) else show(value)
        if shown is not None and path and says_secret(str(path[-1])):
            shown = MASK
        problems.append(Problem(document.origin(path), path, shown, text + _hints(path, value, text, keys)))
    return problems


def render(title: str, problems: Sequence[Problem]) -> str:
    """The text of a `ConfigError`: a count, then, in the order of the file, origin, path, value and what to write."""
    lines = [f"{title}: {len(problems)} problem{'s' if len(problems) != 1 else ''}"]
    for problem in sorted(problems, key=lambda problem: problem.origin.order):
        value = "" if problem.value is None else f" = {problem.value}"
        lines.append(f"  {problem.origin.text}: {dotted(problem.path)}{value}".rstrip(": "))
        lines.append(f"      {problem.text}")
    return "\n".join(lines)


def _place(tree: Any, location: KeyPath) -> KeyPath:
    """pydantic's location without the branches of unions, and without "[key]", which repeats the key before it."""
    path: KeyPath = ()
    for part in location:
        if part != "[key]" and (isinstance(tree, dict) or (isinstance(tree, list) and isinstance(part, int))):
            path = (*path, part)
            is_given = part in tree if isinstance(tree, dict) else part < len(tree)
            tree = tree[part] if is_given else {}  # below what is missing, all parts count
    return path


def _sentence(path: KeyPath, detail: Any, keys: Sequence[Key]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown_key(path, keys)
    if kind == "missing" and isinstance(detail["input"], dict) and len(detail["input"]) == 1 and _is_bare(path, detail):
        [(tag, named)] = detail["input"].items()
        name = detail["loc"][-1]
        return f"{named} needs '{name}', which is missing: write {{{tag}: {named}, {name}: ...}}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"item {path[-1]} of the list is missing"
    if kind == "missing":
        meaning = next((f": {key.field.description}" for key in keys if key.path == path and key.field.description), "")
        return f"'{path[-1]}' is missing; it is required{meaning}"
    if kind in ("value_error", "rule"):
        return str(detail["ctx"].get("error", detail["msg"]))
    text = detail["msg"]
    for pattern, plain in PLAINLY.items():
        text = re.sub(pattern, plain, text)
    return text


def _is_bare(path: KeyPath, detail: Any) -> bool:
    """Whether what is missing is a parameter of a kind that stands as one word, `[jsd]` for `[{loss: jsd}]`."""
    return bool(path) and detail["loc"][-1] != path[-1]


def _hints(path: KeyPath, value: Any, text: str, keys: Sequence[Key]) -> str:
    if not text.startswith("must be "):
        return ""
    if "text" in text.split() and isinstance(value, bool | int | float):
        return f" (in quotes: '{value}')"
    if not isinstance(value, str):
        return ""
    quotes = " (without quotes)" if "number" in text and re.fullmatch(r"[-+\d.eE]+", value) else ""
    below = [name for name in ("path", "engine") if any(key.path == (*path, name) for key in keys)]
    if text == "must be a list":
        return f", here [{value}]"
    example = f", here {{{below[0]}: {value}}}" if below else ""
    return quotes + did_you_mean(value, re.findall(r"'([^']*)'", text)) + example

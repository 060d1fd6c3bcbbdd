"""The keys of a configuration: which exist where, and suggestions for an unknown one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.refusal import did_you_mean
from configs.stations import Station
from configs.words import MANY_MEANINGS, NEW_SPELLING, NOT_NEEDED, OTHER_WORDS

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """A key that a configuration may have."""

    path: KeyPath
    field: FieldInfo
    kinds: tuple[str, ...] = ()  # that have it, where the one that is chosen has not


def dotted(path: KeyPath) -> str:
    """`objective.0.weight`."""
    return ".".join(map(str, path))


def keys_of(model: type[BaseModel], given: Any, above: KeyPath = ()) -> Iterator[Key]:
    """All keys of a section and of its subsections, expanded for the names, list items and kinds in `given`."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield Key(path, field)
        inside = given.get(name) if isinstance(given, dict) else None
        yield from _keys_in(field.annotation, inside, path, field.metadata)


def tag_at(path: KeyPath, model: type[BaseModel], given: Any) -> str | None:
    """The tag, `kind` or `loss`, where the value at `path` is a choice between kinds."""
    paths = {key.path for key in keys_of(model, given)}
    return next((tag for tag in ("kind", "loss") if (*path, tag) in paths), None)


def unknown_key(path: KeyPath, keys: Sequence[Key]) -> str:
    """The message for a key that is unknown at its place."""
    above, key = path[:-1], str(path[-1])
    beside = [one for one in keys if one.path[:-1] == above]
    if kinds := next((one.kinds for one in beside if one.path == path), ()):
        return f"unknown key '{key}': remove {key}, only {' and '.join(kinds)} {'have' if kinds[1:] else 'has'} it"
    return f"unknown key '{key}'" + _meant(path, [str(one.path[-1]) for one in beside if not one.kinds], keys)


def _meant(path: KeyPath, here: Sequence[str], keys: Sequence[Key]) -> str:
    key, above = str(path[-1]), path[:-1]
    if new := NEW_SPELLING.get(dotted(path)):
        return f"; it is now written {new}"
    if reason := NOT_NEEDED.get(dotted(path), NOT_NEEDED.get(key)):
        return f"; remove it: {reason}"
    word = OTHER_WORDS.get(dotted(path), OTHER_WORDS.get(key, key))
    if word in here:
        return f"; did you mean '{word}'?"
    places = [one for one in keys if one.path[-1] == word]
    below = [one for one in places if one.path[: len(above)] == above]
    near = [one for one in places if one.path[0] == path[0]]
    if found := below if word in MANY_MEANINGS else below or near or places:
        belongs = " or ".join(dict.fromkeys(map(_written, found)))
        return f"; it belongs in {belongs}{did_you_mean(key, here, cutoff=0.85)}"
    return did_you_mean(key, here) or f" (known here: {', '.join(here) or 'none'})"


def _written(key: Key) -> str:
    top = " (at the top level)" if len(key.path) == 1 else ""
    return dotted(key.path) + top + (f" (of kind {' or '.join(key.kinds)})" if key.kinds else "")


def _keys_in(annotation: Any, given: Any, path: KeyPath, marks: Sequence[Any] = ()) -> Iterator[Key]:
    """Keys below a value of this type: a section, a choice, a mapping or list of them, or a union."""
    around, inside = get_origin(annotation), get_args(annotation)
    if stations := [mark for mark in marks if isinstance(mark, Station)]:
        yield from _keys_of_kinds(stations[0], given, path)
    elif around is Annotated:
        yield from _keys_in(inside[0], given, path, inside[1:])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from keys_of(annotation, given, path)
    elif around is dict:
        for name, value in given.items() if isinstance(given, dict) else ():
            yield from _keys_in(inside[1], value, (*path, name))
    elif around is tuple:
        items = [((*path, index), item) for index, item in enumerate(given)] if isinstance(given, list) else []
        for place, item in items or [(path, None)]:
            yield from _keys_in(inside[0], item, place)
    else:
        for one in inside:
            yield from _keys_in(one, given, path)


def _keys_of_kinds(station: Station, given: Any, path: KeyPath) -> Iterator[Key]:
    chosen = given.get(station.tag, station.default) if isinstance(given, dict) else given or station.default
    try:
        parameters = station.parameters_of(chosen)
    except ValueError:  # the kind itself is among the problems
        parameters = None
    known = {} if parameters is None else parameters.model_fields
    if parameters is not None:
        yield from keys_of(parameters, given, path)
    for name, field in {name: field for one in station.built_in for name, field in one.model_fields.items()}.items():
        if name not in known:
            kinds = tuple(station.kind_of(one) for one in station.built_in if name in one.model_fields)
            yield Key((*path, name), field, kinds)

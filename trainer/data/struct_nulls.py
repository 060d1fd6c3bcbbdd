"""Nulls that a table adds to the objects inside its rows.

A column of objects in Arrow has the fields of all of them, null where one has none. Left there, a tool call would
gain the arguments of other rows' calls: a field that is null inside an object of such a column counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_struct_nulls(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a table with these `datasets.Features`. Columns of its type Json hold what was written, nulls too."""
    return {name: _without(value, features.get(name)) for name, value in row.items()}


def _without(value: Any, feature: Any) -> Any:
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _without(inside, feature.get(name)) for name, inside in value.items() if inside is not None}
    if isinstance(value, list):
        item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without(inside, item) for inside in value] if item is not None else value
    return value

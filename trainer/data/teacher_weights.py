"""The weights of teachers that a row says: a field `{name: number}`, or that as JSON text, as cells of a CSV are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

_LARGEST = 1e9


def weights_of(value: Any, teachers: Sequence[str]) -> dict[str, float]:
    """By teacher; one that is absent or null has 0. Raises `ValueError` where they are no weights of these teachers."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    example = "write {" + ", ".join(f'"{name}": 1' for name in teachers) + "}"
    if not isinstance(value, Mapping):
        raise ValueError(f"{'is missing' if value is None else f'is {value!r}'}; {example}")
    if unknown := [name for name in value if name not in teachers]:
        raise ValueError(f"{unknown[0]!r} is no teacher of the ensemble; {example}")
    weights = {name: 0.0 if value.get(name) is None else value[name] for name in teachers}
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or not 0 <= weight <= _LARGEST:
            raise ValueError(f"the weight of {name} is {weight!r}, no number from 0 to {_LARGEST:g}; {example}")
    if not any(weights.values()):
        raise ValueError(f"every weight is 0; {example}")
    return {name: float(weight) for name, weight in weights.items()}

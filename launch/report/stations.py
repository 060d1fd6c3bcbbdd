"""What the labels of a run are and what is learnt of them, in a line for each task, from its resolved configuration.

The configuration of an old or edited run folder need not be valid: what is not there, or of another shape, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SILENT = (None, "", [], {})
_DEFAULTS = {"temperature": 1, "weight": 1}


def stations(config: Mapping[str, Any]) -> list[str]:
    """`labels: topk (k 64); objective: 0.9 forward_kl + 0.1 cross_entropy`; of several tasks each behind its name."""
    tasks = config.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        return [text for text in [_line(config, {})] if text]
    lines = ((name, _line(config, task)) for name, task in tasks.items() if isinstance(task, Mapping))
    return [f"{name}: {line}" for name, line in lines if line]


def _line(config: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    said = {key: task.get(key) or config.get(key) for key in ("labels", "align", "ensemble", "objective")}
    parts = [f"{key}: {text}" for key, of in said.items() if (text := _TEXTS[key](of))]
    return "; ".join(parts) if said["labels"] or said["objective"] else ""


def _choice(value: Any, tag: str = "kind") -> str:
    """`nucleus (p 0.98, k_max 256)`, without what has no effect."""
    if not isinstance(value, Mapping):
        return value if isinstance(value, str) else ""
    numbers = ", ".join(_parameters(value, tag))
    return f"{value.get(tag, '')} ({numbers})" if numbers else str(value.get(tag, ""))


def _parameters(value: Mapping[str, Any], tag: str) -> Iterator[str]:
    for name, one in value.items():
        if name in (tag, "weight", "token_weights") or one in _SILENT or one is False:
            continue
        if one == _DEFAULTS.get(name):
            continue
        yield name if one is True else f"{name} {_list(one)}"


def _list(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _objective(terms: Any) -> str:
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        return ""
    return " + ".join(filter(None, map(_term, terms)))


def _term(term: Any) -> str:
    text = _choice(term, "loss")
    if not isinstance(term, Mapping) or not text:
        return text
    weights = [_choice(one) for one in term.get("token_weights") or ()]
    times = "" if term.get("weight", 1) == 1 else f"{term['weight']} "
    return f"{times}{text}" + (f" of tokens weighted by {' and '.join(weights)}" if weights else "")


def _ensemble(value: Any) -> str:
    if not isinstance(value, Mapping):
        return ""
    return f"{value.get('how', '')} of {' and '.join(map(str, value.get('teachers') or ()))}"


_TEXTS = {"labels": _choice, "align": _choice, "ensemble": _ensemble, "objective": _objective}

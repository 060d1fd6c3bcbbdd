"""How the training losses of a run compare with their values over the whole vocabulary, as the registry of terms says.

A file because the first lines of a run, its manifest (and so its report) and its model card say it in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping

from configs.losses import Exactness
from configs.schema import Run

_WORDS: dict[Exactness, str] = {
    "exact": "exact",
    "lower_bound": "a lower bound of the value over the whole vocabulary",
    "unbiased": "an unbiased estimate of the value over the whole vocabulary",
    "biased": "a biased estimate of the value over the whole vocabulary",
}
_TOLD = ("lower_bound", "biased")
"""What a person should know before a number is compared with those of other labels."""


def exactness_of(run: Run) -> dict[str, str]:
    """By term (`forward_kl`; of a task among several `chat/forward_kl`) what its value is."""
    return {name: _words(found, kind) for name, found, kind in _cells(run)}


def told_at_start(run: Run) -> list[str]:
    """At most one line: the terms whose values are bounds or biased."""
    cells = {name: _words(found, kind) for name, found, kind in _cells(run) if found in _TOLD}
    aligned = any(task.align is not None for task in run.resolved_tasks().values())
    held_out = "Held-out KL is over the rows and the tokens that both tokenizers have" if aligned else ""
    return [f"{_together(cells)}. {held_out or 'Held-out numbers are exact'}"] if cells or aligned else []


def losses_note(said: object) -> str:
    """What the report says beside its charts of `exactness_of`, as the manifest holds it; empty where that lacks it."""
    if not isinstance(said, Mapping) or not all(isinstance(one, str) for pair in said.items() for one in pair):
        return ""
    held_out = "Held-out numbers are of rows that are not trained on, after the step that they stand at"
    return f"Training loss: {_together(said)}. {held_out}." if said else ""


def _together(words: Mapping[str, str]) -> str:
    """Terms of which the same is said are named together."""
    by_words: dict[str, list[str]] = {}
    for name, found in words.items():
        by_words.setdefault(found, []).append(name)
    return "; ".join(f"{_and(names)} {'are each' if names[1:] else 'is'} {found}" for found, names in by_words.items())


def _and(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _cells(run: Run) -> list[tuple[str, Exactness | None, str]]:
    """(term, exactness, kind of labels) of every task; None where nobody declared it."""
    return [
        (
            f"{task.name}/{term.loss}" if run.tasks else term.loss,
            "biased" if task.align is not None and "labels" in term.needs else term.exactness_of(task.labels),
            task.labels.kind,
        )
        for task in run.resolved_tasks().values()
        for term in task.objective
    ]


def _words(found: Exactness | None, kind: str) -> str:
    if found == "exact":
        return _WORDS[found]
    return f"{'not declared' if found is None else _WORDS[found]} (labels: {kind})"

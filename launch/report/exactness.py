"""How the training losses of a run compare with their values over the whole vocabulary, as the registry of terms says.

A file because the first lines of a run, its manifest (and so its report) and its model card say it in the same words.
"""

from __future__ import annotations

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
    cells = [f"{name} is {_words(found, kind)}" for name, found, kind in _cells(run) if found in _TOLD]
    aligned = any(task.align is not None for task in run.resolved_tasks().values())
    held_out = "Held-out KL is over the rows and the tokens that both tokenizers have" if aligned else ""
    return [f"{'; '.join(cells)}. {held_out or 'Held-out numbers are exact'}"] if cells or aligned else []


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

"""What was trained on, token by token: the format of trained.json and what the page shows of it.

trained.json: `{"step": int, "sequences": [sequence, ...]}`, of the last step that was evaluated, where a sequence is

    {"id": str, "task": str, "teacher": str, "labels": kind of encoding, "how": method of `align` or "",
     "tokens": [str] * L, "rows": [row, ...]}

and a row what `LabelRows` of `trainer/checks/shown.py` has of one: it is about token `row` + 1, whose id is
`token`. Log-probabilities and entropies are in nats, tails are probabilities; what nobody knows is null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.section import MAIN, TOGETHER
from launch.report import artifacts
from launch.report.artifacts import LabelRow, Tell, TrainedSequence
from launch.report.numbers import compact, percent
from launch.report.viewer import row_title, token_texts
from trainer.checks.shown import TrainedTokens
from trainer.records import ignore
from trainer.run_folder import RunFolder, plain

Decode = Callable[[list[int]], str]

MEANINGS = {
    "topk": "The label keeps the likeliest ids; all others are one event, of which only the mass is known.",
    "nucleus": "The label keeps the likeliest ids that together reach a mass; all others are one event.",
    "sampled": "The label holds shares of random draws, and of control ids the probability itself. What was not drawn "
    "counts as zero: its true mass is shown, and not trained on.",
    "given_ids": "The label keeps ids that the student found likeliest, and the token itself; the rest is one event.",
    "hidden": "The label is the teacher's hidden state: no ids are kept, all have their exact probability. The "
    "likeliest are shown.",
    "dense": "The label holds all ids. The likeliest are shown.",
    "token": "The label is one number, the teacher's log-probability of the token itself. Of all other ids only their "
    "sum is known.",
}
CHUNKS = (
    "The teacher reads other tokens. The label is the sum of its log-probabilities over the shortest stretches of text "
    "that both tokenizers cut out."
)
ALIGNED = (
    "The teacher reads other tokens, and its ids are shown as it writes them. A row has a label where the same bytes "
    "stand before both predictions."
)


def trained_records(trained: Sequence[TrainedTokens], decode: Decode, teachers: Callable[[str, str], Decode]) -> dict:
    """As trained.json wants them. `decode` is of the student's tokenizer, `teachers` gives by task and teacher that of
    one with another."""
    return {
        "step": trained[0].step if trained else 0,
        "sequences": [_record(one, decode, teachers(one.task, one.teacher) if one.how else decode) for one in trained],
    }


def _record(one: TrainedTokens, decode: Decode, of_teacher: Decode) -> dict[str, Any]:
    texts: dict[int, str] = {}
    before = next((ids[0] for ids in one.beside if len(ids)), None) if one.how else one.token_ids[one.rows[0]]

    def text(token: int) -> str:
        if token not in texts:
            texts[token] = token_texts([*([] if before is None else [int(before)]), token], of_teacher)[-1]
        return texts[token]

    label = one.label
    numbers = ("tail", "student_tail", "entropy", "student_entropy", "target", "student_target", "kl")
    columns = {name: _rounded(getattr(label, name)) for name in numbers}
    teacher, student = _rounded(label.teacher), _rounded(label.student)
    rows = [
        {
            "row": int(row),
            "token": int(one.token_ids[row + 1]),
            "kept": int(label.num_kept[n]),
            "ids": [
                {
                    "id": int(token),
                    "text": text(int(token)),
                    "teacher": teacher[n][m],
                    "student": student[n][m],
                    "control": bool(label.control[n, m]),
                }
                for m, token in enumerate(label.ids[n])
                if token >= 0
            ],
            **{name: values[n] for name, values in columns.items()},
            **({"group": int(one.groups[n]), "beside": _texts(one.beside[n], of_teacher)} if one.how else {}),
        }
        for n, row in enumerate(one.rows)
    ]
    names = {"id": one.id, "task": one.task, "teacher": one.teacher, "labels": one.labels, "how": one.how}
    return {**names, "tokens": token_texts(plain(one.token_ids), decode), "rows": rows}


def _texts(ids: Any, decode: Decode) -> list[str]:
    return token_texts(plain(ids), decode)


def _rounded(values: Any) -> Any:
    """Four decimals, null for what is not finite."""
    if values.ndim == 2:
        return [_rounded(row) for row in values]
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


@dataclass(frozen=True, slots=True)
class LabelledToken:
    """One token; `label` is None where the loss does not look."""

    text: str
    label: LabelRow | None

    @property
    def is_reached(self) -> bool:
        """Whether a teacher said something of it."""
        return self.label is not None and self.label["kept"] != 0

    def heat(self, hottest: float) -> float:
        """0 (the student agrees with the label) to 1."""
        kl = None if self.label is None else self.label["kl"]
        return 0.0 if kl is None else round(min(1.0, math.sqrt(max(0.0, kl) / hottest)), 2)

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        assert self.label is not None
        label = self.label
        ids = [[one["text"], one["id"], one["teacher"], one["student"], int(one["control"])] for one in label["ids"]]
        names = (
            "token",
            "kept",
            "tail",
            "student_tail",
            "entropy",
            "student_entropy",
            "target",
            "student_target",
            "kl",
        )
        return {"ids": ids, **{name: label[name] for name in names}, "beside": label.get("beside", [])}


@dataclass(frozen=True, slots=True)
class LabelledSequence:
    """A sequence of the page."""

    title: str
    labels: str
    how: str
    meaning: str
    numbers: str
    tokens: tuple[LabelledToken, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """What the section shows. A KL of `hottest` nats or more has the strongest colour."""

    step: int
    sequences: tuple[LabelledSequence, ...]
    hottest: float


def read_trained(folder: RunFolder, *, tell: Tell = ignore) -> Trained | None:
    """None where trained.json does not exist or holds nothing. `tell` gets a sentence for what cannot be read."""
    step, sequences = artifacts.read_trained(folder, tell=tell)
    if not sequences:
        return None
    kls = sorted(row["kl"] for one in sequences for row in one["rows"] if row["kl"] is not None)
    hottest = max(0.5, kls[int(0.95 * (len(kls) - 1))]) if kls else 1.0
    return Trained(step, tuple(_viewed(one) for one in sequences), hottest)


def _viewed(one: TrainedSequence) -> LabelledSequence:
    by_token = {row["row"] + 1: row for row in one["rows"]}
    task = "" if one["task"] == MAIN else one["task"]
    teacher = f", teacher {one['teacher'].replace(TOGETHER, ' and ')}" if one["teacher"] else ""
    meaning = MEANINGS.get(one["labels"], "The label is an encoding of your own.")
    if one["how"]:
        meaning = CHUNKS if one["how"] == "chunks" else f"{meaning} {ALIGNED}"
    return LabelledSequence(
        title=row_title(f"{task}/{one['id']}" if task else one["id"], "training row") + teacher,
        labels=one["labels"],
        how=one["how"],
        meaning=meaning,
        numbers=_numbers(one["rows"], one["labels"]),
        tokens=tuple(LabelledToken(text, by_token.get(at)) for at, text in enumerate(one["tokens"])),
    )


def _numbers(rows: Sequence[LabelRow], labels: str) -> str:
    """The means over the shown rows, of what is known."""
    reached = [row for row in rows if row["kept"] != 0]
    parts = []
    for name, text, form in (
        ("tail", "{} drawn" if labels == "sampled" else "{} kept", lambda tail: percent(1 - tail)),
        ("entropy", f"entropy of the {'teacher' if labels == 'sampled' else 'label'} {{}}", compact),
        ("student_entropy", "of the student {}", compact),
        ("kl", "KL {} nats", compact),
    ):
        values = [row[name] for row in reached if row[name] is not None]
        if values:
            parts.append(text.format(form(math.fsum(values) / len(values))))
    parts.append(f"{len(rows)} tokens")
    if len(reached) < len(rows):
        parts.append(f"{len(rows) - len(reached)} of them without a label")
    return ", ".join(parts)

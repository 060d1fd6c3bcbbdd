"""What several teachers say of the same rows, as one distribution or as one pair for each of them.

probability_mean   log sum_m w_m p_m             the mixture: keeps every teacher's modes
logit_mean         log_softmax(sum_m w_m log p_m)  the geometric mean, renormalised: what all of them find likely
per_teacher        a pair for each, for terms that are weighted with w_m
min_ce             of each sequence the teacher with the least cross-entropy on its target ids (FuseLLM, arXiv
                   2401.10491, MinCE), told before the loss: then its labels are those of that teacher alone

The weights of a row sum to one. An encoding is told nothing of this: its pairs with each teacher are combined here.

Probabilities of kept ids and of the lumped tail add up, so that probability_mean is as exact over ids that all teachers
were asked about as it is over the vocabulary; the normaliser of logit_mean needs all of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import torch

from configs.tasks import How
from trainer.labels.encoding import ALIGNED, Encoding
from trainer.labels.token import LOGPROB
from trainer.losses.target import TargetEvent
from trainer.model.head import Head
from trainer.types import PairedLogProbs

WEIGHT = "weight"
"""The column `<teacher>/weight` of merged labels, float32 [n, 1]."""

TARGET = "target"
"""The column of an encoding that holds the log-probability of the target id."""

Mix = Callable[[AbstractSequence[torch.Tensor], AbstractSequence[torch.Tensor]], torch.Tensor]
"""Log-probabilities [n, E] of each teacher over one event set, weights [n, 1] of each -> log-probabilities [n, E]."""


def probability_mean(teachers: AbstractSequence[torch.Tensor], weights: AbstractSequence[torch.Tensor]) -> torch.Tensor:
    """log sum_m w_m p_m."""
    total = teachers[0] + weights[0].log()
    for logprobs, weight in zip(teachers[1:], weights[1:], strict=True):
        total = torch.logaddexp(total, logprobs + weight.log())
    return total


def logit_mean(teachers: AbstractSequence[torch.Tensor], weights: AbstractSequence[torch.Tensor]) -> torch.Tensor:
    """log_softmax(sum_m w_m log p_m)."""
    total = teachers[0] * weights[0]
    for logprobs, weight in zip(teachers[1:], weights[1:], strict=True):
        total = total + logprobs * weight
    return total.log_softmax(1)


def mix_of(how: How) -> Mix:
    """By which teachers become one. Those of `per_teacher` are never one in training; in an evaluation their mixture
    stands for them, which is what forward_kl to each of them has its optimum at."""
    return logit_mean if how == "logit_mean" else probability_mean


@dataclass(frozen=True, slots=True)
class Together:
    """Labels of several teachers in the place of those of one: an `Encoding` of the columns `<teacher>/<column>`."""

    encoding: Encoding  # of each teacher
    teachers: tuple[str, ...]
    how: How
    heads: Mapping[str, Head | None] = field(default_factory=dict)
    aligned: Mapping[str, Encoding] = field(default_factory=dict)
    """By teacher, of those with tokenizers of their own: in the place of `encoding`. Those of a mixture are over the
    same events."""

    def encoding_of(self, teacher: str) -> Encoding:
        return self.aligned.get(teacher, self.encoding)

    @property
    def temperature(self) -> float:
        """Of every teacher's labels."""
        return self.encoding.temperature

    def prepare(
        self, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> Mapping[str, torch.Tensor]:
        """As that of the encoding, for each teacher with its own head."""
        prepared = {}
        for name in self.teachers:
            columns = self.encoding_of(name).prepare(columns_of(labels, name), self.heads.get(name))
            prepared |= _named(name, columns)
            prepared[f"{name}/{WEIGHT}"] = labels[f"{name}/{WEIGHT}"]
        return prepared | {name: labels[name] for name in (ALIGNED,) if name in labels}

    def align(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None = None
    ) -> PairedLogProbs:
        """The student beside the one distribution that the teachers become."""
        pairs = self.pairs(logits, labels)
        weights, mix = [labels[f"{name}/{WEIGHT}"] for name in self.teachers], mix_of(self.how)
        first, target = pairs[self.teachers[0]], None
        if first.teacher_target is not None:
            target = mix([pairs[name].teacher_target[:, None] for name in self.teachers], weights)[:, 0]
        mixed = mix([pairs[name].teacher for name in self.teachers], weights)
        return replace(first, teacher=mixed, teacher_target=target)

    def pairs(self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> dict[str, PairedLogProbs]:
        """The student beside each teacher. Where the events are the same they have one student in common."""
        pairs: dict[str, PairedLogProbs] = {}
        for name in self.teachers:
            first = next(iter(pairs.values()), None)
            same = self.how != "per_teacher" or (not self.aligned and first is not None and first.exhaustive)
            shared = first if same else None
            with torch.set_grad_enabled(torch.is_grad_enabled() and shared is None):
                pair = self.encoding_of(name).align(logits, columns_of(labels, name), self.heads.get(name))
            if shared is not None:
                pair = replace(shared, teacher=pair.teacher, teacher_target=pair.teacher_target)
            pairs[name] = pair
        return pairs


def columns_of(labels: Mapping[str, torch.Tensor], teacher: str) -> dict[str, torch.Tensor]:
    """Those of one teacher out of merged labels, by the names that its encoding has for them."""
    start = f"{teacher}/"
    return {name.removeprefix(start): column for name, column in labels.items() if name.startswith(start)}


def _named(teacher: str, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{teacher}/{name}": column for name, column in columns.items()}


def pairs_of(
    encoding: Encoding | Together, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], teacher_head: Head | None
) -> dict[str, PairedLogProbs]:
    """By the teacher whose terms are computed from it; under an empty name what all terms have in common."""
    if isinstance(encoding, Together) and encoding.how == "per_teacher":
        return encoding.pairs(logits, labels)
    return {"": encoding.align(logits, labels, teacher_head)}


def told_target(labels: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """[N]: the log-probability of each target id, where a column of the labels holds it."""
    return next((labels[name][:, 0] for name in (TARGET, LOGPROB) if name in labels), None)


def target_logprobs(
    encoding: Encoding,
    labels: Mapping[str, torch.Tensor],
    target_ids: torch.Tensor,
    head: Head | None,
    *,
    vocabulary_size: int,
    chunk_rows: int,
) -> torch.Tensor:
    """float64 [N]: one teacher's log-probability of each target id, at the labels' temperature. Read from the column
    that holds it where there is one; else the encoding `gives` target events."""
    told = told_target(labels)
    if told is not None:
        return told.double()
    found = torch.empty(len(target_ids), dtype=torch.float64, device=target_ids.device)
    with torch.no_grad():
        for start in range(0, len(target_ids), chunk_rows):
            rows = slice(start, start + chunk_rows)
            columns = {name: column[rows] for name, column in labels.items()}
            nobody = torch.zeros(len(target_ids[rows]), vocabulary_size, device=target_ids.device)
            pair = encoding.align(nobody, encoding.prepare(columns, head), head)
            event = TargetEvent.of(pair, nobody, target_ids[rows], temperature=encoding.temperature)
            found[rows] = event.teacher.double()
    return found

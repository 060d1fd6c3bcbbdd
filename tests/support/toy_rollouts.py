"""All texts of at most three tokens over four: what a term on sampled text is on average, by enumeration.

A text ends with token 3 or at its third token. A model is a table of logits, a row for each beginning that a text may
have, so that the average of an estimator is a sum over all texts, each with its probability, and what it should be a
sum over beginnings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from configs.labels import LABELS
from configs.losses import LOSSES, Term
from trainer.labels.encoding import load_encoding
from trainer.losses.objective import Objective
from trainer.losses.returns import token_rewards
from trainer.model.head import Head, HeadShape
from trainer.types import WRITTEN

V, LONGEST, END = 4, 3, 3
BEGINNINGS = [text for n in range(LONGEST) for text in itertools.product(range(END), repeat=n)]
TEXTS = [(*start, token) for start in BEGINNINGS for token in range(V) if token == END or len(start) == LONGEST - 1]
LABELS_OF: Mapping[str, Mapping[str, object]] = {
    "token": {},
    "topk": {"k": 2},
    "nucleus": {"p": 0.6, "k_max": 2},
    "given_ids": {"k": 1, "add_target": False},
    "hidden": {},
    "dense": {},
}
"""Parameters that leave a tail where there can be one."""


def table(seed: int, *, spread: float = 1.2) -> torch.Tensor:
    """float64 [beginnings, V] logits."""
    made = torch.randn(len(BEGINNINGS), V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made * spread


STUDENT, TEACHER, BEFORE = table(1), table(2), table(1) + 0.3 * table(3)
"""`BEFORE`: the student a few steps ago."""
ROWS = [(text[:i], text[i], number) for number, text in enumerate(TEXTS) for i in range(len(text))]
PLACES = torch.tensor([BEGINNINGS.index(start) for start, _, _ in ROWS])
TOKENS = torch.tensor([token for _, token, _ in ROWS])
OF_TEXT = torch.tensor([number for _, _, number in ROWS])


def logprobs(model: torch.Tensor) -> torch.Tensor:
    """[rows] of the tokens of all texts, one after another."""
    return model.log_softmax(-1)[PLACES, TOKENS]


def chances(model: torch.Tensor) -> torch.Tensor:
    """[texts], which sum to one."""
    return logprobs(model).new_zeros(len(TEXTS)).index_add(0, OF_TEXT, logprobs(model)).exp()


def visits(model: torch.Tensor) -> torch.Tensor:
    """[beginnings]: how likely a text begins like that."""
    found = torch.zeros(len(BEGINNINGS), dtype=torch.float64)
    for text, chance in zip(TEXTS, chances(model), strict=True):
        for i in range(len(text)):
            found[BEGINNINGS.index(text[:i])] += chance
    return found


def gradient(value: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor = STUDENT) -> torch.Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(value(leaf), leaf)[0]


@dataclass(frozen=True)
class Estimator:
    """A term with labels of all texts: their rows' losses, as a run computes them but for float64."""

    term: Term
    kind: str
    written: torch.Tensor  # the model that wrote the texts
    rewards: tuple[float | None, ...] = (None,) * len(TEXTS)
    labels: Mapping[str, object] = field(default_factory=dict)  # parameters that are others than LABELS_OF says

    @classmethod
    def of(cls, loss: str, kind: str, *, written: torch.Tensor = STUDENT, **parameters: object) -> Estimator:
        return cls(LOSSES.validate({"loss": loss, **parameters}), kind, written)

    def rows(
        self,
        student: torch.Tensor,
        logits: torch.Tensor | None = None,
        columns: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[rows], with gradient by `logits` [rows, V], which are the student's. `columns` of baselines; None: those
        without one."""
        encoding = load_encoding(LABELS.validate({"kind": self.kind, **LABELS_OF[self.kind], **self.labels}))
        objective = Objective.of((self.term,), encoding)
        head = Head(torch.eye(V), None, HeadShape(), V)
        teacher = TEACHER[PLACES].float()
        given = {}
        if encoding.takes_ids:
            ids = student.detach()[PLACES].topk(encoding.k).indices
            target = torch.where((ids == TOKENS[:, None]).any(1), -1, TOKENS)[:, None]
            given = {"given_ids": torch.cat([ids, target], 1) if encoding.add_target else ids}
        labels = encoding.encode(teacher, TOKENS, **given)
        columns = {WRITTEN: logprobs(self.written)} | (self.columns(objective) if columns is None else dict(columns))
        if objective.looks_ahead:
            columns |= objective.futures(logprobs(student.detach()), logprobs(TEACHER), OF_TEXT)
        found, _ = objective.rows(
            student[PLACES] if logits is None else logits, labels, TOKENS, encoding, head, columns=columns
        )
        return found

    def columns(self, objective: Objective) -> dict[str, torch.Tensor]:
        """As `trainer/model/rollout_columns.py` makes them where there is no baseline."""
        made: dict[str, torch.Tensor] = {}
        for returns in objective.returns:
            rewards = token_rewards(self.rewards, None, OF_TEXT)
            made |= returns.columns([None] * len(TEXTS), {}, rewards, OF_TEXT)
        return made

    def of_texts(
        self, student: torch.Tensor = STUDENT, columns: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[texts, beginnings, V]: the gradient that each text alone gives."""
        leaf = student[PLACES].requires_grad_()
        (of_rows,) = torch.autograd.grad(self.rows(student, leaf, columns).sum(), leaf)
        made = torch.zeros(len(TEXTS), *student.shape, dtype=torch.float64)
        return made.index_put((OF_TEXT, PLACES), of_rows, accumulate=True)

    def mean(self, student: torch.Tensor = STUDENT) -> torch.Tensor:
        """[beginnings, V]: the gradient on average over what is written."""
        return torch.einsum("t,tbv->bv", chances(self.written), self.of_texts(student))

    def variance(self) -> float:
        """Of the gradient, summed over its numbers."""
        found = self.of_texts()
        away = (found - self.mean()).square().sum((1, 2))
        return float((chances(self.written) * away).sum())

    def value(self, student: torch.Tensor = STUDENT) -> float:
        """On average, summed over the rows of a text."""
        return float((chances(self.written)[OF_TEXT] * self.rows(student)).sum())


def token_reverse_kl(student: torch.Tensor, *, written: torch.Tensor) -> torch.Tensor:
    """sum over beginnings of their chance under `written` times KL(student, teacher) there."""
    q = student.softmax(-1)
    return (visits(written) * (q * (student.log_softmax(-1) - TEACHER.log_softmax(-1))).sum(-1)).sum()


def text_reverse_kl(student: torch.Tensor) -> torch.Tensor:
    """KL between whole texts, with all that it depends on the student."""
    q = chances(student)
    return (q * (q.log() - chances(TEACHER).log())).sum()


def discounted_gradient(discount: float) -> torch.Tensor:
    """- sum over beginnings s and tokens v of chance(s) dq(v | s) Q(s, v), Q by dynamic programming: what (s, v) earns
    and, discounted, what follows it."""
    q, earned = STUDENT.softmax(-1), TEACHER.log_softmax(-1) - STUDENT.log_softmax(-1)
    worth = torch.zeros(len(BEGINNINGS), V, dtype=torch.float64)
    for place in reversed(range(len(BEGINNINGS))):
        for token in range(V):
            after = (*BEGINNINGS[place], token)
            later = BEGINNINGS.index(after) if after in BEGINNINGS else None
            worth[place, token] = earned[place, token]
            if later is not None:
                worth[place, token] += discount * (q[later] * worth[later]).sum()
    return gradient(lambda z: -(visits(STUDENT)[:, None] * z.softmax(-1) * worth).sum())

"""How far terms on sampled tokens are from reverse KL over the whole vocabulary, on real models and text.

    draws of the student at each row  ->  labels, value and gradient of each draw  ->  mean and spread over draws

Tokens stand for themselves here: each draw is one at the place of a row, by the student that is judged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cells import encode
from benchmarks.exactness_rows import Gradient, Rows, Totals
from configs.labels import Labels
from configs.losses import K2, LOSSES, MiniLlm, Term
from trainer.labels.encoding import load_encoding
from trainer.losses.kl import reverse_kl
from trainer.losses.objective import Objective
from trainer.losses.returns import WRITTEN
from trainer.types import PairedLogProbs

DRAWS = 64


def sampled_terms() -> list[Term]:
    """Each term on sampled tokens, with its defaults."""
    return [LOSSES.validate(LOSSES.kind_of(one)) for one in LOSSES.built_in if "rollouts" in one.needs]


def measured(rows: Rows, labels: Labels, terms: list[Term]) -> dict[str, dict[str, float]]:
    """By loss: value, its relative bias, that of the gradient, and the spread of one draw of it."""
    encoding = load_encoding(labels)
    same = [term.loss for term in terms if isinstance(term, MiniLlm)]
    terms = [term for term in terms if not isinstance(term, MiniLlm)]
    totals = {term.loss: Totals() for term in terms}
    for number, block in enumerate(rows.blocks()):
        teacher = rows.head.logits(block.hidden)
        source = block.hidden if encoding.needs == "hidden" else teacher
        drawn: dict[str, list[Gradient]] = {term.loss: [] for term in terms}
        for target_ids in _draws(block.student, seed=number):
            made = encode(encoding, source, block.student, target_ids)
            written = block.student.log_softmax(1).gather(1, target_ids[:, None])[:, 0]
            for term in terms:
                logits = block.student.detach().requires_grad_()
                values, _ = Objective.of((term,), encoding).rows(
                    logits, made, target_ids, encoding, block.head, columns={WRITTEN: written}
                )
                (gradient,) = torch.autograd.grad(values.sum(), logits)
                drawn[term.loss].append((float(values.detach().double().sum()), gradient))
        for term in terms:
            totals[term.loss].add(_exact(term, teacher.double(), block.student.double()), drawn[term.loss])
    found = {loss: total.numbers() for loss, total in totals.items()}
    # after a token that stands for itself nothing follows: what minillm weighs by that is all that it has of its own
    return found | {loss: found["policy_gradient"] for loss in same if "policy_gradient" in found}


def _draws(student: torch.Tensor, *, seed: int) -> Iterator[torch.Tensor]:
    """int64 [n] each: a token of the student at every row."""
    generator = torch.Generator().manual_seed(seed)
    yield from torch.multinomial(student.softmax(1), DRAWS, replacement=True, generator=generator).T


def _exact(term: Term, teacher: torch.Tensor, student: torch.Tensor) -> Gradient:
    """Of reverse KL; k2 has its gradient, and a value of its own."""
    logits = student.detach().requires_grad_()
    log_q, log_p = logits.log_softmax(1), teacher.log_softmax(1)
    values = reverse_kl(PairedLogProbs(log_q, log_p, exhaustive=True))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    if isinstance(term, K2):
        values = (log_q.exp() * (log_q - log_p).square()).sum(1) / 2
    return float(values.detach().sum()), gradient

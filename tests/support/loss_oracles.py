"""Distillation losses by brute force in float64, from the definitions: what the fast code is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from configs.losses import LOSSES, Term
from trainer.labels.encoding import Encoding
from trainer.losses.fused import LossPart
from trainer.losses.objective import Objective
from trainer.model.head import Head


def term(loss: str, weight: float = 1.0, beta: float | None = None, **parameters: float) -> Term:
    """A term of an objective, as a config gives it."""
    return LOSSES.validate({"loss": loss, "weight": weight} | ({} if beta is None else {"beta": beta}) | parameters)


def one_part(
    labels: Mapping[str, torch.Tensor],
    encoding: Encoding,
    objective: Objective,
    *,
    num_rows: int,
    scale: float,
    teacher_head: Head | None = None,
) -> list[LossPart]:
    """The parts of a call of `head_loss` whose rows are all of one task."""
    return [LossPart(slice(0, num_rows), labels, encoding, objective, scale, teacher_head)]


def forward_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, q).sum(-1)


def reverse_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return forward_kl(q, p)


def jsd(p: torch.Tensor, q: torch.Tensor, beta: float, normalised: bool = False) -> torch.Tensor:
    m = beta * p + (1 - beta) * q
    value = beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)
    return value / (beta * (1 - beta)) if normalised else value


def skew_forward_kl(p: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    return forward_kl(p, alpha * p + (1 - alpha) * q)


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    function.__name__: function for function in (forward_kl, reverse_kl, jsd, skew_forward_kl)
}


def probabilities(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    e = ((logits.double() - logits.double().amax(-1, keepdim=True)) / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def lump(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of the events {each id of the row's `ids`, everything else}; no tail where ids are all of them."""
    kept = p.gather(-1, ids)
    if ids.shape[-1] == p.shape[-1]:
        return kept
    others = torch.ones_like(p).scatter(-1, ids, 0.0)
    return torch.cat([kept, (p * others).sum(-1, keepdim=True)], -1)


def objective(
    terms: tuple[Term, ...],
    student: torch.Tensor,
    teacher: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    k: int | None = None,
) -> torch.Tensor:
    """[N] float64 from student and teacher logits [N, V]; `k` keeps the teacher's k best ids and one tail."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    if k is not None:
        ids = teacher.double().argsort(-1, descending=True)[:, :k]
        p, q = lump(p, ids), lump(q, ids)
    total = torch.zeros(len(student), dtype=torch.float64)
    for term in terms:
        if term.loss == "cross_entropy":
            total = total - term.weight * probabilities(student).gather(-1, target_ids[:, None])[:, 0].log()
        else:
            extra = term.parameters()
            total = total + term.weight * temperature**2 * DIVERGENCES[term.loss](p, q, **extra)
    return total


def padding_nats(logits: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """-log of the mass that a softmax over all columns keeps inside the vocabulary, [N] float64."""
    return -probabilities(logits)[:, :vocabulary_size].sum(-1).log()


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Of the summed rows of `function`, in the dtype of `at`."""
    leaf = at.detach().clone().requires_grad_(True)
    (result,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return result


def realistic_logits(n: int, v: int, *, seed: int, spread: float = 3.0) -> torch.Tensor:
    """float32 [n, v] with a heavy head and a long tail, as language models have: entropies of 0.5 to 4 nats."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * spread
    logits.add_(torch.randn(v, generator=generator) * 2)
    return logits - math.log(v)

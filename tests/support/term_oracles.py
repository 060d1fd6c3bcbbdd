"""The terms of the registry by their definitions in float64, and what the encodings of the registry keep of a row: what
the matrix in tests/kit holds every cell against. A term or an encoding without an entry here fails it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import loss_oracles as oracle
import torch

from configs.labels import LABELS
from configs.losses import LOSSES, Term


@dataclass(frozen=True)
class TermOracle:
    """`value` [N] of probabilities of teacher and student [N, E] and, where it sees one, the target's event int64 [N].
    Its gradient by autograd is the expected one: what carries none is detached here."""

    value: Callable[..., torch.Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the term, as a config gives them
    arguments: Mapping[str, Any] | None = None  # of `value`, where a schedule gives the term others than its parameters
    sees_target: bool = False
    single_ids_only: bool = False  # whether a lumped tail does not count
    tells_tail: bool = False  # whether `value` takes `tail`: that the last event is a lumped one

    def term(self, loss: str) -> Term:
        return LOSSES.validate({"loss": loss, **self.parameters})

    def rows(self, p: torch.Tensor, q: torch.Tensor, target: torch.Tensor, *, tail: bool = False) -> torch.Tensor:
        given = (p, q, target) if self.sees_target else (p, q)
        own = {"tail": tail} if self.tells_tail else {}
        return self.value(*given, **(self.parameters if self.arguments is None else self.arguments), **own)


def skew_reverse_kl(p: torch.Tensor, q: torch.Tensor, alpha: float) -> torch.Tensor:
    return oracle.forward_kl(q, alpha * q + (1 - alpha) * p)


def tvd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p - q).abs().sum(-1) / 2


def adaptive_kl(p: torch.Tensor, q: torch.Tensor, head_mass: float, tail: bool) -> torch.Tensor:
    """With a full sort, row by row."""
    rows = []
    for one, other in zip(p, q, strict=True):
        order = one[: len(one) - tail].argsort(descending=True)
        head = order[one[order].cumsum(0) <= head_mass]
        head = head if len(head) else order[:1]
        gap = (one - other).abs().detach()
        weight = gap[head].sum() / gap.sum() if gap.sum() else gap.sum()
        rows.append(weight * oracle.forward_kl(one, other) + (1 - weight) * oracle.reverse_kl(one, other))
    return torch.stack(rows)


def alpha_beta(p: torch.Tensor, q: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    a, b, total = alpha, beta, alpha + beta
    parts = p**a * q**b - a / total * p**total - b / total * q**total
    return -parts.sum(-1) / (a * b)


def taid(p: torch.Tensor, q: torch.Tensor, t: float) -> torch.Tensor:
    middle = ((1 - t) * q.log() + t * p.log()).softmax(-1).detach()
    return oracle.forward_kl(middle, q)


def lsm(p: torch.Tensor, q: torch.Tensor, k: int) -> torch.Tensor:
    ids = p.argsort(-1, descending=True)[:, :k]
    s, r = p.gather(1, ids), q.gather(1, ids)
    return oracle.reverse_kl(s / s.sum(-1, keepdim=True), r / r.sum(-1, keepdim=True))


def _target_parts(p: torch.Tensor, q: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(TCKD, NCKD, p(target))."""
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    p_y, q_y = p.gather(1, y[:, None]), q.gather(1, y[:, None])
    p_o, q_o = p[others].view(len(p), -1), q[others].view(len(q), -1)
    rest_p, rest_q = p_o.sum(-1, keepdim=True), q_o.sum(-1, keepdim=True)
    binary = oracle.forward_kl(torch.cat([p_y, rest_p], 1), torch.cat([q_y, rest_q], 1))
    return binary, oracle.forward_kl(p_o / rest_p, q_o / rest_q), p_y[:, 0]


def dkd(p: torch.Tensor, q: torch.Tensor, y: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    binary, among_others, _ = _target_parts(p, q, y)
    return alpha * binary + beta * among_others


def atkd(
    p: torch.Tensor, q: torch.Tensor, y: torch.Tensor, easy_weight: float, hard_share: float, threshold: float
) -> torch.Tensor:
    binary, among_others, p_y = _target_parts(p, q, y)
    easy = easy_weight / (1 - hard_share) * among_others
    hard = (1 - easy_weight) / hard_share * (binary + among_others)
    return torch.where(1 - p_y > threshold, hard, easy)


def uld(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """By a loop over the places."""
    first, second = (rows.sort(-1, descending=True).values.unbind(-1) for rows in (p, q))
    return sum((one - other).abs() for one, other in zip(first, second, strict=True))


TERMS: dict[str, TermOracle] = {
    "forward_kl": TermOracle(oracle.forward_kl),
    "reverse_kl": TermOracle(oracle.reverse_kl),
    "jsd": TermOracle(oracle.jsd, {"beta": 0.3, "normalised": True}),
    "skew_forward_kl": TermOracle(oracle.skew_forward_kl, {"alpha": 0.2}),
    "skew_reverse_kl": TermOracle(skew_reverse_kl, {"alpha": 0.2}),
    "tvd": TermOracle(tvd),
    "adaptive_kl": TermOracle(adaptive_kl, {"head_mass": 0.6}, tells_tail=True),
    "alpha_beta": TermOracle(alpha_beta, {"alpha": 0.3, "beta": 0.5}),
    "taid": TermOracle(taid, {"start": 0.6}, {"t": 0.6}),
    "lsm": TermOracle(lsm, {"k": 7}, single_ids_only=True),
    "dkd": TermOracle(dkd, {"alpha": 0.7, "beta": 2.0}, sees_target=True),
    "atkd": TermOracle(
        atkd,
        {"easy_weight": 0.3, "hard_share": 0.4},
        {"easy_weight": 0.3, "hard_share": 0.4, "threshold": 0.5},
        sees_target=True,
    ),
    "uld": TermOracle(uld),
}


Kept = Callable[[Mapping[str, Any], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class EncodingOracle:
    """`kept` gives the ids [N, K] that are events of their own, -1 for none, all others being one tail; None: all are.
    From the parameters, the teacher's logits, those of the student that labels were made for, and the target ids."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    kept: Kept | None = None
    rounds_to: float = 1e-5  # how far values may be from float64: what the wire rounds
    drawn: bool = False  # labels that are right on average alone: their own tests hold the average to its definition

    def ids(self, teacher: torch.Tensor, student: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor | None:
        return None if self.kept is None else self.kept(self.parameters, teacher, student, target_ids)


def events(
    term: TermOracle, p: torch.Tensor, q: torch.Tensor, target_ids: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    """`term` [N] float64 over these ids and a tail, from probabilities [N, V] of both models; None: over all ids."""
    if ids is None:
        return term.rows(p, q, target_ids)
    rows = []
    for row, target in enumerate(target_ids):
        own = ids[row][ids[row] >= 0]
        if term.sees_target and target not in own:  # a target in the tail is an event of its own
            own = torch.cat([own, target[None]])
        one, other = (oracle.lump(x[row : row + 1], own[None]) for x in (p, q))
        keep = len(own) if term.single_ids_only else one.shape[1]
        event = (own == target).nonzero()[0] if term.sees_target else target[None]
        rows.append(term.rows(one[:, :keep], other[:, :keep], event, tail=keep > len(own)))
    return torch.cat(rows)


def _likeliest(
    parameters: Mapping[str, Any], teacher: torch.Tensor, student: torch.Tensor, target_ids: torch.Tensor
) -> torch.Tensor:
    return teacher.argsort(-1, descending=True)[:, : parameters["k"]]


def _given(
    parameters: Mapping[str, Any], teacher: torch.Tensor, student: torch.Tensor, target_ids: torch.Tensor
) -> torch.Tensor:
    """The student's likeliest and the target."""
    ids = student.argsort(-1, descending=True)[:, : parameters["k"]]
    target = target_ids[:, None]
    return torch.cat([ids, torch.where((ids == target).any(1, keepdim=True), -1, target)], dim=1)


def _nucleus(
    parameters: Mapping[str, Any], teacher: torch.Tensor, student: torch.Tensor, target_ids: torch.Tensor
) -> torch.Tensor:
    """The likeliest until they hold the mass p."""
    ids = teacher.argsort(-1, descending=True)[:, : parameters["k_max"]]
    p = teacher.double().softmax(-1).gather(1, ids)
    return torch.where(p.cumsum(1) - p < parameters["p"], ids, -1)


ENCODINGS: dict[str, EncodingOracle] = {
    "topk": EncodingOracle({"k": 12}, _likeliest, rounds_to=6e-3),
    "nucleus": EncodingOracle({"p": 0.8, "k_max": 12}, _nucleus, rounds_to=6e-3),
    "sampled": EncodingOracle({"draws": 30}, drawn=True),
    "given_ids": EncodingOracle({"k": 12}, _given, rounds_to=1.2e-2),
    "hidden": EncodingOracle(),
    "dense": EncodingOracle(),
}
_MEASURE = "then measure it: python -m benchmarks exactness"
NO_DISTRIBUTION = ("token", "none")
"""Kinds from which no divergence can be computed: the registry refuses them all."""


def term_oracle(loss: str) -> TermOracle:
    what = "add its definition in float64 to TERMS"
    assert loss in TERMS, f"no oracle for loss: {loss}: {what} of tests/support/term_oracles.py; {_MEASURE}"
    return TERMS[loss]


def encoding_oracle(kind: str) -> EncodingOracle:
    what = "add what it keeps of a row to ENCODINGS"
    assert kind in ENCODINGS, f"no oracle for labels: {kind}: {what} of tests/support/term_oracles.py; {_MEASURE}"
    return ENCODINGS[kind]


def divergences() -> list[str]:
    """Row terms of the registry that look at labels, whatever the text."""
    rows = [one for one in LOSSES.built_in if "labels" in one.needs and one.form == "row"]
    return [LOSSES.kind_of(one) for one in rows if "rollouts" not in one.needs]


def kinds() -> list[str]:
    """Encodings of the registry from which a divergence can be computed."""
    return [kind for kind in LABELS.kinds() if kind not in NO_DISTRIBUTION]


def sampled_cells() -> list[tuple[str, str]]:
    """(kind of labels, loss) of terms on sampled tokens; tests/trainer/losses/test_policy.py has their definitions."""
    terms = [LOSSES.kind_of(one) for one in LOSSES.built_in if "rollouts" in one.needs]
    return [
        (kind, loss)
        for kind in LABELS.kinds()
        for loss in terms
        if LOSSES.parameters_of(loss).exactness_with(LABELS.parameters_of(kind)) != "refused"
    ]


def cells() -> list[tuple[str, str]]:
    """(kind of labels, loss) of all that the registry allows."""
    return [
        (kind, loss)
        for kind in kinds()
        for loss in divergences()
        if LOSSES.parameters_of(loss).exactness_with(LABELS.parameters_of(kind)) != "refused"
    ]

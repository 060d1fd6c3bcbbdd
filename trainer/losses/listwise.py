"""Terms that compare all candidate answers to a prompt at once."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from configs.losses import ListwiseKl, ScoredListwiseKl
from trainer.losses.terms import SequenceScores, computes

_NO_CANDIDATE = -1e30
"""A logit of probability zero: finite, so that zero times a difference of two is zero."""


@computes(ListwiseKl)
def listwise_kl(scores: SequenceScores, *, per_token: bool, temperature: float) -> torch.Tensor:
    """sum over the candidates i of a prompt of p_i log p_i / q_i, [G] nats: p = softmax(t / T) of the teacher's
    log-probabilities t of whole candidates, q = softmax(s / T) of the student's, both by token where `per_token`.

    Ren et al., arXiv 2110.07367, equation 4, with log-probabilities of generative models in the place of relevance.
    The gradient by s_i is (q_i - p_i) / T; none flows where both rank alike, however likely the candidates are.
    """
    assert scores.reference is not None, "listwise_kl needs the teacher's log-probabilities"
    lengths = scores.num_rows.clamp(min=1) if per_token else 1
    return _kl(scores.groups, scores.reference / lengths / temperature, scores.student / lengths / temperature)


@computes(ScoredListwiseKl)
def scored_listwise_kl(
    scores: SequenceScores, *, per_token: bool, temperature: float, score_temperature: float
) -> torch.Tensor:
    """`listwise_kl` with p = softmax(r / score_temperature) of the candidates' scores r, [G] nats.

    That softmax is ListNet's top-one probability (Cao et al., ICML 2007, definition 4).
    """
    given = torch.tensor(scores.rewards, dtype=torch.float64, device=scores.student.device)
    lengths = scores.num_rows.clamp(min=1) if per_token else 1
    return _kl(scores.groups, given / score_temperature, scores.student / lengths / temperature)


def _kl(groups: tuple[tuple[int, ...], ...], teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher), softmax(student)) of each group, [G], from logits [S]."""
    members = [torch.tensor(group) for group in groups]
    index = pad_sequence(members, batch_first=True, padding_value=-1).to(student.device)
    log_p, log_q = (
        logits[index.clamp(min=0)].masked_fill(index < 0, _NO_CANDIDATE).log_softmax(-1)
        for logits in (teacher, student)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)

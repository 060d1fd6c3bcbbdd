"""Terms on text that the student wrote: reverse KL by its sampled tokens.

Symbols, of one token y with the text before it: q the student of now, m the distribution that the engine drew y from
(`rollout_logprobs`), p the teacher; r = log p(y) - log q(y), the reward; w = min(q(y) / m(y), max_ratio), truncated
importance sampling; sg[.] carries no gradient. A term is summed over rows and divided by the loss tokens of the step,
as every row term is. The text before y is taken as it is: no ratio makes up for it.

    value of a row      an unbiased estimate of KL(q, p) at its place, less the verifier's reward of the token
    gradient of a row   - sg[w A] d log q(y), on average that of what is minimised; A: the advantage

Estimators (docs of `k1`, `k2`, `k3`): Schulman, joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch

from configs.losses import K2, MiniLlm, PolicyGradient
from trainer.losses.kl import reverse_kl
from trainer.losses.returns import within
from trainer.losses.terms import RolloutRows, computes

_MOST_NATS = 60.0
"""Of a log-ratio before exp, which float32 holds then."""

Told = dict[str, torch.Tensor]


@computes(PolicyGradient)
def policy_gradient(
    rows: RolloutRows, *, max_ratio: float, clip: float | None, closed_form: bool, fixed_negative: float | None
) -> tuple[torch.Tensor, Told]:
    """([N], what it tells); gradient - sg[w (scale (r + future) + given)] d log q(y), with

        future = sum over later tokens t' of discount^(t' - t) r_t'
        given  = reward_weight (the verifier's rewards from y on) - baseline

    and with `closed_form`, where labels hold a distribution, d KL(q, p) over its events in the place of r d log q(y),
    whose average over y it is, while y is left with what its event hides of it: r less the log-ratio of the event,
    which is 0 unless y lies in a lumped tail. So the average is that over the whole vocabulary, whatever is lumped.

    At discount 0 the gradient of the mean over tokens of KL(q, p) on the student's text (Thinking Machines' on-policy
    distillation; GKD, arXiv 2306.13649, without its gradient through sampling), at 1 that of KL(q, p) between whole
    answers (MiniLLM, arXiv 2306.08543, equation 2), where the text is of the student of now.
    """
    student = rows.student.detach()
    ratio = (student - rows.written).clamp(max=_MOST_NATS).exp()
    weight = ratio.clamp(max=max_ratio)
    own = rows.teacher - student
    exact = None
    if closed_form and rows.pair is not None:
        exact, own = reverse_kl(rows.pair), own - _of_events(rows)
    own = within(own, clip)
    advantage = (own + rows.future) * rows.scale + rows.given
    if fixed_negative is not None:
        advantage = advantage.masked_fill(advantage < 0, -fixed_negative)
    value = -weight * own - rows.reward
    learnt = -(weight * advantage) * rows.student
    if exact is not None:
        value, learnt = value + exact.detach(), learnt + exact
    return value + (learnt - learnt.detach()), _told(ratio, max_ratio)


@computes(MiniLlm)
def minillm(rows: RolloutRows, *, max_ratio: float, clip: float | None) -> tuple[torch.Tensor, Told]:
    """([N], what it tells); gradient d KL(q, p) - sg[w (mean over later tokens of r - baseline)] d log q(y).

    MiniLLM, arXiv 2306.08543, equations 3 to 7: the single-step part in closed form (where labels hold a distribution,
    see `policy_gradient`), the long part with the length-normalised return. As its authors' code the single-step part
    has no ratio; the mean is over as many tokens as there are, of which the paper's has one less. Text is drawn and
    learnt once, so that there is nothing for PPO's clipping to do.
    """
    return policy_gradient(rows, max_ratio=max_ratio, clip=clip, closed_form=True, fixed_negative=None)


@computes(K2)
def k2(rows: RolloutRows, *, max_ratio: float, clip: float | None) -> tuple[torch.Tensor, Told]:
    """([N], what it tells): w r^2 / 2; gradient - sg[w r] d log q(y), which is that of `policy_gradient` at discount 0
    without closed form, and so on average that of KL(q, p). With `clip` as Huber's loss: linear beyond it."""
    student = rows.student.detach()
    ratio = (student - rows.written).clamp(max=_MOST_NATS).exp()
    weight, reward = ratio.clamp(max=max_ratio), rows.teacher - student
    near = within(reward, clip)
    learnt = -(weight * near) * rows.student
    return weight * near * (reward - near / 2) + (learnt - learnt.detach()), _told(ratio, max_ratio)


def _of_events(rows: RolloutRows) -> torch.Tensor:
    """[N]: log p - log q of the event that each token is or lies in."""
    assert rows.pair is not None
    assert rows.event is not None
    event = rows.event[:, None]
    return (rows.pair.teacher.gather(1, event) - rows.pair.student.detach().gather(1, event))[:, 0]


def _told(ratio: torch.Tensor, max_ratio: float) -> Told:
    """The importance ratio before it is truncated, and whether it was."""
    return {"ratio": ratio, "truncated": (ratio > max_ratio).to(ratio.dtype)}

"""Parameters of the terms that learn from text which the student wrote (`configs/losses.py` has the terms).

A file below that one, and without terms itself, so that the chain of imports stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Section

if TYPE_CHECKING:
    from configs.labels import Labels

_Nats = Annotated[float, Field(gt=0, le=1e4)]

REFUSED: Mapping[str, str] = {
    "k1": "k1, the log-ratio of student and teacher at the sampled token, has a gradient of zero on average over the "
    "student's own text, so that nothing is learnt: write policy_gradient, for which it is the reward, or k2",
    "k3": "k3 as a loss does not learn reverse KL: on the student's own text its gradient is on average that of "
    "forward KL. Write k2 or policy_gradient for reverse KL, or forward_kl",
}
"""Estimators of reverse KL that are no losses (docs/objectives.md), and what to write instead."""


class Sampled(Section):
    """Of every term on sampled tokens."""

    max_ratio: Annotated[float, Field(ge=1, le=1e4)] = Field(
        2.0,
        description="Truncated importance sampling: a token counts with its probability under the student of now over "
        "that with which the engine drew it, and with no more than this.",
    )
    clip: _Nats | None = Field(
        None,
        description="Log-ratios of teacher and student at sampled tokens lie within this many nats of 0, which bounds "
        "the noise of a rare token and makes the estimate biased; None: they are as they are.",
    )

    @property
    def is_biased(self) -> bool:
        """Whether a parameter makes it so, whatever the labels."""
        return self.clip is not None

    @property
    def has_closed_form(self) -> bool:
        """Whether it takes an average over the labels' events."""
        return False

    def problem_with_samples(self, labels: Labels) -> str | None:
        """Why the average over sampled tokens would be of something else."""
        if labels.temperature != 1.0:
            at = f"labels: {labels.kind} are at {labels.temperature:g}"
            return f"judges sampled tokens at temperature 1, and {at}: remove temperature there"
        if self.has_closed_form and labels.target_moves_events:
            own = "closed_form: false here" if "closed_form" in type(self).model_fields else "labels: topk"
            return (
                f"averages over the events of labels: {labels.kind}, to which the sampled token adds one of its own: "
                f"write add_target: false there (the token's log-probability is in the labels all the same), or {own}"
            )
        return None


class Returned(Sampled):
    """Of terms that weigh a token by what follows it too."""

    baseline: Literal["none", "group", "batch"] = Field(
        "none",
        description="What is subtracted from the return of every token: its mean over the other answers to the same "
        "prompt, or over the other answers of the step (RLOO, arXiv 2402.14740). It changes no average, and less noise "
        "is left.",
    )


class PolicyParameters(Returned):
    """Of `policy_gradient`."""

    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Of the rewards after a token: 0, each token answers for itself, the token-level reverse KL; 1, it "
        "answers for all that follow, the reverse KL of whole answers.",
    )
    closed_form: bool = Field(
        True,
        description="What a token earns for itself is taken over the student's whole distribution, where labels hold "
        "one (not token), and the sampled token corrects what lumped events hide: less noise, the same on average.",
    )
    reward_weight: Annotated[float, Field(ge=0, le=1e4)] = Field(
        0.0, description="Of the reward that a verifier gave to the answer or its tokens, beside reverse KL."
    )
    whiten: Literal["none", "reward", "all"] = Field(
        "none",
        description="reward: the verifier's rewards are divided by their standard deviation over what the baseline is "
        "taken of (GRPO, arXiv 2402.03300); all: returns of reverse KL by theirs, too.",
    )
    fixed_negative: _Nats | None = Field(
        None,
        description="Every negative advantage is replaced by minus this: a control that tells whether its size, which "
        "the teacher gives, matters (arXiv 2608.31046).",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> PolicyParameters:
        if self.whiten != "none" and self.baseline == "none":
            raise ValueError("whiten divides by the spread over what baseline names: write baseline: group or batch")
        if self.whiten == "reward" and not self.reward_weight:
            raise ValueError("whiten: reward divides rewards, and reward_weight is 0: write a reward_weight")
        whole = "whiten: all" if self.whiten == "all" else "fixed_negative" if self.fixed_negative else None
        if whole and self.closed_form:
            raise ValueError(
                f"{whole} changes advantages of sampled tokens, and closed_form takes a part of them out: write "
                "closed_form: false"
            )
        if self.baseline != "none" and not self.sampled_returns:
            raise ValueError(
                "nothing sampled is left that a baseline could be subtracted from: remove baseline, or write a "
                "discount, a reward_weight, or closed_form: false"
            )
        return self

    @property
    def has_closed_form(self) -> bool:
        return self.closed_form

    @property
    def sampled_returns(self) -> bool:
        """Whether more is sampled than the closed form leaves."""
        return self.discount > 0 or self.reward_weight > 0 or not self.closed_form

    @property
    def is_biased(self) -> bool:
        return super().is_biased or self.whiten != "none" or self.fixed_negative is not None

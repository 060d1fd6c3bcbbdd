"""Rewards: what a function says of a whole answer. One class of parameters per kind."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from configs.section import Seconds
from configs.stations import Choice, Station


class Reward(Choice):
    """Base of all kinds, those of a user's included: `reward: package.module` names a file with a class `Reward` of
    this base, whose method `score` gives a number for each answer (trainer/feedback/reward.py)."""

    timeout_s: Seconds = Field(300.0, description="Of one call, for all answers of a step.")


class Pattern(Reward):
    """1 for an answer in which a regular expression of Python is found, else 0: a format, such as a boxed answer."""

    kind: Literal["pattern"] = "pattern"
    pattern: str = Field(min_length=1, description="Searched in the text of the answer; `.` also matches line breaks.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression of Python: {error}") from None
        return pattern


REWARDS = Station(
    Reward,
    (Pattern,),
    package="trainer.feedback",
    class_name="Reward",
    members=("score",),
    contract="trainer/feedback/reward.py",
)
AnyReward = Annotated[Reward, REWARDS]

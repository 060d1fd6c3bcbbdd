"""Reward `pattern`: whether an answer has a form."""

from __future__ import annotations

import re
from collections.abc import Sequence as AbstractSequence

from configs.rewards import Pattern
from trainer.feedback.reward import Answer


class Reward(Pattern):
    """1 or 0."""

    def score(self, answers: AbstractSequence[Answer]) -> list[float]:
        found = re.compile(self.pattern, re.DOTALL)
        return [float(found.search(answer.text) is not None) for answer in answers]

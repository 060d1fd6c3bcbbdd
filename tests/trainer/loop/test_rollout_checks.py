"""What is said of text of the student that cannot be learnt as a sample of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trainer.errors import DataError
from trainer.loop.rollout_checks import check_rollouts
from trainer.types import Sequence

L = 7
MASK = np.array([False, False, True, True, True, True, False])
WRITTEN = np.full(L, -1.5, dtype=np.float32)
GOOD = Sequence(
    "2:14", np.arange(L, dtype=np.int32), MASK, "student", sample=3, reward=0.5, columns={"rollout_logprobs": WRITTEN}
)


def bad(values: np.ndarray, row: int, value: float) -> np.ndarray:
    made = values.copy()
    made[row] = value
    return made


def test_text_with_all_that_terms_need_passes_and_other_tasks_are_not_asked():
    check_rollouts([GOOD], {"main": True})
    check_rollouts(
        [replace(GOOD, reward=None, columns={"rollout_logprobs": WRITTEN, "rewards": WRITTEN})], {"main": True}
    )
    check_rollouts([replace(GOOD, reward=None)], {"main": False})
    check_rollouts([replace(GOOD, columns={"rollout_logprobs": bad(WRITTEN, 0, np.nan)})], {"main": True})
    check_rollouts([replace(GOOD, columns={}, task="corpus")], {"main": True})


@pytest.mark.parametrize(
    ("sequence", "text"),
    [
        (replace(GOOD, columns={}, author="dataset"), "written by dataset: it has no column rollout_logprobs"),
        (replace(GOOD, columns={"rollout_logprobs": WRITTEN[:5]}), "has 5 numbers, and it has 7 tokens"),
        (
            replace(GOOD, columns={"rollout_logprobs": bad(WRITTEN, 4, -np.inf)}),
            "rollout_logprobs is -inf in row 4, the prediction of token 5",
        ),
        (replace(GOOD, reward=float("nan")), "its reward is nan"),
        (replace(GOOD, reward=None), "nobody gave it a reward"),
        (
            replace(GOOD, columns={"rollout_logprobs": WRITTEN, "rewards": bad(WRITTEN, 3, np.nan)}),
            "rewards is nan in row 3",
        ),
        (
            replace(GOOD, columns={"rollout_logprobs": WRITTEN, "rewards": np.zeros(4)}),
            "rewards has 4 numbers, and it has 7 tokens",
        ),
    ],
)  # fmt: skip
def test_the_answer_and_the_row_are_named(sequence: Sequence, text: str):
    with pytest.raises(DataError, match="answer 3 to prompt 2:14") as raised:
        check_rollouts([GOOD, sequence], {"main": True})
    assert text in str(raised.value)

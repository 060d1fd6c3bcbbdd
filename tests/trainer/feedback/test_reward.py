"""Rewards of answers: what a function is asked, what becomes of its numbers, and what is said of wrong ones."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence as AbstractSequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompt_streams import open_stream, talk

from configs.prompts import Dataset
from configs.rewards import REWARDS
from configs.rewards import Reward as Parameters
from trainer.errors import DataError
from trainer.feedback.reward import Answer, Rewarded
from trainer.types import AnswerCounters, Collected, Prompt, Sequence

ROWS = [{"question": "2 + 2", "gold": "4"}, {"question": "3 + 3", "gold": "6"}]
TEXTS = {("0:0", 0): "four: 4", ("0:0", 1): "five", ("0:1", 0): "6"}


class Collector:
    """Answers of as many tokens as letters, to prompts of three tokens."""

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        made = []
        for (prompt_id, sample), text in TEXTS.items():
            ids = np.array([1, 2, 3, *map(ord, text)], dtype=np.int32)
            mask = np.zeros(len(ids), dtype=bool)
            mask[2:-1] = True
            made.append(Sequence(prompt_id, ids, mask, "student", sample=sample))
        return Collected(tuple(made) if prompts else ())

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        raise DataError("as the collector says")


class Gold(Parameters):
    """As a user's file has it."""

    kind: str = "house.gold"
    right: float = 1.0

    def score(self, answers: AbstractSequence[Answer]) -> list[float]:
        return [self.right * (answer.row["gold"] in answer.text) for answer in answers]


def collected(reward: Any) -> Collected:
    prompts = [
        Prompt(f"0:{row}", np.array([1, 2, 3], dtype=np.int32), None, origin=f"rows.jsonl:{row + 1}") for row in (0, 1)
    ]
    rewarded = Rewarded(
        Collector(), reward, row_of=lambda prompt: ROWS[int(prompt.id[-1])], decode=lambda ids: "".join(map(chr, ids))
    )
    return asyncio.run(rewarded.collect(prompts))


def test_a_function_sees_row_text_and_ids_of_every_answer_and_its_numbers_are_their_rewards():
    assert [one.reward for one in collected(Gold(right=2.0)).sequences] == [2.0, 0.0, 2.0]
    pattern = REWARDS.load(REWARDS.validate({"kind": "pattern", "pattern": r"^\d$"}))
    assert [one.reward for one in collected(pattern).sequences] == [0.0, 0.0, 1.0]
    seen: list[Answer] = []
    collected(_Function(lambda answers: seen.extend(answers) or [0.0] * 3))
    assert [(one.origin, one.sample, one.text) for one in seen[1:]] == [
        ("rows.jsonl:1", 1, "five"),
        ("rows.jsonl:2", 0, "6"),
    ]
    assert seen[2].token_ids.tolist() == [ord("6")]


class _Function(Parameters):
    kind: str = "house.mine"

    def __init__(self, function: Any, **more: Any) -> None:
        super().__init__(**more)
        object.__setattr__(self, "_function", function)

    def score(self, answers: AbstractSequence[Answer]) -> Any:
        return object.__getattribute__(self, "_function")(answers)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda _: [1.0, math.nan, 0.0], "rows.jsonl:1: reward: house.mine gave nan to answer 1, 'five'"),
        (lambda _: [1.0, 0.0, "good"], "rows.jsonl:2: reward: house.mine gave 'good' to answer 0"),
        (lambda _: [1.0, 0.0], "2 numbers for 3 answers (answer 0 to rows.jsonl:1 and 2 more): write one for each"),
        (lambda _: 1.0, "reward: house.mine gave float: write a list with a number for each answer"),
        (lambda _: 1 / 0, "house.mine failed on answer 0 to rows.jsonl:1 and 2 more: ZeroDivisionError"),
        (lambda _: exit(3), "house.mine failed on answer 0"),
    ],
)  # fmt: skip
def test_what_is_no_number_for_each_answer_is_one_error_with_the_row(function: Any, text: str):
    with pytest.raises(DataError) as raised:
        collected(_Function(function))
    assert text in str(raised.value)


def test_a_function_that_does_not_come_back_ends_in_its_time():
    started = time.monotonic()
    with pytest.raises(DataError, match=r"no answer within reward\.timeout_s: 0\.2"):
        collected(_Function(lambda _: time.sleep(60), timeout_s=0.2))
    assert time.monotonic() - started < 20


def test_answers_are_judged_by_the_collector_itself():
    with pytest.raises(DataError, match="as the collector says"):
        Rewarded(Collector(), Gold(), row_of=lambda _: {}, decode=lambda _: "").judge(AnswerCounters(), last=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_knows_the_row_of_each_of_its_prompts(tmp_path: Path, shuffle: bool):
    rows = [{**talk(number), "gold": number} for number in range(7)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    stream = open_stream(Dataset(path=str(file)), shuffle=shuffle)
    for prompt in stream.take(9):  # over the border of an epoch
        assert prompt.origin.endswith(f":{stream.row_of(prompt)['gold'] + 1}")

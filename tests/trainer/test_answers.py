"""Who writes the answers: the dataset, or the teacher where an answer is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from configs.answers import ANSWERS
from trainer.answers import dataset, teacher
from trainer.errors import DataError
from trainer.types import AnswerCounters, Prompt


@dataclass
class Echo:
    """Writers that answer with fixed ids and remember what they were asked."""

    answers: dict[str, list[int]]
    asked: list[str] = field(default_factory=list)

    async def write(self, prompts: AbstractSequence[Prompt]) -> list[np.ndarray]:
        self.asked += [prompt.id for prompt in prompts]
        return [np.array(self.answers[prompt.id], dtype=np.int32) for prompt in prompts]


def prompt(prompt_id: str, ids: list[int], mask: list[bool] | None = None) -> Prompt:
    loss_mask = None if mask is None else np.array(mask)
    return Prompt(prompt_id, np.array(ids, dtype=np.int32), loss_mask, origin=f"rows.jsonl:{prompt_id}")


ANSWERED = prompt("a", [1, 2, 3, 4], [False, True, True, False])


def test_answers_of_the_dataset_are_taken() -> None:
    strategy = dataset.AnswerSource()
    assert (strategy.needs_generator, strategy.needs_answer) == (False, True)
    bound = strategy.bind(None)
    (sequence,) = asyncio.run(bound.collect([ANSWERED])).sequences
    assert (sequence.id, sequence.author) == ("a", "dataset")
    assert sequence.token_ids is ANSWERED.token_ids
    assert sequence.spans() == ((1, 3),)
    with pytest.raises(DataError, match=r"rows.jsonl:b: has no answer.*teacher and teacher.generator: {}"):
        asyncio.run(bound.collect([prompt("b", [1])]))


def test_the_teacher_writes_what_is_missing_in_the_order_of_the_prompts() -> None:
    writers = Echo({"b": [7, 8, 9], "c": [6]})
    bound = teacher.AnswerSource().bind(writers)
    sequences = asyncio.run(bound.collect([prompt("b", [1, 2]), ANSWERED, prompt("c", [5])])).sequences
    assert writers.asked == ["b", "c"]
    assert [(s.id, s.author) for s in sequences] == [("b", "teacher"), ("a", "dataset"), ("c", "teacher")]
    assert sequences[0].token_ids.tolist() == [1, 2, 7, 8, 9]
    assert sequences[0].token_ids.dtype == np.int32


def test_the_weight_of_a_row_is_that_of_its_answer_whoever_writes_it() -> None:
    bound = teacher.AnswerSource().bind(Echo({"b": [7]}))
    prompts = [
        replace(ANSWERED, weight=0.25),
        replace(prompt("b", [1]), weight=3.0),
        prompt("a", [1, 2], [True, False]),
    ]
    sequences = asyncio.run(bound.collect(prompts)).sequences
    assert [sequence.weight for sequence in sequences] == [0.25, 3.0, 1.0]


def test_the_first_written_token_is_predicted_by_the_last_row_of_the_prompt() -> None:
    sequence = teacher.answered_by_teacher(prompt("b", [1, 2, 3]), np.array([7, 8], dtype=np.int32))
    assert sequence.loss_mask.tolist() == [False, False, True, True, False]
    assert sequence.token_ids[1:][sequence.loss_mask[:-1]].tolist() == [7, 8]


@pytest.mark.parametrize(("on_cut_off", "kept", "dropped"), [("keep", ["d", "e", "f"], 2), ("drop", ["d", "f"], 3)])
def test_empty_answers_are_left_out_those_cut_off_as_configured_and_all_are_counted(
    on_cut_off: str, kept: list[str], dropped: int
) -> None:
    writers = Echo({"b": [], "c": [2], "d": [9, 2], "e": [9, 8], "f": [7, 40]})
    prompts = [ANSWERED, *(prompt(name, [1]) for name in "bcdef")]
    bound = teacher.AnswerSource(on_cut_off=on_cut_off).bind(writers, end_of_turn_ids=(2, 40))
    collected = asyncio.run(bound.collect(prompts))
    assert [s.id for s in collected.sequences] == ["a", *kept]
    assert collected.answers == AnswerCounters(written=5, empty=2, cut_off=1, dropped=dropped)


def test_where_no_end_token_is_known_none_is_missing() -> None:
    bound = teacher.AnswerSource(on_cut_off="drop").bind(Echo({"b": [], "c": [2]}))
    collected = asyncio.run(bound.collect([prompt(name, [1]) for name in "bc"]))
    assert [s.id for s in collected.sequences] == ["c"]
    assert collected.answers == AnswerCounters(written=2, empty=1, cut_off=0, dropped=1)


def test_too_many_answers_of_no_use_are_an_error_of_the_data() -> None:
    bound = teacher.AnswerSource(max_dropped_fraction=0.25, on_cut_off="drop", max_new_tokens=64).bind(Echo({}))
    bound.judge(AnswerCounters(written=40, empty=10, dropped=10), last=False)
    bound.judge(AnswerCounters(), last=True)
    with pytest.raises(
        DataError, match=r"11 of the 40 answers .* \(9 empty, 2 cut off at max_new_tokens: 64\), more than"
    ):
        bound.judge(AnswerCounters(written=40, empty=9, cut_off=5, dropped=11), last=False)
    few = AnswerCounters(written=teacher.MIN_JUDGED - 1, empty=teacher.MIN_JUDGED - 1, dropped=teacher.MIN_JUDGED - 1)
    bound.judge(few, last=False)
    with pytest.raises(DataError, match=r"answers\.max_dropped_fraction: 0\.25") as error:
        bound.judge(few, last=True)
    assert error.value.exit_code == 3
    teacher.AnswerSource(max_dropped_fraction=1.0).bind(Echo({})).judge(few, last=True)


def test_no_writer_is_asked_for_nothing() -> None:
    writers = Echo({})
    assert asyncio.run(teacher.AnswerSource().bind(writers).collect([ANSWERED])).answers == AnswerCounters()
    assert writers.asked == []


def test_rewriting_needs_prompts_without_their_old_answers() -> None:
    bound = teacher.AnswerSource(rewrite=True).bind(Echo({}))
    with pytest.raises(DataError, match="open the prompt stream with rewrite"):
        asyncio.run(bound.collect([ANSWERED]))


def test_parameters_are_read_and_bounded_by_the_configuration() -> None:
    chosen = ANSWERS.validate({"kind": "teacher", "max_new_tokens": 64})
    assert ANSWERS.load(chosen) == teacher.AnswerSource(max_new_tokens=64)
    assert ANSWERS.load(ANSWERS.validate("dataset")) == dataset.AnswerSource()
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"rewrite": 3},
        {"on_cut_off": "cut"},
        {"max_dropped_fraction": 2},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ANSWERS.validate({"kind": "teacher", **wrong})

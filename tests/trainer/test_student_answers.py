"""Answers `student`: sequences of what the student wrote, and what of it is left out."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from trainer.answers.student import AnswerSource
from trainer.errors import DataError
from trainer.protocols import Author
from trainer.types import WRITTEN, AnswerCounters, Completion, GenerationRequest, Prompt

END = 2


class Student:
    """Writes what it is told, by prompt and sample."""

    max_staleness = 1

    def __init__(self, texts: dict[str, tuple[list[int], str, int]]) -> None:
        self.texts, self.asked = texts, []

    def staleness(self, completion: Completion) -> int:
        return 5 - 1 - int(completion.versions[0][1])

    async def generate(self, requests: list[GenerationRequest]) -> list[Completion]:
        self.asked += requests
        made = []
        for request in requests:
            ids, reason, version = self.texts[request.id]
            logprobs = -0.5 - np.arange(len(ids), dtype=np.float32)
            made.append(Completion(np.asarray(ids, np.int32), logprobs, reason, "student", ((0, str(version)),)))
        return made


def collect(student: Student, prompts: list[Prompt], **ways: object):
    bound = AnswerSource(**ways).bind({}, seed=0, student=Author(student, (END,)))
    return bound, asyncio.run(bound.collect(prompts))


def prompt(name: str, *ids: int) -> Prompt:
    return Prompt(name, np.asarray(ids, np.int32), None, f"row {name}", weight=2.0)


def test_each_row_of_an_answer_has_the_logprob_of_the_token_that_it_predicts() -> None:
    student = Student({"a": ([7, 8, END], "stop", 4)})
    _, collected = collect(student, [prompt("a", 1, 5)])
    (sequence,) = collected.sequences
    assert sequence.token_ids.tolist() == [1, 5, 7, 8, END]
    assert sequence.loss_mask.tolist() == [False, True, True, True, False]
    assert sequence.columns[WRITTEN].tolist() == [0.0, -0.5, -1.5, -2.5, 0.0]
    assert sequence.columns[WRITTEN].dtype == np.float32
    assert (sequence.author, sequence.version, sequence.weight) == ("student", "4", 2.0)
    assert collected.numbers["rollout/staleness_max"] == 0
    assert student.asked[0].sampling.temperature == student.asked[0].sampling.top_p == 1.0


def test_answers_that_say_nothing_or_are_too_old_are_counted_and_left_out() -> None:
    texts = {"a": ([END], "stop", 4), "a#1": ([7, END], "stop", 3), "b": ([], "stop", 4), "b#1": ([7], "stop", 2)}
    _, collected = collect(Student(texts), [prompt("a", 1), prompt("b", 1)], n=2)
    assert [sequence.id for sequence in collected.sequences] == ["a#1"]
    assert collected.answers == AnswerCounters(written=4, empty=2, dropped=3, stale=1)
    assert (collected.numbers["rollout/staleness_max"], collected.numbers["rollout/tokens"]) == (2.0, 4.0)


@pytest.mark.parametrize(("on_cut_off", "left"), [("keep", 1), ("drop", 0)])
def test_a_text_that_was_cut_off_is_learnt_as_far_as_it_goes_or_left_out(on_cut_off: str, left: int) -> None:
    _, collected = collect(Student({"a": ([7, 8], "length", 4)}), [prompt("a", 1)], on_cut_off=on_cut_off)
    assert len(collected.sequences) == left
    assert collected.answers == AnswerCounters(written=1, cut_off=1, dropped=1 - left)
    assert collected.numbers["rollout/truncated"] == 1.0


def test_too_many_answers_of_no_use_end_the_run_and_say_why() -> None:
    bound, _ = collect(Student({}), [])
    bound.judge(AnswerCounters(written=40, empty=10, dropped=20, stale=10), last=False)
    with pytest.raises(DataError, match=r"21 of the 40 answers that the student wrote .*\(11 empty, 10 too old\)"):
        bound.judge(AnswerCounters(written=40, empty=11, dropped=21, stale=10), last=False)


def test_an_answer_in_the_dataset_is_never_taken_for_the_students() -> None:
    answered = Prompt("a", np.asarray([1, 2], np.int32), np.asarray([True, False]), "row a")
    with pytest.raises(DataError, match="rewrite"):
        collect(Student({}), [answered])

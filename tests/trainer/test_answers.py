"""Who writes the answers: the dataset, or the teacher where an answer is missing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from configs.answers import ANSWERS
from trainer.answers import dataset, teacher
from trainer.errors import DataError
from trainer.protocols import AnswerCollector, Author
from trainer.types import AnswerCounters, Completion, GenerationRequest, Prompt, Sampling, sample_seed


@dataclass
class Echo:
    """Generators that answer with fixed ids and remember what they were asked; 2 and 40 end an answer."""

    answers: dict[str, list[int]]
    author: str = "teacher"
    asked: list[GenerationRequest] = field(default_factory=list)

    async def generate(self, requests: AbstractSequence[GenerationRequest]) -> list[Completion]:
        self.asked += requests
        return [self._completion(self.answers[request.id]) for request in requests]

    def _completion(self, ids: list[int]) -> Completion:
        ended = bool(ids) and ids[-1] in ENDS
        logprobs = np.zeros(len(ids), dtype=np.float32)
        token_ids = np.array(ids, dtype=np.int32)
        return Completion(token_ids, logprobs, "stop" if ended else "length", self.author, ((0, "v1"),))


ENDS = (2, 40)


def bound_to(echo: Echo, *, stop_ids: tuple[int, ...] = ENDS, **parameters: Any) -> AnswerCollector:
    return teacher.AnswerSource(**parameters).bind({"": Author(echo, stop_ids)}, seed=7)


def prompt(prompt_id: str, ids: list[int], mask: list[bool] | None = None) -> Prompt:
    loss_mask = None if mask is None else np.array(mask)
    return Prompt(prompt_id, np.array(ids, dtype=np.int32), loss_mask, origin=f"rows.jsonl:{prompt_id}")


ANSWERED = prompt("a", [1, 2, 3, 4], [False, True, True, False])


def test_answers_of_the_dataset_are_taken() -> None:
    strategy = dataset.AnswerSource()
    assert (strategy.needs_generator, strategy.needs_answer) == (False, True)
    bound = strategy.bind({}, seed=0)
    (sequence,) = asyncio.run(bound.collect([ANSWERED])).sequences
    assert (sequence.id, sequence.author) == ("a", "dataset")
    assert sequence.token_ids is ANSWERED.token_ids
    assert sequence.spans() == ((1, 3),)
    with pytest.raises(DataError, match=r"rows.jsonl:b: has no answer.*teacher and teacher.generator: {}"):
        asyncio.run(bound.collect([prompt("b", [1])]))


def test_the_teacher_writes_what_is_missing_in_the_order_of_the_prompts() -> None:
    generators = Echo({"b": [7, 8, 9], "c": [6]})
    bound = bound_to(generators)
    sequences = asyncio.run(bound.collect([prompt("b", [1, 2]), ANSWERED, prompt("c", [5])])).sequences
    assert [request.id for request in generators.asked] == ["b", "c"]
    assert [(s.id, s.author) for s in sequences] == [("b", "teacher"), ("a", "dataset"), ("c", "teacher")]
    assert sequences[0].token_ids.tolist() == [1, 2, 7, 8, 9]
    assert sequences[0].token_ids.dtype == np.int32


def test_the_weight_of_a_row_is_that_of_its_answer_whoever_writes_it() -> None:
    bound = bound_to(Echo({"b": [7]}))
    prompts = [
        replace(ANSWERED, weight=0.25),
        replace(prompt("b", [1]), weight=3.0),
        prompt("a", [1, 2], [True, False]),
    ]
    sequences = asyncio.run(bound.collect(prompts)).sequences
    assert [sequence.weight for sequence in sequences] == [0.25, 3.0, 1.0]


def test_the_first_written_token_is_predicted_by_the_last_row_of_the_prompt() -> None:
    completion = Completion(
        np.array([7, 8], dtype=np.int32), np.zeros(2, dtype=np.float32), "stop", "teacher", ((0, "v1"),)
    )
    sequence = teacher.answered_by_teacher(prompt("b", [1, 2, 3]), completion)
    assert sequence.loss_mask.tolist() == [False, False, True, True, False]
    assert sequence.token_ids[1:][sequence.loss_mask[:-1]].tolist() == [7, 8]


@pytest.mark.parametrize(("on_cut_off", "kept", "dropped"), [("keep", ["d", "e", "f"], 2), ("drop", ["d", "f"], 3)])
def test_empty_answers_are_left_out_those_cut_off_as_configured_and_all_are_counted(
    on_cut_off: str, kept: list[str], dropped: int
) -> None:
    generators = Echo({"b": [], "c": [2], "d": [9, 2], "e": [9, 8], "f": [7, 40]})
    prompts = [ANSWERED, *(prompt(name, [1]) for name in "bcdef")]
    bound = bound_to(generators, on_cut_off=on_cut_off)
    collected = asyncio.run(bound.collect(prompts))
    assert [s.id for s in collected.sequences] == ["a", *kept]
    assert collected.answers == AnswerCounters(written=5, empty=2, cut_off=1, dropped=dropped)


def test_where_no_end_token_is_known_none_is_missing() -> None:
    bound = bound_to(Echo({"b": [], "c": [2]}), on_cut_off="drop", stop_ids=())
    collected = asyncio.run(bound.collect([prompt(name, [1]) for name in "bc"]))
    assert [s.id for s in collected.sequences] == ["c"]
    assert collected.answers == AnswerCounters(written=2, empty=1, cut_off=0, dropped=1)


def test_too_many_answers_of_no_use_are_an_error_of_the_data() -> None:
    bound = bound_to(Echo({}), max_dropped_fraction=0.25, on_cut_off="drop", max_new_tokens=64)
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
    bound_to(Echo({}), max_dropped_fraction=1.0).judge(few, last=True)


def test_no_generator_is_asked_for_nothing() -> None:
    generators = Echo({})
    assert asyncio.run(bound_to(generators).collect([ANSWERED])).answers == AnswerCounters()
    assert generators.asked == []


def test_rewriting_needs_prompts_without_their_old_answers() -> None:
    bound = bound_to(Echo({}), rewrite=True)
    with pytest.raises(DataError, match="open the prompt stream with rewrite"):
        asyncio.run(bound.collect([ANSWERED]))


def test_every_request_says_how_its_answer_is_drawn() -> None:
    echo = Echo({"b": [7, 2]})
    ways = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "stop": ("end",), "max_new_tokens": 9}
    asyncio.run(bound_to(echo, **ways).collect([prompt("b", [1])]))
    (request,) = echo.asked
    assert request.sampling == Sampling(9, 0.5, 0.9, 3, 0.1, ("end",), ENDS, seed=7)
    assert (request.origin, request.token_ids.tolist()) == ("rows.jsonl:b", [1])
    asyncio.run(bound_to(echo, seed=5).collect([prompt("b", [1])]))
    assert echo.asked[-1].sampling.seed == 5


def test_n_answers_are_a_group_of_sequences_in_the_order_of_their_samples() -> None:
    echo = Echo({"b": [7, 2], "b#1": [8, 2], "b#2": [2], "c": [9, 9], "c#1": [6, 2], "c#2": [5, 2]})
    bound = bound_to(echo, n=3, temperature=1.0)
    collected = asyncio.run(bound.collect([prompt("b", [1]), ANSWERED, prompt("c", [3])]))
    assert [s.id for s in collected.sequences] == ["b", "b#1", "a", "c", "c#1", "c#2"]  # b#2 is empty
    assert [s.group for s in collected.sequences[:2]] == [("main", "b")] * 2
    assert [s.token_ids.tolist() for s in collected.sequences[:2]] == [[1, 7, 2], [1, 8, 2]]
    assert collected.sequences[0].version == "v1"
    assert collected.answers == AnswerCounters(written=6, empty=1, cut_off=1, dropped=1)
    assert len({request.seed for request in echo.asked}) == 6


def test_a_seed_depends_on_run_prompt_and_sample_alone() -> None:
    seeds = {sample_seed(seed, f"0:{i}", sample) for seed in range(3) for i in range(50) for sample in range(4)}
    assert len(seeds) == 600
    assert max(seeds) < 2**32
    assert sample_seed(3, "0:1", 2) == sample_seed(3, "0:1", 2)
    # As it was when every prompt had one answer: runs repeat.
    assert sample_seed(1, "0:5", 0) == int.from_bytes(hashlib.blake2b(b"1:0:5", digest_size=4).digest(), "little")


def test_each_teacher_of_a_route_writes_to_its_own_prompts() -> None:
    code, big = Echo({"b": [7, 2], "d": [8, 2]}, author="teacher:code"), Echo({"c": [9, 3]}, author="teacher:big")
    authors = {"code": Author(code, (2,)), "big": Author(big, (3,))}
    routed = [replace(prompt(name, [1]), teacher=who) for name, who in (("b", "code"), ("c", "big"), ("d", "code"))]
    collected = asyncio.run(teacher.AnswerSource().bind(authors, seed=0).collect(routed))
    assert [(s.id, s.author, s.teacher) for s in collected.sequences] == [
        ("b", "teacher:code", "code"),
        ("c", "teacher:big", "big"),
        ("d", "teacher:code", "code"),
    ]
    assert [[r.id for r in echo.asked] for echo in (code, big)] == [["b", "d"], ["c"]]
    assert [echo.asked[0].sampling.stop_token_ids for echo in (code, big)] == [(2,), (3,)]


def test_an_answer_that_ends_at_a_string_is_not_cut_off() -> None:
    class Stops(Echo):
        def _completion(self, ids: list[int]) -> Completion:
            return replace(super()._completion(ids), finish_reason="stop")

    bound = bound_to(Stops({"b": [7, 9]}), stop=("end",), on_cut_off="drop")
    assert asyncio.run(bound.collect([prompt("b", [1])])).answers == AnswerCounters(written=1)

    class Aborts(Echo):
        def _completion(self, ids: list[int]) -> Completion:
            return replace(super()._completion(ids), finish_reason="abort")

    aborted = asyncio.run(bound_to(Aborts({"b": [7, 9]}), on_cut_off="drop").collect([prompt("b", [1])])).answers
    assert aborted == AnswerCounters(written=1, cut_off=1, dropped=1)
    never_ends = bound_to(Echo({"b": [7, 9]}), stop=("end",), on_cut_off="drop", stop_ids=())
    counted = asyncio.run(never_ends.collect([prompt("b", [1])])).answers
    assert counted == AnswerCounters(written=1, cut_off=1, dropped=1)


def test_parameters_are_read_and_bounded_by_the_configuration() -> None:
    chosen = ANSWERS.validate({"kind": "teacher", "max_new_tokens": 64})
    assert ANSWERS.load(chosen) == teacher.AnswerSource(max_new_tokens=64)
    assert ANSWERS.load(ANSWERS.validate("dataset")) == dataset.AnswerSource()
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"temperature": 2.5},
        {"temperature": 0.001},
        {"top_k": -1},
        {"min_p": 1.5},
        {"n": 0},
        {"n": 2},
        {"stop": [""]},
        {"stop": "text"},
        {"seed": -1},
        {"rewrite": 3},
        {"on_cut_off": "cut"},
        {"max_dropped_fraction": 2},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ANSWERS.validate({"kind": "teacher", **wrong})

"""From a configuration to the sequences of a step, where teachers write: routes, several ways, several answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from generation_oracle import check_logprobs
from tiny_models import tiny_folder
from tiny_runs import chat_row, run_of, write_rows
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from configs.load import load_run
from trainer.loop.inputs import read_inputs
from trainer.loop.job import make_job
from trainer.loop.sources import Source
from trainer.protocols import TeacherPools
from trainer.run_folder import RunFolder
from trainer.types import Collected, Completion, GenerationRequest


class Pool:
    """One engine of transformers as `Generators`, which keeps what it wrote."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._engine = Engine().start_generator(engine_plan(Engine(), folder, role="generator", prefix=prefix), "hf")
        self.written: dict[tuple[str, int], tuple[GenerationRequest, Completion]] = {}

    async def generate(self, requests: list[GenerationRequest]) -> list[Completion]:
        completions = await self._engine.generate(requests, deadline_s=60)
        pairs = zip(requests, completions, strict=True)
        self.written |= {(request.prompt_id, request.sample): (request, one) for request, one in pairs}
        return completions


SMALL = {"training": {"sequences_per_step": 6}, "data": {"evaluation": None}}


def opened(folder: Path, changes: Mapping[str, Any]) -> tuple[Source, dict[str, Pool]]:
    """The source of a run of two teachers, `big` and `small`, that write; rows of even numbers are for `big`."""
    teachers = {
        name: {"model": {"path": str(folder / path)}, "generator": {"engine": "hf"}}
        for name, path in (("big", "teacher"), ("small", "small"))
    }
    file = run_of(folder, {**SMALL, "teachers": teachers, **changes})
    tiny_folder(folder / "small", seed=3)
    rows = [chat_row(i, answered=False) | {"who": ("big", "small")[i % 2]} for i in range(40)]
    write_rows(folder / "train.jsonl", rows)
    loaded = load_run(file, []).run
    job = make_job(
        loaded,
        read_inputs(loaded),
        RunFolder(folder / "run"),
        config_hash="",
        teacher_dtypes={"big": "float32", "small": "float32"},
        skip_self_test=True,
    )
    pools = {name: Pool(folder / path, name) for name, path in (("big", "teacher"), ("small", "small"))}
    return job.source({name: TeacherPools(None, pool) for name, pool in pools.items()}), pools


def collected(source: Source, step: int) -> Collected:
    return asyncio.run(source.collect(source.take(step)))


ROUTE = {"column": "who", "map": {"big": "big", "small": "small"}}


def test_each_teacher_of_a_route_writes_the_rows_that_are_routed_to_it(tmp_path: Path) -> None:
    answers = {"kind": "teacher", "n": 2, "temperature": 1.2, "top_k": 50, "max_new_tokens": 5, "stop": ["fox"]}
    source, pools = opened(tmp_path, {"route": ROUTE, "answers": answers})
    sequences = collected(source, 1).sequences
    assert {sequence.author for sequence in sequences} == {"teacher:big", "teacher:small"}
    for sequence in sequences:
        even = int(sequence.prompt_id.partition(":")[2]) % 2 == 0
        assert sequence.teacher == ("big" if even else "small")
        assert sequence.author == f"teacher:{sequence.teacher}"
        request, completion = pools[sequence.teacher].written[sequence.prompt_id, sequence.sample]
        assert sequence.token_ids.tolist() == [*request.token_ids.tolist(), *completion.token_ids.tolist()]
        assert request.origin.startswith(str(tmp_path / "train.jsonl"))
    for name, path in (("big", "teacher"), ("small", "small")):
        pairs = list(pools[name].written.values())
        assert len({request.seed for request, _ in pairs}) == len(pairs) == 2 * len({r.prompt_id for r, _ in pairs})
        check_logprobs(tmp_path / path, [request for request, _ in pairs], [completion for _, completion in pairs])
    with pytest.raises(AssertionError):  # of the other teacher
        check_logprobs(tmp_path / "small", *zip(*pools["big"].written.values(), strict=True))


def test_one_teacher_writes_in_the_way_of_each_task_and_writes_the_same_again(tmp_path: Path) -> None:
    tasks = {
        "plain": {"teacher": "big", "answers": {"kind": "teacher", "max_new_tokens": 4}},
        "warm": {"teacher": "big", "answers": {"kind": "teacher", "max_new_tokens": 7, "temperature": 1.5, "n": 3}},
        "other": {"teacher": "small", "answers": {"kind": "teacher", "max_new_tokens": 4}},
    }
    source, _ = opened(tmp_path, {"tasks": tasks})
    start = source.cursor
    first, second = collected(source, 1), collected(source, 2)
    assert first.answers.written == 2 + 3 * 2 + 2
    warm = [sequence for sequence in first.sequences if sequence.task == "warm"]
    assert {sequence.sample for sequence in warm} == {0, 1, 2}
    assert max(sequence.num_loss_tokens for sequence in warm) > 4
    assert all(sequence.num_loss_tokens <= 4 for sequence in first.sequences if sequence.task != "warm")
    source.seek(start)
    again = [collected(source, step) for step in (1, 2)]
    for ours, theirs in zip(again, (first, second), strict=True):
        assert ours.answers == theirs.answers
        assert [s.id for s in ours.sequences] == [s.id for s in theirs.sequences]
        assert [s.token_ids.tolist() for s in ours.sequences] == [s.token_ids.tolist() for s in theirs.sequences]


def test_a_kind_of_a_users_own_asks_generators_by_its_file_alone(tmp_path: Path) -> None:
    source, pools = opened(tmp_path, {"route": ROUTE, "answers": {"kind": "fakes.best_of", "n": 3}})
    step = collected(source, 1)
    assert step.answers.written == 3 * len(step.sequences) == 18
    for sequence in step.sequences:
        means = [pools[sequence.teacher].written[sequence.prompt_id, i][1].logprobs.mean() for i in range(3)]
        assert sequence.sample == means.index(max(means))
    assert {sequence.sample for sequence in step.sequences} != {0}

"""Runs whose student writes the text that it is trained on, through the real command, with faults in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_under_fault import (
    DIES_AFTER_STEP_5,
    assert_same_result,
    events,
    finish,
    held,
    losses,
    newest,
    start,
    when,
)
from tiny_runs import merged, records, stillhouse, tiny_run
from transformers import AutoModelForCausalLM
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from configs.load import load_run
from trainer.loop.inputs import read_inputs
from trainer.loop.job import make_job
from trainer.loop.policy import Policy
from trainer.loop.written import FILE
from trainer.run_folder import RunFolder
from trainer.types import Completion, GenerationRequest, Sequence

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

WRITES: dict[str, Any] = {
    "answers": {"kind": "student", "max_new_tokens": 24, "n": 2},
    "rollouts": {"engine": {"kind": "hf"}, "dtype": "float32", "bucket_bytes": 40_000},
    "training": {"steps": 6, "sequences_per_step": 4, "save_every": 2, "micro_batch_tokens": 512, "depth": 0},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
}
ALONE = {"runtime": "in_process", "student": {"ranks": 1}}


def test_a_student_learns_on_its_own_text_and_every_step_says_how_old_it_is(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, merged(WRITES, ALONE))
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    kl = [record["evaluation/forward_kl"] for record in records(run, "evaluation")]
    assert kl[-1] < 0.8 * kl[0]
    steps = records(run, "step")
    assert [step["rollout/staleness_max"] for step in steps] == [0.0] * 6
    assert all(step["sync/probe_gap"] < 1e-4 for step in steps)
    assert all(step["answers/written"] == 8 for step in steps)
    assert not list((run / "checkpoints").rglob(FILE)), "nothing is written ahead"


def test_a_killed_run_goes_on_with_the_text_of_weights_that_are_gone(tmp_path: Path) -> None:
    """At depth 1 step 5 is written by the weights after step 3, of which a resumed run has the text alone."""
    changes = merged(merged(WRITES, ALONE), {"training": {"depth": 1}})
    config, golden = tiny_run(tmp_path, changes), tmp_path / "golden"
    whole = stillhouse("train", str(config), "--set", f"folder={golden}")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert [step["rollout/staleness_max"] for step in records(golden, "step")] == [0.0] + [1.0] * 5
    process = start(config, code=DIES_AFTER_STEP_5)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert (run / "checkpoints" / "step_000004" / FILE).is_file()
    after = stillhouse("train", str(config))
    assert after.returncode == 0, after.stdout + after.stderr
    assert_same_result(run, golden)


def test_a_lost_engine_and_a_lost_rank_change_nothing_of_what_two_ranks_at_zero_3_learn(tmp_path: Path) -> None:
    """Through Ray, with vLLM writing: the engine comes back with the weights that it had, the ranks with the text."""
    changes = {
        "rollouts": {"engine": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}},
        "student": {"zero_stage": 3},
        "training": {"depth": 1},
    }
    config, golden, run = tiny_run(tmp_path, merged(WRITES, changes)), tmp_path / "golden", tmp_path / "run"
    whole = stillhouse("train", str(config), "--set", f"folder={golden}")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    process = start(config)
    when(run, lambda: 1 in losses(run), process)
    with held(process):
        os.kill(newest(run, "rollout-0"), signal.SIGKILL)
    when(run, lambda: 3 in losses(run), process)
    with held(process):
        assert max(losses(run)) < 6
        os.kill(newest(run, "student-1"), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert len(events(run, "teacher_restart")) == len(events(run, "students_lost")) == 1
    assert_same_result(run, golden)


def test_an_engine_that_took_in_no_weights_ends_the_run_with_both_numbers(tmp_path: Path) -> None:
    changes = merged(merged(WRITES, ALONE), {"rollouts": {"engine": {"kind": "fakes.deaf"}}})
    result = stillhouse(
        "train", str(tiny_run(tmp_path, changes)), PYTHONPATH=str(Path(__file__).parents[1] / "support")
    )
    assert result.returncode == 4, result.stdout + result.stderr
    assert "rollout-0 does not have the weights that the student has after step 1" in result.stdout + result.stderr
    assert "nats a token, where 0.005 are allowed (rollouts.max_probe_gap)" in result.stdout + result.stderr
    assert max(losses(tmp_path / "run")) == 1, "nothing of another student's text was trained"


def test_a_step_may_be_of_the_students_text_and_of_the_datasets_by_exact_shares(tmp_path: Path) -> None:
    tasks = {"own": {"answers": WRITES["answers"], "share": 0.75}, "given": {"answers": "dataset", "share": 0.25}}
    changes = merged(merged(WRITES, ALONE), {"training": {"steps": 3, "depth": 2}})
    config = tiny_run(tmp_path, {**changes, "answers": "dataset", "tasks": tasks})
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    steps = records(tmp_path / "run", "step")
    assert [(step["task/own/sequences"], step["task/given/sequences"]) for step in steps] == [(6.0, 1.0)] * 3
    assert [step["rollout/staleness_max"] for step in steps] == [0.0, 1.0, 2.0]


class Pool:
    """One engine of transformers as `Rollouts`, of which only the text is wanted."""

    def __init__(self, folder: Path) -> None:
        plan = engine_plan(Engine(), folder, role="rollout", max_length=128, weights_version="0")
        self._engine = Engine().start_generator(plan, "hf")

    async def generate(self, requests: list[GenerationRequest]) -> list[Completion]:
        return await self._engine.generate(requests, deadline_s=60)


def first_text(config: Path) -> tuple[Sequence, ...]:
    """What the student writes for step 1."""
    run = load_run(config, []).run
    folder, dtypes = RunFolder(config.parent / "elsewhere"), {"teacher": "float32"}
    job = make_job(run, read_inputs(run), folder, config_hash="", teacher_dtypes=dtypes, skip_self_test=True)
    policy = Policy(depth=0, sync_every=1)
    policy.begin(0, None)

    async def collect() -> tuple[Sequence, ...]:
        policy.synced(0)
        source = job.source({}, Pool(Path(run.student.model.path)), policy)
        return (await source.collect(source.take(1))).sequences

    return asyncio.run(collect())


def by_hand(config: Path, sequences: tuple[Sequence, ...], k: int) -> tuple[float, float]:
    """Loss and gradient norm of KL(student, teacher) over the teacher's k likeliest ids and one event of all others,
    meaned over all written tokens, and of the student's mass on ids that do not exist, in float64."""
    size = 283
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(config.parent / name, dtype=torch.float64)
        for name in ("student", "teacher")
    )
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids).long()[None]
        mask = torch.from_numpy(sequence.loss_mask)
        with torch.no_grad():
            p = teacher(ids).logits[0, mask, :size].log_softmax(-1)
        logits = student(ids).logits[0, mask]
        q, at = logits[:, :size].log_softmax(-1), p.topk(k, dim=-1).indices
        p_kept, q_kept = (torch.cat([x.gather(1, at), _rest(x, at)], dim=1) for x in (p, q))
        total = total + (q_kept.exp() * (q_kept - p_kept)).sum()
        total = total + (logits.logsumexp(-1) - logits[:, :size].logsumexp(-1)).sum()
        rows += len(q)
    loss = total / rows
    loss.backward()
    return float(loss), float(torch.sqrt(sum(p.grad.square().sum() for p in student.parameters())))


def _rest(logprobs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return logprobs.scatter(1, kept, -torch.inf).logsumexp(-1, keepdim=True)


def test_a_step_on_the_students_text_has_the_loss_and_gradient_of_its_definition(tmp_path: Path) -> None:
    changes = {"labels": {"kind": "topk", "k": 16}, "objective": [{"loss": "reverse_kl"}], "training": {"steps": 1}}
    config = tiny_run(tmp_path, merged(merged(WRITES, ALONE), changes))
    sequences = first_text(config)
    assert len(sequences) == 8
    assert {sequence.author for sequence in sequences} == {"student"}
    loss, norm = by_hand(config, sequences, 16)
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    (step,) = records(tmp_path / "run", "step")
    assert step["train/loss_tokens"] == sum(sequence.num_loss_tokens for sequence in sequences)
    assert step["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert step["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    others = by_hand(config, tuple(reversed(sequences[1:])), 16)
    assert abs(others[0] - loss) > 1e-3 * abs(loss), "one sequence less would be seen"

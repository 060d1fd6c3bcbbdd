"""Whole runs with vLLM teachers: the demo's own configuration with a handful of steps, and a resumed run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import leftovers
from runs_under_fault import counted, events, finish, held, left_running, losses, start, when
from tiny_runs import SHARDED, records, stillhouse, tiny_run

from launch.prepare import prepare
from trainer.model.prune import prune

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

CHECKOUT = Path(__file__).parents[2]
TEACHER = CHECKOUT / ".cache/models/smollm2-135m-instruct"
STUDENT = CHECKOUT / ".cache/models/smollm2-135m-20-layers"
RESUME_TOLERANCE = 1e-4  # relative, of every loss: float32 sums of another engine, and of whatever is in flight beside


@pytest.fixture(scope="session")
def demo_models() -> None:
    """What `make models` makes; nothing to do where it has run."""
    prepare("smollm2-135m-instruct", TEACHER)
    if not STUDENT.exists():
        prune(TEACHER, STUDENT, keep_layers=[*range(10), *range(20, 30)])


def test_the_demo_learns_in_a_handful_of_steps_and_vllm_loads_its_student(
    demo_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = {
        "folder": str(run),
        "training.steps": "4",
        "training.sequences_per_step": "6",
        "training.evaluate_every": "0",
        "optimizer.warmup_steps": "1",
        "data.evaluation.max_rows": "4",
        "answers.max_new_tokens": "24",
        "report.generate": "1",
        "report.generate_tokens": "8",
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.chdir(CHECKOUT)
    result = stillhouse("train", "configs/demo.yaml", *arguments, timeout_s=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = records(run, "evaluation")
    assert after["evaluation/forward_kl"] < 0.8 * before["evaluation/forward_kl"]
    assert {e["test"] for e in events(run, "self_test")} >= {
        "labels against transformers",
        "topk labels against hidden",
    }
    assert "report" in result.stdout
    assert left_running(run) == []
    load = (
        "from vllm import LLM, SamplingParams;"
        f"llm = LLM({str(run / 'student')!r}, dtype='float32', max_model_len=128, enforce_eager=True,"
        " kv_cache_memory_bytes=64 * 2**20, block_size=32);"
        "print(len(llm.chat([{'role': 'user', 'content': 'Hello'}],"
        " SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)[0].outputs[0].token_ids))"
    )
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    loaded = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, timeout=600)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split()[-1] == "4"


def test_the_quick_demo_learns_with_one_engine(
    demo_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = {
        "folder": str(run),
        "training.steps": "4",
        "training.evaluate_every": "0",
        "optimizer.warmup_steps": "1",
        "data.evaluation.max_rows": "4",
        "report.generate": "1",
        "report.generate_tokens": "8",
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.chdir(CHECKOUT)
    result = stillhouse("train", "configs/demo-quick.yaml", *arguments, timeout_s=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = records(run, "evaluation")
    assert after["evaluation/forward_kl"] < 0.8 * before["evaluation/forward_kl"]
    assert {event["role"] for event in events(run, "process")} == {"scorer-0", "student-0"}
    assert left_running(run) == []


def test_a_killed_controller_takes_everything_with_it_and_the_run_goes_on(golden: Path, tmp_path: Path) -> None:
    """`golden` had two ranks as well, and a teacher in plain transformers."""
    config, run = tiny_run(tmp_path, {**SHARDED, "training": {"save_every": 2}}), tmp_path / "run"
    with leftovers() as left:
        process = start(config)
        when(run, lambda: bool(events(run, "checkpoint")), process)
        with held(process):
            assert len(left.processes()) > 4, "the search finds the run while it is there"
            process.kill()  # the controller alone: what it started must notice by itself
        finish(process)
        assert left.after() == []
    assert max(losses(run)) < max(losses(golden)), "it was killed in the middle"
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step" in result.stdout
    ours, theirs = losses(run), losses(golden)
    assert ours.keys() == theirs.keys()
    assert counted(run) == counted(golden)
    worst = max(abs(ours[step] - theirs[step]) / theirs[step] for step in ours)
    assert worst <= RESUME_TOLERANCE, worst
    assert math.isfinite(worst)

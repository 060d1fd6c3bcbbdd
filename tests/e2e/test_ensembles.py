"""Whole runs whose tasks ask several teachers about the same tokens: in one process, killed and resumed; on Ray, with
two vLLM teachers of which one is lost for good."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs_under_fault import (
    DIES_AFTER_STEP_5,
    assert_same_result,
    events,
    finish,
    held,
    losses,
    newest,
    notes,
    start,
    when,
)
from tiny_models import tiny_folder
from tiny_runs import chat_row, records, run_of, stillhouse, write_rows

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]
NAMES = ["prose", "code"]
IN_ONE_PROCESS = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "training": {"steps": 9, "save_every": 2, "save_every_minutes": 0},
}


def scorer(kind: str, **options: Any) -> dict[str, Any]:
    engine = {"kind": kind} | ({"kv_cache_bytes": 32 * 2**20} if kind == "vllm" else {})
    return {"engine": engine, "dtype": "float32"} | options


def two_teachers(folder: Path, *scorers: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    paths = (folder / "teacher", folder / "code")
    return {
        name: {"model": {"path": str(path)}, "scorer": one}
        for name, path, one in zip(NAMES, paths, scorers, strict=True)
    }


def every_way(folder: Path) -> Path:
    """A task for each way to join two teachers, which are of unlike dtypes; weights of the configuration or the row."""
    teachers = two_teachers(folder, scorer("hf"), scorer("hf", dtype="bfloat16"))
    rows = [chat_row(50 + i) | {"trust": {"prose": i % 3, "code": 1}} for i in range(14)]
    own, seen = (write_rows(folder / f"{name}.jsonl", some) for name, some in (("own", rows), ("seen", rows[:3])))
    tasks = {
        "mixed": {"labels": "hidden", "ensemble": {"teachers": NAMES, "weights": {"prose": 3, "code": 1}}},
        "geometric": {"labels": "hidden", "ensemble": {"teachers": NAMES, "how": "logit_mean"}},
        "each": {
            "ensemble": {"teachers": NAMES, "how": "per_teacher", "weights_column": "trust"},
            "prompts": {"path": str(own)},
            "evaluation": {"path": str(seen)},
            "objective": [{"loss": "forward_kl"}, {"loss": "reverse_kl", "weight": 0.5}],
        },
        "joined": {"ensemble": {"teachers": NAMES, "weights": {"prose": 1, "code": 2}}},
        "given": {"labels": {"kind": "given_ids", "k": 16}, "ensemble": {"teachers": NAMES}},
        "picked": {"ensemble": {"teachers": NAMES, "how": "min_ce"}},
    }
    return run_of(folder, {**IN_ONE_PROCESS, "teachers": teachers, "tasks": tasks})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = every_way(tmp_path_factory.mktemp("ensembles") / "calm")
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    return config.parent / "run"


def test_a_killed_run_of_ensembles_goes_on_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path) -> None:
    config, run = every_way(tmp_path / "killed"), tmp_path / "killed/run"
    code, output = finish(start(config, code=DIES_AFTER_STEP_5))
    assert code == -signal.SIGKILL, output
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step 4" in result.stdout
    assert_same_result(run, undisturbed)
    weights = [[step[f"teacher/{name}/weight"] for step in records(one, "step")] for one in (run, undisturbed)
               for name in NAMES]  # fmt: skip
    assert weights[:2] == weights[2:]


def test_numbers_say_what_each_teacher_counted_for(undisturbed: Path) -> None:
    for step in records(undisturbed, "step"):
        assert sum(step[f"teacher/{name}/weight"] for name in NAMES) == pytest.approx(1)
        assert {step[f"teacher/{name}/tokens"] for name in NAMES} == {step["train/tokens"]}, "all are asked about all"
        assert {step[f"teacher/{name}/lost_rows"] for name in NAMES} == {0}
        assert all(step[f"task/each/{term}_kl/{name}"] > 0 for term in ("forward", "reverse") for name in NAMES)
    before, after = records(undisturbed, "evaluation")
    for task in ("mixed", "geometric", "each", "joined", "given", "picked"):
        kl, *each = (f"evaluation/task/{task}/{of}forward_kl" for of in ("", *(f"teacher/{n}/" for n in NAMES)))
        assert after[kl] < before[kl]
        assert all(after[one] > 0 for one in each)
    mixed, geometric = (after[f"evaluation/task/{task}/forward_kl"] for task in ("mixed", "geometric"))
    assert mixed != pytest.approx(geometric, rel=1e-3)
    each = [after[f"evaluation/task/mixed/teacher/{name}/forward_kl"] for name in NAMES]
    assert after["evaluation/task/mixed/forward_kl"] < 0.75 * each[0] + 0.25 * each[1], "KL is convex"
    assert "tokens not judged, since it was lost" in (undisturbed / "report.html").read_text()


def on_ray(folder: Path, kind: str, *, on_lost: str) -> Path:
    teachers = two_teachers(folder, scorer(kind), scorer(kind))
    changes = {
        "teachers": teachers,
        "student": {"ranks": 1},
        "ensemble": {"teachers": NAMES, "on_lost": on_lost},
        "training": {"steps": 12, "depth": 0},
        "faults": {"max_teacher_restarts": 0},
    }
    return run_of(folder, changes)


def without_the_second(config: Path) -> tuple[int, str, Path]:
    """The run, whose teacher `code` is killed for good after step 2."""
    process, run = start(config), config.parent / "run"
    when(run, lambda: 2 in losses(run), process)
    with held(process):
        os.kill(newest(run, "code.scorer-0"), signal.SIGKILL)
    return *finish(process), run


def test_a_vllm_teacher_lost_for_good_is_gone_on_without_and_what_it_missed_is_counted(tmp_path: Path) -> None:
    code, output, run = without_the_second(on_ray(tmp_path / "on", "vllm", on_lost="continue"))
    assert code == 0, output
    assert len(events(run, "teacher_lost")) == 1
    assert [text for text in notes(run) if "teacher code is lost for good, and the run goes on" in text]
    steps = records(run, "step")
    lost = [step["teacher/code/lost_rows"] for step in steps]
    assert (lost[0], lost[-1]) == (0, steps[-1]["train/loss_tokens"])
    assert [step["teacher/code/weight"] for step in steps] == [0.5 if not rows else 0 for rows in lost]
    assert losses(run)[12] < losses(run)[1]


def test_a_teacher_lost_for_good_ends_a_run_that_may_not_go_on_without(tmp_path: Path) -> None:
    code, output, run = without_the_second(on_ray(tmp_path / "off", "hf", on_lost="end"))
    assert code == 4, output
    assert "no scorer of teacher code is left" in output
    assert 0 < len(losses(run)) < 12

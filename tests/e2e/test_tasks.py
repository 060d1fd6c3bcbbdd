"""Whole runs of several tasks and teachers: killed and resumed ones, rows that go to a teacher by a column, two vLLM
teachers of which one is killed, and a run without any teacher."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from runs_under_fault import DIES_AFTER_STEP_5, assert_same_result, events, finish, held, losses, newest, start, when
from tiny_models import tiny_folder
from tiny_runs import chat_row, records, run_of, stillhouse, tiny_run, write_rows

from trainer.run_folder import read_json

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]
ENGINE = {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}
TOLERANCE = 1e-4


def two_teachers(folder: Path, *, engine: object, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    teachers = {
        name: {"model": {"path": str(folder / path)}, "scorer": {"engine": engine, "dtype": "float32"}}
        for name, path in (("prose", "teacher"), ("code", "code"))
    }
    code = {"teacher": "code", "labels": "hidden", "objective": [{"loss": "reverse_kl"}], "weight": 0.5}
    tasks = {"chat": {"teacher": "prose", "share": 3}, "code": code}
    changes = {"student": {"ranks": 1}, "training": {"steps": 6}, **changes}
    return run_of(folder, {**changes, "teachers": teachers, "tasks": tasks})


def test_one_of_two_teachers_killed_changes_nothing_and_their_tokens_add_up(tmp_path: Path) -> None:
    """Against transformers in one process: what vLLM answers is the same with and without a fault."""
    result = stillhouse("train", str(two_teachers(tmp_path / "calm", engine="hf", runtime="in_process")))
    assert result.returncode == 0, result.stdout + result.stderr
    process = start(two_teachers(tmp_path / "killed", engine=ENGINE))
    run = tmp_path / "killed/run"
    when(run, lambda: 1 in losses(run), process)
    with held(process):
        os.kill(newest(run, "code.scorer-0"), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert len(events(run, "teacher_restart")) >= 1
    ours, theirs = losses(run), losses(tmp_path / "calm/run")
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    assert all(abs(ours[step] - theirs[step]) <= TOLERANCE * abs(theirs[step]) for step in ours)
    for step in records(run, "step"):
        assert step["teacher/prose/tokens"] + step["teacher/code/tokens"] == step["train/tokens"]
        assert step["teacher/code/token_share"] == step["teacher/code/tokens"] / step["train/tokens"]
        assert (step["task/chat/sequences"], step["task/code/sequences"]) == (6, 2), "shares 3 and 1 of 8"


def test_hard_labels_alone_need_no_teacher(tmp_path: Path) -> None:
    changes = {
        "runtime": "in_process",
        "student": {"ranks": 1},
        "labels": "none",
        "objective": [{"loss": "cross_entropy"}],
        "training": {"steps": 12},
    }
    config = run_of(tmp_path, changes)
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    trained = losses(tmp_path / "run")
    assert math.isfinite(trained[12])
    assert trained[12] < trained[1]
    before, after = records(tmp_path / "run", "evaluation")
    assert after["evaluation/perplexity"] < before["evaluation/perplexity"]
    absent = {f"evaluation/{name}" for name in ("forward_kl", "agreement", "teacher_perplexity")}
    assert not absent & (before.keys() | after.keys())
    assert "perplexity is measured on them, KL and agreement not" in result.stdout
    assert "KL to teacher" not in (tmp_path / "run/report.html").read_text()
    assert "| perplexity |" in (tmp_path / "run/student/README.md").read_text()


def test_two_halves_of_a_dataset_as_tasks_train_as_the_whole_does(tmp_path: Path) -> None:
    changes = {"runtime": "in_process", "student": {"ranks": 1}, "data": {"shuffle": False}, "training": {"steps": 5}}
    whole = tiny_run(tmp_path / "whole", changes)
    halves: dict[str, Any] = {}
    lines = (tmp_path / "whole/train.jsonl").read_text().splitlines(keepends=True)
    for name, first in (("even", 0), ("odd", 1)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(lines[first::2]))
        halves[name] = {"prompts": {"path": str(rows)}}
    unequal = {**halves, "odd": {**halves["odd"], "weight": 2.0}}
    found = {}
    for name, tasks in (("whole", {}), ("halves", halves), ("unequal", unequal)):
        config = tiny_run(tmp_path / name, {**changes, "tasks": tasks}) if tasks else whole
        result = stillhouse("train", str(config))
        assert result.returncode == 0, result.stdout + result.stderr
        found[name] = losses(tmp_path / name / "run")
    assert found["halves"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["unequal"] != pytest.approx(found["whole"], rel=1e-2), "negative control: weights count"


STEPS = 9
IN_ONE_PROCESS = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "training": {"steps": STEPS, "save_every": 2, "save_every_minutes": 0, "keep_checkpoints": 9},
}


def three_tasks(folder: Path) -> Path:
    """Shares 3, 2 and 1 of eight sequences a step; the third task asks both teachers, of unlike dtypes, by a column."""
    folder.mkdir(parents=True)
    tiny_folder(folder / "code", seed=3)
    rows = [chat_row(50 + i) | {"domain": "python" if i % 3 == 0 else "prose"} for i in range(7)]
    mixed, seen = (write_rows(folder / f"{name}.jsonl", rows) for name in ("mixed", "seen"))
    teachers = {
        name: {"model": {"path": str(folder / path)}, "scorer": {"engine": {"kind": "hf"}, "dtype": dtype}}
        for name, path, dtype in (("prose", "teacher", "float32"), ("code", "code", "bfloat16"))
    }
    tasks = {
        "chat": {"teacher": "prose", "share": 3},
        "code": {"teacher": "code", "share": 2, "labels": "hidden", "objective": [{"loss": "reverse_kl"}]},
        "mixed": {
            "prompts": {"path": str(mixed)},
            "evaluation": {"path": str(seen), "max_rows": 3},
            "route": {"column": "domain", "map": {"python": "code", "prose": "prose"}},
            "weight": 0.5,
        },
    }
    return run_of(folder, {**IN_ONE_PROCESS, "teachers": teachers, "tasks": tasks})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = three_tasks(tmp_path_factory.mktemp("tasks") / "calm")
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    return config.parent / "run"


def cursors(run: Path) -> dict[str, Any]:
    """What every checkpoint says was trained, in sum and of each task."""
    manifests = sorted(run.glob("checkpoints/step_*/MANIFEST.json"))
    return {path.parent.name: json.loads(path.read_text())["state"]["cursor"] for path in manifests}


def test_a_killed_run_of_several_tasks_goes_on_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path) -> None:
    config, run = three_tasks(tmp_path / "killed"), tmp_path / "killed/run"
    code, output = finish(start(config, code=DIES_AFTER_STEP_5))
    assert code == -signal.SIGKILL, output
    assert (max(losses(run)), *sorted(cursors(run))) == (5, "step_000002", "step_000004")
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed after step 4" in result.stdout
    assert_same_result(run, undisturbed)
    assert cursors(run) == cursors(undisturbed)
    assert list(cursors(run))[-1] == f"step_{STEPS:06d}"


def test_shares_are_exact_over_three_steps_and_in_every_cursor(undisturbed: Path) -> None:
    drawn: Counter[str] = Counter()
    for record in records(undisturbed, "step"):
        drawn.update({name: int(record[f"task/{name}/sequences"]) for name in ("chat", "code", "mixed")})
        in_all = 8 * record["step"]
        assert drawn.total() == in_all
        assert all(abs(drawn[name] - in_all * part / 6) < 1 for name, part in (("chat", 3), ("code", 2), ("mixed", 1)))
        if record["step"] % 3 == 0:
            assert drawn == {"chat": in_all / 2, "code": in_all / 3, "mixed": in_all / 6}
    last = cursors(undisturbed)[f"step_{STEPS:06d}"]
    assert {name: cursor["counters"]["read"] for name, cursor in last["tasks"].items()} == drawn
    assert (last["tasks"]["mixed"]["epoch"], last["tasks"]["mixed"]["position"]) == (1, 5), "12 of 7 rows"


def test_rows_of_a_column_go_to_their_teachers_whose_tokens_add_up(undisturbed: Path) -> None:
    steps = records(undisturbed, "step")
    asked = [{name: step.get(f"teacher/{name}/tokens", 0) for name in ("prose", "code")} for step in steps]
    assert [sum(tokens.values()) for tokens in asked] == [step["train/tokens"] for step in steps]
    assert all(sum(tokens[name] for tokens in asked) > 0 for name in ("prose", "code"))
    roles = read_json(undisturbed / "manifest.json")["roles"]
    assert [roles[f"{name}.scorer"]["dtype"] for name in ("prose", "code")] == ["float32", "bfloat16"]


def test_each_task_is_evaluated_by_its_teacher_and_all_together(undisturbed: Path) -> None:
    before, after = records(undisturbed, "evaluation")
    fields = ("num_rows", "forward_kl", "agreement", "perplexity", "teacher_perplexity", "padding_mass")
    before, after = ({k.removeprefix("evaluation/"): v for k, v in one.items()} for one in (before, after))
    for found in (before, after):
        of_tasks = {name: {one: found[f"task/{name}/{one}"] for one in fields} for name in ("chat", "code", "mixed")}
        num_rows = {name: task["num_rows"] for name, task in of_tasks.items()}
        assert sum(num_rows.values()) == found["num_rows"]
        assert num_rows["chat"] == num_rows["code"], "one set of rows, by another teacher each"
        assert of_tasks["chat"]["perplexity"] == pytest.approx(of_tasks["code"]["perplexity"], rel=1e-5)
        assert of_tasks["chat"]["teacher_perplexity"] != pytest.approx(of_tasks["code"]["teacher_perplexity"], rel=1e-2)
        for name in ("forward_kl", "agreement", "padding_mass"):
            mean = sum(num_rows[task] * of_tasks[task][name] for task in of_tasks) / found["num_rows"]
            assert found[name] == pytest.approx(mean)
    assert all(after[f"task/{name}/forward_kl"] < before[f"task/{name}/forward_kl"] for name in ("chat", "code"))
    assert "chat: KL(teacher, student), nats per token" in (undisturbed / "student/README.md").read_text()
    assert "How well each task is learned" in (undisturbed / "report.html").read_text()


def test_a_value_without_a_teacher_is_named_with_its_line_before_anything_starts(tmp_path: Path) -> None:
    config = three_tasks(tmp_path / "verse")
    rows = tmp_path / "verse/mixed.jsonl"
    rows.write_text(rows.read_text() + json.dumps(chat_row(70) | {"domain": "verse"}) + "\n")
    result = stillhouse("train", str(config))
    assert result.returncode == 3, result.stdout + result.stderr
    assert f"{rows}:8: domain: is 'verse', which is not in route.map" in result.stderr
    assert not (tmp_path / "verse/run/metrics.jsonl").exists()

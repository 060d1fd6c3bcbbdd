"""What runs and submissions wrote, damaged: report, status, list, model card and resuming go on, and say what is left
out."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mutations import Damage, outcomes

from configs.load import config_hash, load_run
from launch.export import card_of
from launch.foreground import status_of
from launch.record import counted
from launch.report.metrics import TOKENS_PER_S, MetricsLog, Timeline, read_metrics
from launch.report.page import sample_records, write_report
from launch.resuming import standing
from launch.submit import list_jobs
from launch.targets import JobRecord
from trainer.data.prompts import Quarantine
from trainer.errors import BadRow
from trainer.loop.checkpoint import Checkpoints, TrainingState
from trainer.run_folder import RunFolder, write_json
from trainer.types import Cursor, Evaluation, SampleTokens, StepMetrics

CONFIG = """\
name: run
student: {model: {path: small, licence: mit}}
teacher: {model: {path: owner/Large}}
prompts: {path: rows.jsonl}
training: {steps: 8}
"""


def finished_run(path: Path) -> RunFolder:
    """A run folder as a run of eight steps leaves it, the student aside."""
    folder = RunFolder.create(path)
    folder.config.write_text(CONFIG)
    log, timeline = MetricsLog(folder), Timeline(folder)
    log.evaluation(Evaluation(0, 100, 6.31, 0.06, 900.0, 8.0))
    for step in range(1, 9):
        timeline.span("student", "wait", step * 10, step * 10 + 1)
        timeline.span("student", "train", step * 10 + 1, step * 10 + 10, f"step {step}")
        timeline.span("scorer-0", "score", step * 10, step * 10 + 5)
        values = {"train/loss": 5.0 / step, TOKENS_PER_S: 100.0, "train/tokens": 64.0, "step/sequences": 4.0}
        log.step(StepMetrics(step, values | {"train/loss_tokens": 32.0, "labels/bytes": 640.0}))
    log.event("redispatch", what="unit 3")
    log.evaluation(Evaluation(8, 100, 1.05, 0.56, 12.0, 8.0))
    numbers = np.array([0.125, 2.0], np.float32)
    sample = SampleTokens("0:1", np.array([5, 6, 7, 8], np.int32), np.array([1, 2]), -numbers, -numbers, numbers)
    shown = sample_records([sample], lambda token: f"<{token}>")
    write_json(folder.samples, {"before": shown, "after": shown})
    answers = {"prompts": ["why?"], "before": ["a"], "after": ["b"], "reference": ["c"], "teacher": ["d"]}
    write_json(folder.generations, answers)
    manifest = {"started": 1e9, "finished": 1.1e9, "total_steps": 8, "versions": {"torch": "2"}, "warnings": ["w"]}
    manifest |= {
        "self_tests": [{"name": "x", "passed": True, "numbers": {"kl": 0.1}}],
        "counters": {"trained_tokens": 9},
    }
    write_json(folder.manifest, manifest | {"roles": {"student": {"dtype": "float32"}}, "phases_began_s": {"a": 0.0}})
    write_json(folder.exit, {"code": 0, "reason": "finished", "time": 1.1e9})
    write_json(folder.lock_owner, {"pid": 1, "host": "elsewhere", "since": 1e9})
    Quarantine(folder.rejected).list(BadRow("rows.jsonl:1", "role: unknown", "{}"))
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    shards = checkpoints.begin(8)
    (shards / "zero").mkdir()
    for name in ("rank_0.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/mp_rank_00_model_states.pt"):
        (shards / name).write_bytes(b"weights")
    cursor = Cursor(epoch=0, position=8, seed=0)
    state = TrainingState(8, cursor, config_hash=config_hash(load_run(folder.config).run), world=1, non_finite_steps=0)
    checkpoints.commit(shards, state)
    return folder


def damage_files(folder: Path, damage: Damage) -> None:
    """One to three of the files, as values or as bytes."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".jsonl", ".yaml"))
    for file in damage.random.sample(files, k=damage.random.choice([1, 1, 2, 3])):
        if file.suffix == ".yaml" or damage.random.random() < 0.4:
            file.write_bytes(damage.bytes(file.read_bytes()))
            continue
        lines = file.suffix == ".jsonl"
        values = [json.loads(line) for line in (file.read_text().splitlines() if lines else [file.read_text()])]
        place = damage.random.randrange(len(values))
        values[place] = damage.tree(values[place])
        file.write_text("".join(json.dumps(value) + "\n" for value in values))


def read_damaged(whole: Path, here: Path, seed: int) -> None:
    shutil.rmtree(here / "runs", ignore_errors=True)
    folder = RunFolder(Path(shutil.copytree(whole, here / "runs" / "run")))
    damage_files(folder.path, Damage(seed))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert write_report(folder).read_text().endswith("</html>\n")
        assert list_jobs() == 0
        assert status_of(folder).state
        counted(read_metrics(folder))
    quarantine = Quarantine(folder.rejected)
    quarantine.list(BadRow("rows.jsonl:2", "why"))
    log, told = MetricsLog(folder), []
    log.resume(4)
    log.step(StepMetrics(5, {"train/loss": 1.0}))
    log.close()
    assert read_metrics(folder, tell=told.append).steps[-1].step == 5
    assert told == []
    with redirect_stderr(io.StringIO()):
        standing(load_run(whole / "config.yaml").run, folder, {})


def card_of_damaged(whole: Path, here: Path, seed: int) -> None:
    shutil.rmtree(here / "run", ignore_errors=True)
    folder = RunFolder(Path(shutil.copytree(whole, here / "run")))
    run = load_run(folder.config).run
    damage_files(folder.path, Damage(seed))
    assert card_of(folder, run, adapter=False, weights=folder.student).startswith("---\n")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished run and the record of a submission."""
    folder = finished_run(tmp_path / "whole")
    record = JobRecord(job="run-1", kind="local", name="run", folder=str(folder.path), handle="4194999 1.5")
    write_json(folder.path / "submission.json", asdict(record))
    return folder.path


@pytest.mark.timeout(600)
def test_damaged_records_end_neither_report_nor_list_nor_resuming(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read_damaged(whole, tmp_path, 0)
    ended = outcomes(lambda seed: read_damaged(whole, tmp_path, seed), range(100))
    assert ended["ok"] > 50, ended
    outcomes(lambda seed: card_of_damaged(whole, tmp_path, seed), range(50))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_damaged_records_end_neither_report_nor_list_nor_resuming(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes(lambda seed: read_damaged(whole, tmp_path, seed), range(1000, 4000))
    outcomes(lambda seed: card_of_damaged(whole, tmp_path, seed), range(1000, 2000))

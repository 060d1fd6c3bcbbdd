"""wandb, offline, with the library itself: what its file holds, and what a resumed run adds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from trackers_of import followed, step
from wandb_file import history, records

from launch.report.metrics import MetricsLog

pytest.importorskip("wandb")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("run/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def test_an_offline_run_and_the_one_that_goes_on_hold_each_step_once_under_one_id(tmp_path: Path) -> None:
    told: list[str] = []
    tracker = {"kind": "wandb", "project": "distil", "entity": "team", "tags": ["small"], "mode": "offline"}
    with followed(tmp_path, tracker, told) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        for number in range(1, 6):
            log.step(step(number, loss=float(number)))
        log.step(step(6, loss=math.nan))
        log.close()
    with followed(tmp_path, tracker, told, goes_on=True) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.resume(4)
        for number in range(5, 9):
            log.step(step(number, loss=-1.0))
        log.close()
    first, second = map(history, files(tmp_path))
    assert [(row["_step"], row["train/loss"]) for row in first[:-1]] == [(n, float(n)) for n in range(1, 6)]
    assert math.isnan(float(first[-1]["train/loss"]))
    assert [(row["_step"], row["train/loss"]) for row in second] == [(7, -1.0), (8, -1.0)]
    runs = [record.run for file in files(tmp_path) for record in records(file) if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.entity, run.display_name, tuple(run.tags)) for run in runs} == {
        ("distil", "team", "tiny", ("small",))
    }
    config = {item.key or "/".join(item.nested_key): item.value_json for item in runs[0].config.update}
    assert json.loads(config["training"])["steps"] == 9
    assert [exit_code(file) for file in files(tmp_path)] == [0, 0]
    assert told == [f"wandb: wandb sync {tmp_path}/run/wandb/offline-run-*"] * 2


def exit_code(file: Path) -> int:
    (ending,) = (record.exit for record in records(file) if record.HasField("exit"))
    return int(ending.exit_code)


def test_no_secret_of_the_environment_and_nothing_of_the_code_is_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = {"WANDB_API_KEY": "k" * 40, "HF_TOKEN": "hf_" + "q" * 30, "DATABASE_PASSWORD": "open-sesame-123"}
    for name, secret in planted.items():
        monkeypatch.setenv(name, secret)
    with followed(tmp_path, {"kind": "wandb", "mode": "offline"}, []) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        log.step(step(1))
        log.close()
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert files(tmp_path)[0] in written
    found = [
        (file, name) for file in written for name, secret in planted.items() if secret.encode() in file.read_bytes()
    ]
    assert found == []
    assert not [file for file in written if file.suffix == ".py"]

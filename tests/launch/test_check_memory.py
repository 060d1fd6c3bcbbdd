"""What `check` says of memory, as a person sees it: a line a role, beside what the machine has; and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hollow_models import LLAMA_1B, LLAMA_8B, hollow_folder

from cluster.placement.hardware import Hardware, Node
from launch.check.run import check

ROW = {"messages": [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "the quick fox"}]}
GIB = 2**30
LAPTOP = Node("laptop", num_cpus=4, memory_bytes=8 * GIB)
H100S = Node("big", num_cpus=64, gpus=("H100",) * 8, memory_bytes=1000 * GIB)
L4S = Node("small", num_cpus=64, gpus=("L4",) * 8, memory_bytes=1000 * GIB)
DISK = SimpleNamespace(total=10**12, used=0, free=10**12)
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    hollow_folder(folder / "8b", LLAMA_8B)
    hollow_folder(folder / "1b", LLAMA_1B)
    return folder


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What `check` returns and prints of a run on a machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("psutil.swap_memory", lambda: type("Swap", (), {"total": 0}))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: DISK)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 3)

    def look(machine: Node, student: Path, teacher: Path, *overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(Hardware, "local", classmethod(lambda cls: cls((machine,))))
        config = {
            "name": "sized",
            "folder": str(tmp_path / "out"),
            "student": {"model": {"path": str(student), "licence": "mit"}},
            "teacher": {"model": {"path": str(teacher), "licence": "mit"}},
            "prompts": {"path": str(tmp_path / "rows.jsonl")},
            "data": {"max_length": 2048},
            "training": {"steps": 2},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        code = check(tmp_path / "run.yaml", overrides)
        return code, capsys.readouterr().out

    return look


def test_a_run_that_fits_has_a_line_for_each_role(said: Said, models: Path) -> None:
    code, text = said(H100S, models / "1b", models / "8b", "student.ranks=4")
    assert code == 0, text
    assert re.search(r"ok +memory: +4 x student +\d+\.\d GB on each GPU \(.*optimizer \d\.\d GB", text)
    assert re.search(r"ok +memory: +1 x scorer +\d+\.\d GB on each GPU \(weights 16\.1 GB, ", text)
    assert "ok           memory: 5 GPUs needed, this machine has 8" in text
    assert "all processes together" in text
    assert not [line for line in text.splitlines() if "memory" in line and line.startswith(("warning", "problem"))]


def test_a_student_whose_optimizer_is_larger_than_its_gpu_is_refused_with_settings_that_fit(
    said: Said, models: Path
) -> None:
    code, text = said(H100S, models / "8b", models / "8b", "student.ranks=1")
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("problem") and "memory" in line]
    assert re.search(
        r"run\.yaml:1: student: on each GPU weights, optimizer and what else is counted exactly take 112\.4 GB, and "
        r"there are 84\.9 GB of a GPU of this machine; write student\.",
        line,
    )
    assert "student.offload: optimizer" in line
    assert "student.lora: {rank: 16}" in line


def test_a_teacher_larger_than_its_gpu_is_refused_with_the_parts_that_fit(said: Said, models: Path) -> None:
    code, text = said(L4S, models / "1b", models / "8b", "student.ranks=2", "teacher.scorer.dtype=float32")
    assert code == 2
    assert re.search(
        r"teacher\.scorer: on each GPU .* take 32\.1 GB, and there are .*gpu_memory_utilization 0\.9", text
    )
    assert "write teacher.scorer.tensor_parallel_size: 2" in text


def test_an_estimate_alone_refuses_nothing(said: Said, models: Path) -> None:
    code, text = said(L4S, models / "1b", models / "1b", "student.ranks=4", "training.micro_batch_tokens=16384")
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith("warning") and "student: on each GPU" in line]
    assert "by the estimate (which may be off by 25%), beside 23.6 GB of a GPU of this machine" in line
    assert "write training.micro_batch_tokens: 2048" in line


def test_a_laptop_is_asked_for_its_memory_and_a_run_without_its_gpus_for_nothing(said: Said, models: Path) -> None:
    code, text = said(LAPTOP, models / "1b", models / "8b", "student.ranks=2")
    assert code == 2
    assert re.search(r"problem +memory: all processes together: .* and there are 8\.6 GB of this machine", text)
    code, text = said(LAPTOP, models / "1b", models / "8b", "student.ranks=2", "accelerator=gpu")
    assert code == 0, text
    assert "GB on each GPU" in text
    assert "of this machine" not in text


def test_a_run_that_starts_elsewhere_is_not_measured_by_this_machine(
    said: Said, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    code, text = said(LAPTOP, models / "1b", models / "8b")
    assert code == 0, text
    assert "GB on each GPU" in text
    assert "of this machine" not in text

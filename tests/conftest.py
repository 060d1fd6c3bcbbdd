"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# `.venv/bin/python -m pytest` works without activating .venv: shellcheck, hadolint and `python` of tests are its own.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

# Under `nohup` or a shell's `&` SIGINT is ignored, and programs that inherit that could not be told to end by Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # a busy machine takes longer than Ray's own 30 s

LONGEST = (
    "e2e/test_runs.py",
    "launch/test_submit_stack.py",
    "e2e/test_vllm_runs.py",
    "e2e/test_stopping.py",
    "e2e/test_host_loss.py",
    "hosts/test_multi_host.py",
    "e2e/test_ensembles.py",
    "hosts/test_slurm.py",
    "e2e/test_tasks.py",
    "e2e/test_written_answers.py",
    "benchmarks/test_benchmarks_stack.py",
    "trainer/model/test_student.py",
    "e2e/test_on_policy.py",
    "e2e/test_given_ids.py",
    "e2e/test_api.py",
    "e2e/test_resuming.py",
    "hosts/test_doctor.py",
    "test_after_training.py",
    "test_notebooks.py",
)
"""Files of minutes, the longest first: workers take whole files, and wait for one that comes last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder, tied head, padded vocabulary."""
    from tiny_models import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller Llama folder with the same tokenizer."""
    from tiny_models import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "student", seed=2, num_hidden_layers=1)

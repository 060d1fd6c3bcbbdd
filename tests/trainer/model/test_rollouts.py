"""Terms on text that the student wrote, over real ranks: what they compare is the step, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_cases
from rollout_world import BUDGETS, CASES, train_by_hand
from safetensors.torch import load_file
from student_world import make_models

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def runs(world: Path) -> dict[tuple[int, str, int], Any]:
    """By number of ranks, case and budget, as rank 0 tells it."""
    found = {size: run_cases("rollout_cases", world=size, folder=world / str(size)) for size in (1, 2)}
    for ranks in found.values():
        for metrics in (rank["rollouts"] for rank in ranks):
            assert {key: one[0] for key, one in metrics.items()} == {
                key: one[0] for key, one in ranks[0]["rollouts"].items()
            }
    return {(size, *key): one for size, ranks in found.items() for key, one in ranks[0]["rollouts"].items()}


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_micro_batches_train_what_is_worked_out_by_hand(
    world: Path, runs: dict[tuple[int, str, int], Any], case: str
) -> None:
    rates = [metrics["train/learning_rate"] for metrics in runs[1, case, 4096][0]]
    weights, records = train_by_hand(world, case, rates)
    assert 0 < records[0]["train/policy_gradient_truncated"] < 1
    for key in ((size, case, budget) for size in (1, 2) for budget in BUDGETS):
        metrics, folder = runs[key]
        for ours, theirs in zip(metrics, records, strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=5e-4), key
            assert ours["train/skipped"] == 0
        exported = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            torch.testing.assert_close(exported[name].double(), weight, rtol=1e-3, atol=2e-5, msg=f"{key} {name}")
    assert runs[1, case, 48][0][0]["train/micro_batches"] > 2
    others, _ = train_by_hand(world, case, rates, baseline="group" if case == "batch" else "batch")
    away = max(float((others[name] - weight).abs().max()) for name, weight in weights.items())
    assert away > 5e-3, "another baseline trains other weights"

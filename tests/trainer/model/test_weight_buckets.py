"""Weights on their way to engines, from two ranks of real DeepSpeed at each stage of ZeRO."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_cases
from safetensors.torch import load_file
from student_world import make_models
from transformers import AutoModelForCausalLM
from weight_rank_cases import FORM, TEXT

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    return [rank["buckets"] for rank in run_cases("weight_rank_cases", world=2, folder=folder / "two")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_buckets_of_a_stage_are_the_weights_that_it_exports_each_once(
    pair: list[dict[Any, Any]], stage: int
) -> None:
    sent, folder, _, _ = pair[0][stage]
    assert len(sent) > 3
    names = [name for _, weights in sent for name in weights]
    assert len(set(names)) == len(names)
    exported = load_file(folder / "model.safetensors")
    assert set(names) == set(exported)
    for _, weights in sent:
        for name, array in weights.items():
            assert np.array_equal(array, exported[name].numpy()), name
    assert all(weights is None for _, weights in pair[1][stage][0]), "one rank sends"


def test_no_bucket_is_larger_than_asked_unless_it_is_one_weight(pair: list[dict[Any, Any]]) -> None:
    for num_bytes, weights in pair[0][3][0]:
        assert num_bytes == sum(array.nbytes for array in weights.values())
        assert num_bytes <= FORM.bucket_bytes or len(weights) == 1


def test_adapters_come_merged_with_what_lies_beside_them_and_no_weight_changes(pair: list[dict[Any, Any]]) -> None:
    sent, folder, _, unchanged = pair[0]["adapted"]
    exported = load_file(folder / "model.safetensors")
    weights = {name: array for _, bucket in sent for name, array in bucket.items()}
    kinds = {name.split(".")[-2] for name in weights}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, array in weights.items():
        assert np.array_equal(array, exported[name].numpy()), name
    assert unchanged
    assert pair[1]["adapted"][3]


@pytest.mark.parametrize("name", [1, 2, 3, "adapted"])
def test_the_probe_is_what_transformers_says_of_the_exported_student(pair: list[dict[Any, Any]], name: Any) -> None:
    _, folder, probed, _ = pair[0][name]
    assert np.array_equal(probed, pair[1][name][2])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(TEXT.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert np.abs(logprobs.numpy() - probed).max() < 1e-4
    assert np.abs(np.roll(logprobs.numpy(), 1) - probed).mean() > 0.1, "shifted by one it is another text"

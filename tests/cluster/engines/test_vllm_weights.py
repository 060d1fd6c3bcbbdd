"""New weights in a running vLLM engine, held against transformers; and what must be noticed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from label_oracle import VOCABULARY
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM
from vllm_process import vllm_process
from weight_cases import TEXT, buckets_of, changed, student, take_and_score, truth

from configs.models import LoRA, Trained
from trainer.loop.weight_sync import MAX_GAP
from trainer.types import probe_gap

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

EXACT = 1e-4
WRONG = 10 * MAX_GAP["float32"]


@pytest.fixture(scope="module")
def process():
    with vllm_process() as pool:
        yield pool


def greedy(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(TEXT[:20].astype(np.int64))[None]
    padding = list(range(VOCABULARY, model.config.vocab_size))
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, suppress_tokens=padding)
    return written[0, 20:].numpy()


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_an_engine_writes_with_the_weights_that_it_took_in(
    process: ProcessPoolExecutor, tmp_path: Path, family: str, tied: bool
) -> None:
    """Twice, so that layers which were packed for this processor once are packed anew; a tied head with them."""
    first, *others = (tiny_folder(tmp_path / str(seed), family, seed=seed, tied=tied) for seed in (1, 2, 3))
    updates = [buckets_of(student(folder), version) for version, folder in enumerate(others, start=5)]
    assert len(updates[0]) > 3
    before, *after = process.submit(take_and_score, first, updates).result()
    assert probe_gap(truth(first), before[0]) < EXACT
    for version, (folder, (scored, written, said)) in enumerate(zip(others, after, strict=True), start=5):
        assert probe_gap(truth(folder), scored) < EXACT
        assert probe_gap(before[0], scored) > WRONG, "stale weights would be seen"
        assert written.tolist() == greedy(folder).tolist()
        assert said == str(version)


def test_what_goes_wrong_with_weights_is_seen_on_the_probe(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The controls: a bucket that is ignored, a matrix that comes transposed, half of a fused layer."""
    first, second = (tiny_folder(tmp_path / str(seed), seed=seed, tied=True) for seed in (1, 2))
    update = buckets_of(student(second), 1)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    weight = next(bucket.weights[up] for bucket in update if up in bucket.weights)
    turned = np.ascontiguousarray(weight.T).reshape(weight.shape)
    ignored = [changed(bucket, down, None) for bucket in update]
    transposed = [changed(bucket, up, turned) if up in bucket.weights else bucket for bucket in update]
    half = [changed(bucket, up, None) for bucket in update]
    _, *seen = process.submit(take_and_score, first, [ignored, transposed, update, half, update]).result()
    for wrong in seen[:2]:
        assert probe_gap(truth(second), wrong[0]) > WRONG
    assert probe_gap(truth(second), seen[2][0]) < EXACT
    assert "only a part of the weights came of model.layers.0.mlp.gate_up_proj" in seen[3]
    assert probe_gap(truth(second), seen[4][0]) < EXACT, "a whole version mends it"


def test_frozen_weights_need_not_travel_and_adapters_come_merged(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", seed=1, tied=True)
    frozen = student(folder, trained=Trained(freeze=("embeddings", "model.layers.0.self_attn.k_proj.weight")))
    adapted = student(folder, trained=Trained(lora=LoRA(rank=4, target_modules=("q_proj",))))
    with torch.no_grad():
        for parameter in (p for p in frozen.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.normal_(0.0, 0.3)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    updates = [buckets_of(frozen, 1), buckets_of(adapted, 2)]
    names = [{name for bucket in update for name in bucket.weights} for update in updates]
    assert "model.embed_tokens.weight" not in names[0] | names[1]
    assert "model.layers.0.self_attn.k_proj.weight" in names[0], "it lies in one matrix with weights that moved"
    assert names[1] == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"}
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters()), "merging changes no weight"
    _, after, _ = process.submit(take_and_score, folder, updates).result()
    assert probe_gap(truth(frozen.causal), after[0]) < EXACT
    alone = process.submit(take_and_score, folder, updates[1:]).result()[1]
    assert probe_gap(truth(adapted.causal), alone[0]) < EXACT

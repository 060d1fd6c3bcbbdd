"""What a pass holds in memory, as the probe counts it, against what torch really keeps of the same pass."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from architectures import architecture_folder
from every_architecture import ARCHITECTURES, tiny_config
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from configs.models import EVERYTHING, LoRA, ModelSource, Trained
from trainer.model.load import build_on_meta, load_config, load_student
from trainer.model.memory_probe import pass_memory
from trainer.model.sizes import PassMemory, sizes_of

TOKENS = 96


def probed(folder: Path, **options: object) -> PassMemory | None:
    source = ModelSource(path=str(folder))
    settings = {"tokens": TOKENS, "longest": TOKENS, "dtype": torch.float32, **options}
    return pass_memory(source, load_config(source, role="student.model"), **settings)


def really_kept(folder: Path, *, trained: Trained = EVERYTHING) -> int:
    """Bytes of the different storages that torch saves for the backward pass, weights left out."""
    student = load_student(
        ModelSource(path=str(folder)),
        dtype=torch.float32,
        attention="sdpa",
        vocabulary_size=280,
        trained=trained,
        sharded=contextlib.nullcontext(),
    ).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in (*student.parameters(), *student.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    ids, places = torch.ones(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = student.causal.base_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_probe_counts_what_torch_keeps(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(tmp_path / family, family)
    found = probed(folder)
    assert found.saved == pytest.approx(really_kept(folder), rel=0.15)
    assert found.peak >= found.saved


def test_frozen_weights_spare_the_inputs_of_their_gradients(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "llama")
    adapters = Trained(LoRA(rank=4, target_modules=("q_proj",)))
    found = probed(folder, trained=adapters)
    assert found.saved < 0.9 * probed(folder).saved
    assert found.saved == pytest.approx(really_kept(folder, trained=adapters), rel=0.15)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "llama", num_hidden_layers=6)
    once, twice = probed(folder), probed(folder, tokens=2 * TOKENS)
    assert twice.saved == pytest.approx(2 * once.saved, rel=0.02)
    less = probed(folder, activation_checkpointing=True)
    assert less.saved < 0.2 * once.saved
    assert less.peak < 0.5 * once.peak
    assert probed(folder, dtype=torch.bfloat16).saved < 0.7 * once.saved


def test_scores_that_no_fused_kernel_hides_count_by_the_square_of_a_sequence(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "gemma2", "gemma2")
    whole, parts = probed(folder, tokens=384, longest=384), probed(folder, tokens=384, longest=96)
    layers, heads, copies = 2, 4, 2
    squares = 4 * layers * heads * copies * (384**2 - 4 * 96**2)
    assert whole.saved - parts.saved == pytest.approx(squares, rel=0.1)


def test_experts_that_are_chosen_by_numbers_are_left_to_a_formula(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "moe", "qwen2_moe")
    found = probed(folder)
    assert found is None or found.saved > 0


def test_sizes_tell_trained_from_frozen_and_a_head_of_its_own_from_a_shared_one(tmp_path: Path) -> None:
    def sizes(**options: object):
        source = ModelSource(path=str(tiny_folder(tmp_path / f"m{options}", **options)))
        return sizes_of(build_on_meta(source, load_config(source, role="m"), role="m"))

    tied, own = sizes(tied=True), sizes(tied=False)
    assert (tied.tied, own.tied) == (True, False)
    assert own.all - tied.all == tied.head == 320 * 64
    assert tied.cached == 2 * 2 * 2 * 32, "keys and values of two layers, two heads of 32"


@pytest.mark.parametrize("name", ["gemma4_text", "llama", "qwen3", "gemma2", "phi3"])
def test_what_a_token_leaves_in_a_cache_is_what_transformers_caches(name: str, tmp_path: Path) -> None:
    architecture_folder(tmp_path / name, name)  # Gemma 4 has layers of two widths
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    layers = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values.layers
    assert sizes_of(model).cached * 3 == sum(layer.keys.numel() + layer.values.numel() for layer in layers)


def test_sizes_are_told_of_every_architecture() -> None:
    told = 0
    for name in ARCHITECTURES:
        model = None
        with contextlib.suppress(Exception), torch.device("meta"):  # some are not built of the sizes of tests
            model = AutoModelForCausalLM.from_config(tiny_config(name))
        if model is not None:
            sizes = sizes_of(model)
            assert min(sizes.cached, sizes.kv_heads, sizes.ffn_width, sizes.head) > 0, name
            told += 1
    assert told > 150

"""Packed attention against unpacked runs of transformers' own eager attention, for every family."""

from __future__ import annotations

import pytest
import torch
from architectures import architecture_config
from tiny_models import FAMILIES, tiny_model

from trainer.errors import ConfigError
from trainer.model.attention import IMPLEMENTATIONS, border_arguments, told
from trainer.model.attention_choice import choose_attention, refuse_unpackable

REFUSED = {
    "mamba": "MambaForCausalLM does not let others compute its attention",
    "lfm2": "lfm2 uses conv; packed training covers causal attention",
    "gpt_oss": "gpt_oss uses s_aux",
    "llama4_text": "masked by chunked_overlay",
    "deepseek_v32": "not of the kind that transformers lets others compute",
}
LENGTHS = (70, 1, 9, 90)  # two of them longer than gemma2's sliding window of 64


def _sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 280, (length,), generator=generator) for length in LENGTHS]


def _packed_logits(model: torch.nn.Module, sequences: list[torch.Tensor], name: str = "sdpa") -> torch.Tensor:
    model.config._attn_implementation = IMPLEMENTATIONS[name]
    offsets = [0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    with told(**border_arguments(name, offsets, torch.device("cpu"))):
        return model(input_ids=torch.cat(sequences)[None], position_ids=positions[None], use_cache=False).logits[0]


def _separate_logits(model: torch.nn.Module, sequences: list[torch.Tensor]) -> torch.Tensor:
    model.config._attn_implementation = "eager"
    return torch.cat([model(input_ids=s[None], use_cache=False).logits[0] for s in sequences])


def _weighted(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return (logits * weights).sum()


@pytest.mark.parametrize("family", [*FAMILIES, "windowed_qwen2", "qwen2_moe", "phimoe"])
def test_packed_logits_and_gradients_equal_separate_eager_runs(family: str) -> None:
    if family == "windowed_qwen2":
        model = tiny_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    else:
        model = tiny_model(family)
    sequences = _sequences()
    gradients = []
    logits = []
    for run in (_packed_logits, _separate_logits):
        model.zero_grad()
        logits.append(run(model, sequences))
        _weighted(logits[-1]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    for packed, separate in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, separate, rtol=2e-3, atol=2e-3 * float(separate.abs().max()))


def test_without_borders_the_sequences_would_mix() -> None:
    model, sequences = tiny_model("llama"), _sequences()
    separate = _separate_logits(model, sequences)
    model.config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    mixed = model(input_ids=torch.cat(sequences)[None], position_ids=positions[None], use_cache=False).logits[0]
    assert (mixed - separate)[LENGTHS[0] :].abs().max() > 0.1
    torch.testing.assert_close(mixed[: LENGTHS[0]], separate[: LENGTHS[0]], rtol=1e-4, atol=1e-4)


def test_without_its_window_a_sliding_layer_would_differ() -> None:
    model, sequences = tiny_model("gemma2"), _sequences()
    separate = _separate_logits(model, sequences)
    model.config.sliding_window = 1000
    assert (_packed_logits(model, sequences) - separate).abs().max() > 1e-2


def test_gradient_checkpointing_keeps_the_borders() -> None:
    model, sequences = tiny_model("qwen3"), _sequences()
    expected = _separate_logits(model, sequences)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = _packed_logits(model, sequences)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    _weighted(packed).backward()
    checkpointed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _weighted(_separate_logits(model.eval(), sequences)).backward()
    for ours, plain in zip(checkpointed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.grad, rtol=2e-3, atol=2e-3 * float(plain.grad.abs().max()))


def _choose(
    requested: str, *, device_type: str = "cuda", dtype: str = "bfloat16", family: str = "llama", **changes
) -> str:
    config = tiny_model(family, **changes).config
    return choose_attention(requested, device_type=device_type, dtype=dtype, config=config)


def test_auto_takes_one_kernel_for_all_sequences_only_where_it_is_exact() -> None:
    assert _choose("auto") == "varlen"
    assert _choose("auto", device_type="cpu") == "sdpa"
    assert _choose("auto", dtype="float32") == "sdpa"
    assert _choose("auto", family="gemma2") == "sdpa"
    assert _choose("auto", attention_dropout=0.1) == "sdpa"
    assert _choose("sdpa") == "sdpa"


@pytest.mark.parametrize(
    ("requested", "changes", "words"),
    [
        ("varlen", {"device_type": "cpu"}, "accelerators in 16 bits"),
        ("varlen", {"family": "gemma2"}, "soft-cap"),
        ("flash_attention_2", {}, "flash_attn is not installed"),
        ("flash_attention_2", {"dtype": "float32"}, "16 bits"),
        ("fast", {}, "sdpa, varlen, flash_attention_2"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused_with_the_reason(requested: str, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _choose(requested, **changes)


def test_a_gpu_kernel_is_chosen_by_the_widths_that_layers_ask_for() -> None:
    def choose(name: str, requested: str = "auto") -> str:
        config = architecture_config(name)
        return choose_attention(requested, device_type="cuda", dtype="bfloat16", config=config)

    assert choose("gemma4_text") == "sdpa"  # heads of 256 and 512 dimensions
    assert choose("deepseek_v3") == "sdpa"  # keys of 16, values of 8
    assert choose("llama") == choose("olmo") == choose("opt") == "varlen"
    with pytest.raises(ConfigError, match=r"varlen: its heads may have 256 dimensions, this model's have 512"):
        choose("gemma4_text", "varlen")


def test_attention_that_packing_does_not_cover_is_refused() -> None:
    for name, words in REFUSED.items():
        with pytest.raises(ConfigError, match=words):
            choose_attention("auto", device_type="cpu", dtype="float32", config=architecture_config(name))
    model = tiny_model("llama")
    model.config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    with pytest.raises(ConfigError, match="s_aux"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), s_aux=torch.zeros(4))


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_without_the_window_of_its_configuration_a_layer_that_does_not_name_it_would_differ(family: str) -> None:
    model, sequences = tiny_model(family), _sequences()
    separate = _separate_logits(model, sequences)
    model.config.sliding_window = 1000
    assert (_packed_logits(model, sequences) - separate).abs().max() > 0.1


def test_a_rotation_that_depends_on_the_longest_position_of_a_packed_row_is_refused() -> None:
    config = tiny_model("llama").config
    refuse_unpackable(config, max_length=10_000)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    refuse_unpackable(config, max_length=512)
    with pytest.raises(ConfigError, match=r"data.max_length: 513 is over the 512 positions .*student.*\(dynamic\)"):
        refuse_unpackable(config, max_length=513)

"""What transformers' own code of an architecture does is what is trained: in packed rows, beyond every window."""

from __future__ import annotations

import pytest
import torch
from architectures import EVERY, WINDOW, architecture_config, architecture_model, long_rope

from trainer.errors import ConfigError, foreign_errors
from trainer.model import attention
from trainer.model.attention import IMPLEMENTATIONS, REFERENCE, border_arguments, told
from trainer.model.attention_choice import changing_lengths, packable_layers

LENGTHS = (70, 1, 9, 90)  # two of them beyond the window

WINDOWS: dict[str, set[int | None]] = {
    # its config has a window and its code ignores it
    "llama": {None},
    "olmo": {None},
    "granite": {None},
    "olmoe": {None},  # though its layers pass it on
    "nemotron": {None},  # its layers drop the arguments of the forward
    "opt": {None},
    "gpt2": {None},
    "gpt_neox": {None},
    "deepseek_v3": {None},
    "minicpm3": {None},
    "smollm3": {None},
    # its layers have the window
    "mistral": {WINDOW},
    "phi3": {WINDOW},
    "phimoe": {WINDOW},  # in its mask alone
    "qwen2_moe": {WINDOW, None},  # so here
    "cohere2": {WINDOW},
    "gemma2": {WINDOW, None},
    "gemma3_text": {WINDOW},
    "gemma4_text": {WINDOW, None},
    "starcoder2": {WINDOW},
    "exaone4": {WINDOW},
}


def _check(name: str, config: object) -> None:
    """Packed rows, and the reference in blocks, against separate runs of the model's eager attention."""
    model = architecture_model(config)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, 280, (length,), generator=generator) for length in LENGTHS]

    def separate(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        return torch.cat([model(input_ids=s[None], use_cache=False).logits[0] for s in sequences])

    with torch.no_grad():
        expected = separate("eager")
        torch.testing.assert_close(separate(REFERENCE), expected, rtol=1e-3, atol=1e-3, msg=f"{name}, reference")
        model.set_attn_implementation(IMPLEMENTATIONS["sdpa"])
        offsets = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        with told(**border_arguments("sdpa", offsets, torch.device("cpu"))):
            tokens = torch.cat(sequences)[None]
            packed = model(input_ids=tokens, position_ids=positions[None], use_cache=False).logits[0]
    torch.testing.assert_close(packed, expected, rtol=1e-3, atol=1e-3, msg=f"{name}, packed")


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_have_the_window_of_their_code_and_packed_rows_equal_separate_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 1000)  # three queries at a time
    config = architecture_config(name)
    assert config.sliding_window == WINDOW
    assert {layer.window for layer in packable_layers(config)} == WINDOWS[name]
    assert changing_lengths(config, role="student.model") == tuple(WINDOWS[name] - {None})
    _check(name, config)


def test_the_length_after_which_positions_are_rotated_otherwise_is_one_to_cross() -> None:
    config = architecture_config("phi3", **long_rope(100))
    assert changing_lengths(config, role="teacher.model") == (WINDOW, 100)


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_is_packed_rightly_or_refused(name: str) -> None:
    try:
        with foreign_errors("no tiny config"):  # each config has rules of its own
            config = architecture_config(name)
    except ConfigError as error:
        pytest.skip(str(error))
    try:
        packable_layers(config)
    except ConfigError:
        return
    _check(name, config)

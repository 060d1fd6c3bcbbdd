"""Whether a pruned folder computes what its layers computed before: the folder is loaded and compared with the source
whose other layers are skipped.

A file because it is the proof of `trainer/model/prune.py` and knows nothing of how a folder is cut. The source is built
without memory for its weights and borrows those of the pruned model, so both together take the memory of one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors
from trainer.model.load import load_causal

_NUM_TOKENS = 24


def refuse_difference(config: PreTrainedConfig, pruned: Path, layers: Sequence[int], *, refusal: str) -> None:
    """Raises `ConfigError`, beginning with `refusal`, where the folder `pruned` does not compute what `layers` of the
    model that `config` describes compute one after the other."""
    try:
        _compare(config, pruned, layers)
    except ConfigError as error:
        raise ConfigError(f"{refusal}: {error}") from error


def _compare(config: PreTrainedConfig, pruned: Path, layers: Sequence[int]) -> None:
    with foreign_errors("what was written cannot be loaded"):
        cut = load_causal(ModelSource(path=str(pruned)), role="what was written", dtype="auto").eval()
    with foreign_errors("both cannot be compared"):
        whole = _with_weights_of(cut, config, layers)
    _compare_values(whole, cut, layers)
    tokens = torch.arange(_NUM_TOKENS)[None] * 7 % cut.config.get_text_config().vocab_size
    with foreign_errors("both cannot be compared"), torch.inference_mode():
        _, kept = _layer_list(cut, len(layers))
        answers: list[Any] = []
        kept[-1].register_forward_hook(lambda module, given, answer: answers.append(answer))
        ours = cut(input_ids=tokens, use_cache=False).logits.float()
        _skip_layers(whole, config.num_hidden_layers, layers, like=answers[0])
        theirs = whole(input_ids=tokens, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()), equal_nan=True):
        raise ConfigError(f"logits differ by {float((ours - theirs).abs().max()):.2g}")


def _with_weights_of(cut: PreTrainedModel, config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedModel:
    """The model of `config` with the weights of `cut` at the places of `layers`; its other layers have none."""
    with init_empty_weights(include_buffers=False):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=cut.dtype).eval()
    path, places = _layer_list(whole, config.num_hidden_layers)
    short_path, _ = _layer_list(cut, len(layers))
    if path != short_path:
        raise ConfigError(f"its layers are at {path} before and at {short_path} after")
    state = {_at_old_place(name, path, layers): tensor for name, tensor in cut.state_dict().items()}
    missing, unexpected = whole.load_state_dict(state, strict=False, assign=True)
    dropped = tuple(f"{path}.{i}." for i in range(len(places)) if i not in layers)
    if wrong := [*unexpected, *(name for name in missing if not name.startswith(dropped))]:
        raise ConfigError(f"{wrong[0]} is in one of both only")
    return whole


def _skip_layers(whole: PreTrainedModel, num_layers: int, layers: Sequence[int], *, like: Any) -> None:
    """Let layers other than `layers` hand on what they get, in the form of another layer's answer `like`."""

    def hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (len(like) - 1)) if isinstance(like, tuple) else hidden_states

    _, places = _layer_list(whole, num_layers)
    for index in set(range(num_layers)) - set(layers):
        places[index].forward = hand_on


def _layer_list(model: PreTrainedModel, num_layers: int) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of the decoder layers: the outermost list of so many modules."""
    for name, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ConfigError(f"{type(model).__name__} has no list of {num_layers} layers")


def _at_old_place(name: str, path: str, layers: Sequence[int]) -> str:
    if not name.startswith(f"{path}."):
        return name
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{layers[int(index)]}.{rest}"


def _compare_values(whole: PreTrainedModel, cut: PreTrainedModel, layers: Sequence[int]) -> None:
    """Windows, scales and switches of the layers, which a short row of tokens need not show."""
    kinds, kept = (getattr(model.config.get_text_config(), "layer_types", None) for model in (whole, cut))
    if kinds is not None and [kinds[i] for i in layers] != list(kept):
        raise ConfigError(f"their kinds are {[kinds[i] for i in layers]} before and {list(kept)} after")
    _, before = _layer_list(whole, whole.config.num_hidden_layers)
    _, after = _layer_list(cut, len(layers))
    for new, old in enumerate(layers):
        parts = dict(before[old].named_modules())
        for name, part in after[new].named_modules():
            theirs, ours = _values(parts[name]), _values(part)
            for key in theirs.keys() | ours.keys():
                a, b = theirs.get(key), ours.get(key)
                if a != b and (a, b) != (old, new):  # its own index
                    raise ConfigError(f"{key} of layer {old} is {a} before and {b} after")


def _values(module: torch.nn.Module) -> dict[str, Any]:
    plain = int | float | str | None
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}

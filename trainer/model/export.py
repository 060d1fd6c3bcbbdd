"""The trained weights as a folder that transformers, peft and vLLM load: safetensors, config, generation config.

Sharded parameters are gathered one module at a time, kept by rank 0 only and written by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.errors import ConfigError, Diverged
from trainer.model.collectives import all_gather_objects
from trainer.model.generation_settings import consistent
from trainer.model.load import StudentModule
from trainer.model.zero import whole


def export_student(module: StudentModule, folder: Path, *, first_rank: bool, merge_adapter: bool = False) -> None:
    """Write the student in the dtype it is trained in; collective, only the first rank touches the folder.

    A full student, and with `merge_adapter` an adapted one, becomes an ordinary model folder (a tied key is written
    once). Adapters alone become a peft folder that names the base model. Raises `Diverged`, on all ranks and before
    anything is written, where a weight is not finite.
    """
    if merge_adapter and module.adapter is None:
        raise ConfigError("there is no adapter to merge: the student was trained without student.lora")
    if module.adapter is not None and not merge_adapter:
        weights = _collect(_parameters(module.adapter), lambda name: "lora_" in name, keep=first_rank)
        _refuse_non_finite(weights)
        if first_rank:
            module.adapter.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        return
    weights = _collect(whole_model(module), lambda name: True, keep=first_rank)
    _refuse_non_finite(weights)
    if first_rank:
        _skeleton(module.causal).save_pretrained(folder, state_dict=weights)


def _refuse_non_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Collective: the first rank has the weights, and all must hear of them."""
    floats = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    broken = [name for name, weight in floats.items() if not torch.isfinite(torch.stack(weight.aminmax())).all()]
    broken = all_gather_objects(broken)[0]
    if broken:
        raise Diverged(
            f"{len(broken)} of the student's weights hold NaN or infinity, first {broken[0]}; nothing is exported"
        )


Entry = tuple[str, list[torch.nn.Parameter], Callable[[], torch.Tensor]]
"""A name of the exported folder, the parameters its value needs whole, and the value."""


def whole_model(module: StudentModule) -> Iterator[Entry]:
    """All of an ordinary model, adapters merged into what they adapt; what is trained stays as it is."""
    return _parameters(module.causal) if module.adapter is None else _merged(module.causal)


def _parameters(model: torch.nn.Module) -> Iterator[Entry]:
    for name, parameter in model.named_parameters():
        yield name, [parameter], lambda parameter=parameter: parameter
    yield from _buffers(model)


def _buffers(model: torch.nn.Module) -> Iterator[Entry]:
    """What belongs to a checkpoint and has no gradient, such as the balancing bias of a mixture of experts. Every rank
    holds it whole."""
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, [], lambda buffer=buffer: buffer


def _merged(causal: torch.nn.Module) -> Iterator[Entry]:
    """Names of the base model; weights under an adapter become W + scaling * B A (LoRA, arXiv 2106.09685, eq. 3)."""
    modules = dict(causal.named_modules())
    for name, parameter in causal.named_parameters():
        if "lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".")
        layer = modules.get(owner.removesuffix(".base_layer"))
        if owner.endswith(".base_layer") and leaf == "weight" and isinstance(layer, BaseTunerLayer):
            needed = [parameter, *(p for n, p in layer.named_parameters() if "lora_" in n)]
            yield name.replace(".base_layer.", "."), needed, lambda p=parameter, a=layer: _with_adapter(p, a)
        else:
            yield name.replace(".base_layer.", "."), [parameter], lambda parameter=parameter: parameter
    for name, needed, value in _buffers(causal):
        yield name.replace(".base_layer.", "."), needed, value


def _with_adapter(weight: torch.Tensor, layer: BaseTunerLayer) -> torch.Tensor:
    (adapter,) = layer.active_adapters
    return weight + layer.get_delta_weight(adapter).to(weight.dtype)


def _collect(entries: Iterator[Entry], wanted: Callable[[str], bool], *, keep: bool) -> dict[str, torch.Tensor]:
    weights = {}
    with torch.no_grad():
        for name, needed, value in entries:
            if not wanted(name):
                continue
            with whole(needed):
                if keep:
                    weights[name] = value().detach().cpu().clone()
    return weights


def _skeleton(causal: torch.nn.Module) -> torch.nn.Module:
    """The same architecture without adapters and without memory: it knows how transformers names and splits files."""
    with torch.device("meta"):
        skeleton = type(causal)._from_config(causal.config, dtype=causal.dtype)
    skeleton.generation_config = consistent(causal.generation_config)
    return skeleton

"""What can be known of a model without loading a weight: that its files are there, its architecture and its size.

Sizes come from the architecture on the meta device, so a 70B model is measured on a laptop in a second or two.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from configs.schema import LoRA, ModelSource
from trainer.errors import ConfigError

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of one model."""

    architecture: str
    num_parameters: int
    num_adapter_parameters: int  # that LoRA would add; 0 without
    max_length: int | None  # tokens its positions are made for, where the architecture says


def find_model(source: ModelSource, *, path_name: str, needs_weights: bool) -> str:
    """Where the files are: "folder" or "hub". Raises `ConfigError` naming `path_name` for what is missing."""
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        _check_folder(source, folder, path_name=path_name, needs_weights=needs_weights)
        return "folder"
    if folder.exists():
        raise ConfigError(f"{path_name}: {folder} is a file; name the folder that holds config.json and the weights")
    if not _may_be_hub_name(source.path):
        raise ConfigError(f"{path_name}: there is no folder {folder}{_nearest(folder)}")
    if hub.HF_HUB_OFFLINE and not _cached(source, ("config.json",)):
        raise ConfigError(
            f"{path_name}: there is no folder {folder} here{_nearest(folder)}, and as a hub name {source.path} is not "
            "in the cache, while HF_HUB_OFFLINE is set; download it first, or name a local folder"
        )
    if hub.HF_HUB_OFFLINE and needs_weights and not _cached(source, SAFETENSORS):
        raise ConfigError(
            f"{path_name}: the weights of {source.path} are not in the hub cache and HF_HUB_OFFLINE is set"
        )
    return "hub"


def refuse_code_of_others(source: ModelSource, *, path_name: str) -> None:
    """Raises `ConfigError` where a model that may run code names code of another repository, which `revision` does not
    pin."""
    if not source.trust_remote_code:
        return
    file = cached_file(
        source.path, "config.json", revision=source.revision, _raise_exceptions_for_missing_entries=False
    )
    try:
        classes = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("auto_map", {})
    except (ValueError, AttributeError):
        raise ConfigError(f"{path_name}: config.json of {source.path} is no JSON object") from None
    names = [n for name in classes.values() for n in (name if isinstance(name, list) else [name]) if n is not None]
    foreign = next((name for name in names if "--" in name), None)
    if foreign is not None:
        raise ConfigError(
            f"{path_name}: the code of {source.path} lies in another repository ({foreign}), which revision does not "
            "pin. Download both, copy the code into the model's folder, and name that folder"
        )


def read_facts(source: ModelSource, *, path_name: str, lora: LoRA | None = None) -> ModelFacts:
    """Architecture and size. Raises `ConfigError` for what transformers cannot build."""
    refuse_code_of_others(source, path_name=path_name)
    config = _read_config(source, path_name=path_name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(f"{path_name}: {source.path} is no causal language model for transformers: {error}") from None
    return ModelFacts(
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_adapter_parameters=0 if lora is None else _adapter_parameters(model, lora, path_name=path_name),
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def licence_of(source: ModelSource) -> str | None:
    """What the configuration says, else the model card of a local folder."""
    card = Path(source.path).expanduser() / "README.md"
    if source.licence is not None or not card.is_file():
        return source.licence
    head = card.read_text(encoding="utf-8", errors="replace")[:10_000]
    found = re.search(r"^licen[sc]e:\s*([\w.-]+)\s*$", head.split("\n---", 1)[0], flags=re.MULTILINE)
    return found.group(1) if found else None


def _check_folder(source: ModelSource, folder: Path, *, path_name: str, needs_weights: bool) -> None:
    if source.revision is not None:
        raise ConfigError(
            f"{path_name}: {folder} is a local folder, which has no revision {source.revision!r}; remove it"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{path_name}: {folder} has no config.json, so it is no model in Hugging Face format")
    if not needs_weights:
        return
    index = folder / SAFETENSORS[1]
    if (folder / SAFETENSORS[0]).is_file():
        names = [SAFETENSORS[0]]
    elif index.is_file():
        names = _shards(index, path_name=path_name)
    else:
        raise ConfigError(f"{path_name}: {folder} has no model.safetensors{_conversion(folder)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{path_name}: {folder} lacks {len(missing)} weight files of its index, first {missing[0]}")
    for name in names:
        problem = _damage(folder / name)
        if problem:
            raise ConfigError(f"{path_name}: {folder / name} {problem}; copy or download it again")


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file, as far as its table of tensors says: 8 bytes of its length, the table, the
    tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(length)) if 8 + length <= size else {}
        whole = (
            8 + length + max((entry["data_offsets"][1] for name, entry in table.items() if name[0] != "_"), default=0)
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "is no safetensors file"
    return None if whole == size else f"has {size} bytes of {whole}"


def _conversion(folder: Path) -> str:
    """What to do with weights of another format, where the folder has any."""
    other = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if not other:
        return ""
    if other[0].endswith(".gguf"):
        return f"; {other[0]} has to be converted to safetensors first (transformers reads it with gguf_file=)"
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto', use_safetensors=False)"
    return (
        f"; {other[0]} is a pickle, which runs code when it is read, so it has to be converted to safetensors. Where "
        f'you trust whoever made it: python -c "from transformers import AutoModelForCausalLM; '
        f'{load}.save_pretrained({str(folder)!r})"'
    )


def _shards(index: Path, *, path_name: str) -> list[str]:
    """File names of an index; none may lead out of the folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{path_name}: {index} is no index of safetensors files") from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigError(f"{path_name}: {index} names a file outside of its folder: {outside[0]!r}")
    return names


def _read_config(source: ModelSource, *, path_name: str) -> Any:
    place = str(Path(source.path).expanduser()) if Path(source.path).expanduser().is_dir() else source.path
    try:
        return AutoConfig.from_pretrained(place, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        missing = "" if place != source.path or Path(place).is_dir() else f"there is no folder {place} here; "
        raise ConfigError(f"{path_name}: {missing}cannot read the configuration of {source.path}: {error}") from None


def _adapter_parameters(model: torch.nn.Module, lora: LoRA, *, path_name: str) -> int:
    """rank * (in + out) of every adapted linear layer; `all-linear` leaves the head out, as peft does."""
    head = model.get_output_embeddings()
    targets = lora.target_modules
    adapted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and (targets == "all-linear" or any(name == t or name.endswith("." + t) for t in targets))
    ]
    if not adapted:
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"student.lora.target_modules: no linear layer of {path_name} is named {list(targets)}; write all-linear, "
            f"or some of {known}"
        )
    return sum(lora.rank * (module.in_features + module.out_features) for module in adapted)


def _may_be_hub_name(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and not path.startswith((".", "~"))


def _cached(source: ModelSource, names: tuple[str, ...]) -> bool:
    return any(isinstance(try_to_load_from_cache(source.path, n, revision=source.revision), str) for n in names)


def _nearest(folder: Path) -> str:
    """Did you mean, among the folders beside it."""
    siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    found = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / found[0]}?" if found else ""

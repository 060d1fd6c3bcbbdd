"""What can be known of a model without loading a weight: that its files are there, its architecture and its size.

Sizes come from the architecture on the meta device, so a 70B model is measured on a laptop in a second or two.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from configs.models import EVERYTHING, ModelSource, Student
from trainer.errors import ConfigError
from trainer.model.config_bounds import config_file
from trainer.model.load import build_on_meta, load_config
from trainer.model.sizes import ModelSizes, sizes_of
from trainer.model.suitability import refuse_unsuitable
from trainer.model.trained import choose_trained
from trainer.model.weights import SAFETENSORS, read_table, refuse_other_tensors, shard_names, weight_files


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of one model."""

    architecture: str
    num_parameters: int
    num_adapter_parameters: int  # that LoRA would add; 0 without
    num_trained: int
    max_length: int | None  # tokens its positions are made for, where the architecture says
    sizes: ModelSizes | None = None  # with the adapters


def find_model(source: ModelSource, *, path_name: str, needs_weights: bool) -> str:
    """Where the files are: "folder" or "hub". Raises `ConfigError` naming `path_name` for what is missing."""
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        _check_folder(source, folder, path_name=path_name, needs_weights=needs_weights)
        return "folder"
    if folder.exists():
        raise ConfigError(f"{path_name}: {folder} is a file; name the folder that holds config.json and the weights")
    if not _may_be_hub_name(source.path):
        raise ConfigError(
            f"{path_name}: there is no folder {folder} (looked for {folder.absolute()}){_nearest(folder)}"
        )
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
    file = config_file(source, role=path_name)
    try:
        classes = {} if file is None else json.loads(file.read_text(encoding="utf-8")).get("auto_map", {})
    except (ValueError, AttributeError):
        raise ConfigError(f"{path_name}: config.json of {source.path} is no JSON object") from None
    names = [n for name in classes.values() for n in (name if isinstance(name, list) else [name]) if n is not None]
    foreign = next((name for name in names if "--" in name), None)
    if foreign is not None:
        raise ConfigError(
            f"{path_name}: the code of {source.path} lies in another repository ({foreign}), which revision does not "
            "pin. Download both, copy the code into the model's folder, and name that folder"
        )


def read_facts(
    source: ModelSource, *, path_name: str, student: Student | None = None, needs_weights: bool = False
) -> ModelFacts:
    """Architecture and size. Raises `ConfigError` for what transformers cannot build, for what cannot be trained as
    `student` says, and with `needs_weights` for weight files that are here and hold other tensors than the architecture
    has."""
    refuse_code_of_others(source, path_name=path_name)
    config = load_config(source, role=path_name)
    model = build_on_meta(source, config, role=path_name)
    if needs_weights:
        _check_tensors(source, model, path_name=path_name)
    if student is not None:
        refuse_unsuitable(model, student)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = EVERYTHING if student is None else student.trained
    with torch.device("meta"):
        choose_trained(model, trained, revision=None)
    sizes = sizes_of(model)
    return ModelFacts(
        architecture=type(model).__name__,
        num_parameters=num_parameters,
        num_adapter_parameters=sizes.all - num_parameters,
        num_trained=sum(sizes.trained),
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None),
        sizes=sizes,
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
        names = shard_names(index, role=path_name)
    else:
        raise ConfigError(f"{path_name}: {folder} has no model.safetensors{_conversion(folder)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{path_name}: {folder} lacks {len(missing)} weight files of its index, first {missing[0]}")
    for name in names:
        read_table(folder / name, role=path_name)


def _check_tensors(source: ModelSource, model: PreTrainedModel, *, path_name: str) -> None:
    """By the tables of the files; of a model that the hub has and this machine has not, nothing."""
    files = weight_files(source, role=path_name, download=False)
    shapes = {name: shape for file in files for name, shape in read_table(file, role=path_name).items()}
    if shapes:
        refuse_other_tensors(model, shapes, role=path_name, place=source.path)


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


def _may_be_hub_name(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and not path.startswith((".", "~"))


def _cached(source: ModelSource, names: tuple[str, ...]) -> bool:
    return any(isinstance(try_to_load_from_cache(source.path, n, revision=source.revision), str) for n in names)


def _nearest(folder: Path) -> str:
    """Did you mean, among the folders beside it."""
    siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    found = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / found[0]}?" if found else ""

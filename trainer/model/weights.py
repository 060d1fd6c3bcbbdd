"""The weight files of a model: where they are, which tensors their tables name, and whether those are the ones that the
architecture needs. A file because everyone who reads weights asks this, and the tables answer before a weight is read.

Libraries fill a tensor that is missing with random numbers, say so in a log, and go on: a teacher without its final
norm teaches, and every comparison with the same folder agrees with it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.models import ModelSource
from trainer.errors import ConfigError, foreign_errors

if TYPE_CHECKING:
    import torch

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> its shape."""

_LARGEST_TABLE = 100_000_000  # bytes; safetensors' own limit


def weight_files(source: ModelSource, *, role: str, download: bool = True) -> list[Path]:
    """The safetensors files of a model, from the hub where they are not here. Without `download`, none where they are
    not here. Raises `ConfigError` naming `role` for a model that has none."""
    from transformers.utils import cached_file  # here: tables are read where nothing else waits for this import
    from transformers.utils.hub import get_checkpoint_shard_files

    options = {"revision": source.revision, "local_files_only": not download}
    with foreign_errors(f"{role}: cannot read the weights of {source.path}"):
        for name in SAFETENSORS:
            found = cached_file(
                source.path,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
                **options,
            )
            if found is not None and name.endswith(".safetensors"):
                return [Path(found)]
            if found is not None:
                files, _ = get_checkpoint_shard_files(source.path, found, **options)
                return sorted({Path(file) for file in files})
    if not download:
        return []
    raise ConfigError(
        f"{role}: {source.path} has no model.safetensors, which hidden labels and evaluation read the head from. "
        "Convert it with transformers' save_pretrained"
    )


def weight_bytes(source: ModelSource) -> int:
    """Bytes of a model's weight files."""
    return sum(file.stat().st_size for file in weight_files(source, role="teacher.model"))


def read_table(file: Path, *, role: str) -> Shapes:
    """The tensors of a safetensors file by its table: 8 bytes of its length, the table, the tensors.

    Raises `ConfigError` where it is none, or was not copied whole.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(length)) if length <= min(size - 8, _LARGEST_TABLE) else {}
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ConfigError(f"{role}: {file} is no safetensors file; copy or download it again") from None
    if whole != size:
        raise ConfigError(f"{role}: {file} has {size} bytes of {whole}; copy or download it again")
    return shapes


def shard_names(index: Path, *, role: str) -> list[str]:
    """File names of an index of several files; none may lead out of the folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ConfigError(f"{role}: {index} is no index of safetensors files") from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigError(f"{role}: {index} names a file outside of its folder: {outside[0]!r}")
    return names


def refuse_other_tensors(model: torch.nn.Module, shapes: Shapes, *, role: str, place: str) -> None:
    """Raises `ConfigError` where files with these tensors lack some that `model` has, or hold them in other shapes.

    transformers itself decides, with its renaming, fusing, tying and leave to be absent: it loads tensors on the meta
    device, which have a shape and no numbers. How matrices of a quantised model are stored is up to the method, so of
    those only vectors and embeddings are compared.
    """
    import torch

    config = copy.deepcopy(model.config)
    quantised = is_quantised(config)
    if quantised:
        del config.quantization_config
    doing = f"{role}: {_gap(shapes) or 'the tensors'} of {place} cannot be made into {type(model).__name__}"
    with foreign_errors(doing, hint="copy or download the weights again"):
        _, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # so that they are named below
            use_safetensors=True,  # no file is read at all
            output_loading_info=True,
        )
    judged = _not_quantised(model) if quantised else None
    refuse_missing(
        (name for name in info["missing_keys"] if judged is None or name in judged), model, role=role, place=place
    )
    for name, stored, needed in sorted(info["mismatched_keys"]):
        if judged is None or name in judged:
            raise ConfigError(
                f"{role}: {name} of {place} has the shape {list(stored)}, and by its config.json "
                f"{type(model).__name__} needs {list(needed)}: they are of two models. Copy or download both again"
            )


def refuse_missing(names: Iterable[str], model: torch.nn.Module, *, role: str, place: str) -> None:
    """Raises `ConfigError` where transformers found tensors missing."""
    missing = sorted(names)
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        raise ConfigError(
            f"{role}: {place} lacks {missing[0]}{more} of {type(model).__name__}, which would be filled with random "
            "numbers. Copy or download the weights again"
        )


def _gap(names: Iterable[str]) -> str | None:
    """What is missing of the tensors of experts, which libraries join when they load them: the first of those that the
    neighbours have."""
    parts: dict[str, dict[str, set[str]]] = {}
    for name in names:
        if found := re.fullmatch(r"(.+\.\d+\..+)\.(\d+)\.(.+)", name):
            parts.setdefault(found[1], {}).setdefault(found[3], set()).add(found[2])
    for head, tails in parts.items():
        numbers = set().union(*tails.values())
        for tail, there in tails.items():
            if there != numbers:
                return f"without {head}.{min(numbers - there, key=int)}.{tail}, the tensors"
    return None


def is_quantised(config: Any) -> bool:
    """Whether the weights of a model are stored in fewer bits by a method of its own."""
    return getattr(config, "quantization_config", None) is not None


def _not_quantised(model: torch.nn.Module) -> set[str]:
    import torch

    embeddings = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)}
    return embeddings | {name for name, tensor in model.state_dict().items() if tensor.dim() == 1}

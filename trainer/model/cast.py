"""The weights of a model folder in another dtype: read, rounded and written one tensor at a time.

A safetensors file is 8 bytes of the length of its table, the table, and the tensors. The table is known before a
tensor is read, so no more than one tensor is in memory, however large the file is; safetensors' own `save_file` takes
a whole file at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from trainer.errors import ConfigError, foreign_errors
from trainer.model.weights import SAFETENSORS
from trainer.run_folder import read_json, write_json, write_text

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Tensors that are rounded; integers, truth values and floats of 8 bits stay as they are."""

CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Of dtypes that a folder can be written in, as safetensors names them."""

_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SHOWN = 5  # tensors of a message


@dataclass(slots=True)
class Rounding:
    """What rounding did, over all files of a folder."""

    num_cast: int = 0  # tensors that were stored otherwise
    num_values: int = 0
    num_zeroed: int = 0  # values that were not zero and are now
    beyond: list[str] = field(default_factory=list)  # tensors with a value that the dtype cannot hold, and that value
    kept: list[str] = field(default_factory=list)  # tensors that the architecture keeps in float32


def cast_folder(source: Path, target: Path, dtype: str, *, keeps: Callable[[str], bool]) -> Rounding:
    """Write the safetensors files of `source` to `target` with floats in `dtype`, a key of `CODES`; tensors for which
    `keeps(name)` stay as they are stored. The index of several files and the dtype of config.json follow.

    Raises `ConfigError`, naming the tensors, where a value is beyond the range of `dtype` or was not finite before:
    it would become infinity, and the model's answers something else.
    """
    rounding = Rounding()
    for file in sorted(source.glob("*.safetensors")):
        with foreign_errors(f"cannot write {file} in {dtype}"):
            _cast_file(file, target / file.name, CODES[dtype], keeps, rounding)
    if rounding.beyond:
        raise ConfigError(_refusal(dtype, rounding.beyond))
    index, config = target / SAFETENSORS[1], target / "config.json"
    if index.is_file():
        _write_total_size(index)
    if config.is_file():
        # not write_json: a number such as Infinity, which JSON lacks and Python reads, must stay
        changed = _with_dtype(json.loads(config.read_text(encoding="utf-8")), dtype, top=True)
        write_text(config, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
    return rounding


def kept_in_float32(model: PreTrainedModel, dtype: str) -> Callable[[str], bool]:
    """Whether transformers would load a tensor of this name in float32 though `dtype` is asked for: the balancing bias
    of a mixture of experts, for example. `model` may be on the meta device."""
    strict = model._keep_in_fp32_modules_strict or ()
    names = {"float32": (), "bfloat16": (*strict,), "float16": (*strict, *(model._keep_in_fp32_modules or ()))}[dtype]
    if not names:
        return lambda name: False
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names))
    return lambda name: pattern.search(name) is not None


def _cast_file(source: Path, target: Path, code: str, keeps: Callable[[str], bool], rounding: Rounding) -> None:
    with safe_open(source, framework="pt") as tensors, target.open("wb") as file:
        codes = {}
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            stored = tensors.get_slice(name).get_dtype()
            kept = stored in FLOATS and stored != code and keeps(name)
            rounding.kept += [name] if kept else []
            codes[name] = code if stored in FLOATS and not kept else stored
        order = sorted(codes, key=lambda name: (-_SIZES.get(codes[name], 1), name))  # aligned, as safetensors does it
        shapes = {name: tensors.get_slice(name).get_shape() for name in order}
        _write_table(file, {name: (codes[name], shapes[name]) for name in order}, tensors.metadata())
        for name in order:
            value = tensors.get_tensor(name)
            if codes[name] in FLOATS:
                value = _round(name, value, FLOATS[codes[name]], rounding)
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_table(file: BinaryIO, entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> None:
    table: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    at = 0
    for name, (code, shape) in entries.items():
        size = _SIZES.get(code, 1)
        for length in shape:
            size *= length
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _round(name: str, value: torch.Tensor, dtype: torch.dtype, rounding: Rounding) -> torch.Tensor:
    rounded = value.to(dtype)
    rounding.num_cast += rounded.dtype != value.dtype
    rounding.num_values += value.numel()
    if not value.numel():
        return rounded
    if not _finite(value):
        raise ConfigError(f"{name} holds NaN or infinity; look at the losses in the report")
    if not _finite(rounded):
        rounding.beyond.append(f"{name} ({float(value.abs().max()):.4g})")
    elif rounded.dtype != value.dtype:
        rounding.num_zeroed += int(torch.count_nonzero(value) - torch.count_nonzero(rounded))
    return rounded


def _finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(value.aminmax())).all())  # NaN comes through aminmax


def _refusal(dtype: str, beyond: Iterable[str]) -> str:
    names = list(beyond)
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    weights = "a tensor has" if len(names) == 1 else f"{len(names)} tensors have"
    return (
        f"{dtype} holds numbers up to {torch.finfo(getattr(torch, dtype)).max:.5g}, and {weights} larger ones, which "
        f"would become infinity: {', '.join(names[:_SHOWN])}{more}. Choose "
        + ("bfloat16 or float32" if dtype == "float16" else "float32")
    )


def _write_total_size(index: Path) -> None:
    """transformers plans with it."""
    content = read_json(index)
    size = sum(file.stat().st_size - _table_bytes(file) for file in index.parent.glob("*.safetensors"))
    write_json(index, content | {"metadata": {**content.get("metadata", {}), "total_size": size}})


def _table_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _with_dtype(config: dict[str, Any], dtype: str, *, top: bool) -> dict[str, Any]:
    """The same configuration, with the dtype in it and in the parts that name one (`text_config`). transformers before
    5 wrote `torch_dtype`, and vLLM reads either."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or (["dtype"] if top else [])
    parts = {k: _with_dtype(part, dtype, top=False) for k, part in config.items() if isinstance(part, dict)}
    return config | {k: v for k, v in parts.items() if k != "quantization_config"} | dict.fromkeys(keys, dtype)

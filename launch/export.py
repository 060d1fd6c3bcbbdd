"""`stillhouse export`: the student of a run as a self-contained folder with its model card, loaded once as a test.

<run>/student  --base + adapter merged?-->  --copy, or cast-->  .<target>....  --card, load, compare-->  <target>
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import peft
from safetensors import safe_open
from transformers import AutoTokenizer

from configs.load import load_run
from configs.models import ModelSource
from configs.rules import teachers_by_place
from configs.schema import Run
from launch.export_check import ADAPTER, Change, base_of, compare, verify
from launch.files import copy_files, files_in
from launch.model_folder import licence_of
from launch.report.artifacts import read_manifest
from launch.report.metrics import read_metrics
from launch.report.model_card import model_card
from trainer.data.chat import Template
from trainer.errors import ConfigError, foreign_errors
from trainer.model.cast import cast_folder, kept_in_float32
from trainer.model.generation_settings import consistent
from trainer.model.load import build_on_meta, load_config
from trainer.run_folder import RunFolder, new_folder, read_json, write_json, write_text

DType = Literal["bfloat16", "float16", "float32"]
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def export(run_folder: Path, target: Path, merge_adapter: bool, dtype: DType | None = None) -> None:
    """Write `target`: a whole model, or a LoRA adapter as it is; with `merge_adapter` base and adapter as one model;
    with `dtype` in that dtype, in place of the one it was trained in.

    `target` must not exist or be empty; it appears complete or not at all. Raises ConfigError for a folder without an
    exported student, a target in use, `merge_adapter` without an adapter, a student that does not load, a value that
    `dtype` cannot hold, and an export that does not compute what the student does.
    """
    if dtype not in (None, *get_args(DType)):
        raise ConfigError(f"export: there is no dtype {dtype!r}; write one of {', '.join(get_args(DType))}")
    folder = RunFolder(run_folder)
    is_adapter = _check(folder, target, merge_adapter=merge_adapter)
    run = load_run(folder.config).run
    adapter = is_adapter and not merge_adapter
    with contextlib.ExitStack() as stack:
        working = stack.enter_context(new_folder(target))
        source = folder.student
        if is_adapter and merge_adapter:
            source = Path(stack.enter_context(TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)))
            _merge(folder, source, run, dtype="auto" if dtype is None else "float32")
        notes = _write(source, working, run, dtype)
        write_text(working / "README.md", card_of(folder, run, adapter=adapter, weights=working, rounded_from=source))
        for _, file in files_in(working, subject="export"):
            file.chmod(0o644)  # safetensors writes for its owner alone, and a server is somebody else
        verify(working, run)
        if dtype is not None and notes:
            notes += [_told(compare(source, working, run, dtype=dtype))]
    what = "adapter" if adapter else "model"
    print(f"{target}: {what} in {stored_dtype(target)}, tokenizer and model card; it loads")
    print("".join(f"  {note}\n" for note in notes), end="")


def _write(source: Path, working: Path, run: Run, dtype: DType | None) -> list[str]:
    """Copy the folder, the weights in `dtype`; returns what is to be told of rounding, nothing where there was none."""
    copy_files(source, working, subject="export")
    if dtype is None or stored_dtype(source) == dtype:
        return []
    model = None
    if not (source / ADAPTER).exists():
        student = ModelSource(path=str(source), trust_remote_code=run.student.model.trust_remote_code)
        model = build_on_meta(student, load_config(student, role="export"), role="export")
    keeps = (lambda name: False) if model is None else kept_in_float32(model, dtype)
    before = stored_dtype(source)
    try:
        rounding = cast_folder(source, working, dtype, keeps=keeps)
    except ConfigError as error:
        raise ConfigError(f"export: {error}") from None
    notes = [f"{rounding.num_cast} tensors were {before}"]
    if rounding.num_zeroed:
        share = rounding.num_zeroed / rounding.num_values
        notes += [f"{rounding.num_zeroed:,} values ({share:.2g} of all) are too small for {dtype} and became 0"]
    if rounding.kept:
        notes += [f"{len(rounding.kept)} stay as they were, as the architecture asks, first {rounding.kept[0]}"]
    return notes


def _told(change: Change) -> str:
    return (
        f"on {change.num_tokens} tokens of a test text: KL to the student before {change.kl:.2g} nats per token, "
        f"the same first choice on {change.agreement:.0%}"
    )


def stored_dtype(folder: Path) -> str:
    """What the weights of a folder are stored in, the commonest first: `bfloat16`, `bfloat16 and float32`; empty where
    it holds none. Raises ConfigError for what is no safetensors file."""
    sizes: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with foreign_errors(f"cannot read {path}"), safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_slice(name)
                sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return " and ".join(DTYPES.get(name, name.lower()) for name, _ in sizes.most_common())


def card_of(folder: RunFolder, run: Run, *, adapter: bool, weights: Path, rounded_from: Path | None = None) -> str:
    """The model card of what a run folder holds, and of weights that are, or come, beside it."""
    stored, trained = stored_dtype(weights), "" if rounded_from is None else stored_dtype(rounded_from)
    return model_card(
        run,
        manifest=read_manifest(folder),
        records=read_metrics(folder),
        adapter=adapter,
        stored_dtype=stored if trained in ("", stored) else f"{stored}, rounded from {trained} when it was exported",
        licences={
            "student": licence_of(run.student.model),
            **{place: licence_of(teacher.model) for place, teacher in teachers_by_place(run).items()},
        },
    )


def complete_student(folder: Path, run: Run, *, stop_ids: Iterable[int]) -> None:
    """Add what ranks do not know: the tokens that end an answer now, and where the base of an adapter is."""
    generation, adapter = folder / "generation_config.json", folder / "adapter_config.json"
    if generation.exists():
        settings = read_json(generation)
        known = settings.get("eos_token_id")
        known = known if isinstance(known, list) else [] if known is None else [known]
        ids = list(dict.fromkeys([*stop_ids, *known]))
        write_json(generation, settings | {"eos_token_id": ids[0] if len(ids) == 1 else ids})
    if adapter.exists():  # the rank may have read a copy on its own node
        place = Path(run.student.model.path).expanduser()
        base = str(place.absolute()) if place.is_dir() else run.student.model.path  # a hub name stays
        write_json(adapter, read_json(adapter) | {"base_model_name_or_path": base})


def _check(folder: RunFolder, target: Path, *, merge_adapter: bool) -> bool:
    """Whether the student is an adapter; raises before anything is written."""
    if not folder.config.exists():
        raise ConfigError(f"export: {folder.path} is no run folder, it has no config.yaml")
    is_adapter = (folder.student / ADAPTER).exists()
    complete = is_adapter or (folder.student / "config.json").exists()
    if not complete or not any(folder.student.glob("*.safetensors")):
        raise ConfigError(
            f"export: {folder.path} holds no student yet; let the run come to its end: stillhouse train {folder.config}"
        )
    manifest = read_manifest(folder)
    if manifest and manifest.get("finished") is None:  # it was finished once, and is being made longer
        raise ConfigError(
            f"export: the run in {folder.path} is not at its end, and {folder.student} is of an earlier one: let it "
            f"come to its end: stillhouse train {folder.config}"
        )
    if merge_adapter and not is_adapter:
        raise ConfigError("export: --merge-adapter needs a student trained with LoRA, this one is whole already")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"export: {target} exists and is not empty; name a new folder")
    return is_adapter


def _merge(folder: RunFolder, working: Path, run: Run, *, dtype: str) -> None:
    """Base weights + adapter as one model, added in `dtype`; everything that is no adapter file is copied."""
    student = folder.student
    adapted = peft.PeftModel.from_pretrained(base_of(student, run, dtype=dtype), student)
    merged = adapted.merge_and_unload()
    merged.generation_config = consistent(merged.generation_config)
    merged.save_pretrained(working)
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=run.student.model.trust_remote_code)
    written = read_manifest(folder).get("data", {}).get("stop_ids", ())
    complete_student(working, run, stop_ids=dict.fromkeys([*Template.of(tokenizer).stop_ids, *written]))
    skipped = {ADAPTER, "README.md"}
    for name, file in files_in(student, subject="export"):
        of_adapter = name in skipped or name.startswith("adapter_model")
        if file.parent == student and not of_adapter and not (working / name).exists():
            shutil.copy2(file, working / name)

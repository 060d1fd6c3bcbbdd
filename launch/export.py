"""`stillhouse export`: the student of a run as a self-contained folder with its model card, loaded once as a test.

<run>/student  --copy, or base + adapter merged-->  .<target>.tmp-...  --card, load-->  rename to <target>
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load_run
from configs.rules import teachers_by_place
from configs.schema import Run
from launch.files import copy_files, files_in
from launch.model_folder import licence_of
from launch.report.artifacts import read_manifest
from launch.report.metrics import read_metrics
from launch.report.model_card import model_card
from trainer.data.chat import Template
from trainer.errors import ConfigError, foreign_errors
from trainer.model.generation_settings import consistent
from trainer.run_folder import RunFolder, new_folder, read_json, write_json, write_text

ADAPTER = "adapter_config.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def export(run_folder: Path, target: Path, merge_adapter: bool) -> None:
    """Write `target`: a whole model, or a LoRA adapter as it is; with `merge_adapter` base and adapter as one model.

    `target` must not exist or be empty; it appears complete or not at all. Raises ConfigError for a folder without an
    exported student, a target in use, `merge_adapter` without an adapter, and a student that does not load.
    """
    folder = RunFolder(run_folder)
    is_adapter = _check(folder, target, merge_adapter=merge_adapter)
    run = load_run(folder.config).run
    adapter = is_adapter and not merge_adapter
    with new_folder(target) as working:
        if is_adapter and merge_adapter:
            _merge(folder, working, run)
        else:
            copy_files(folder.student, working, subject="export")
        write_text(working / "README.md", card_of(folder, run, adapter=adapter, weights=working))
        (working / "README.md").chmod(0o644)
        verify(working, run, adapter=adapter)
    what = "adapter" if adapter else "model"
    print(f"{target}: {what} in {stored_dtype(target)}, tokenizer and model card; it loads")


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


def card_of(folder: RunFolder, run: Run, *, adapter: bool, weights: Path) -> str:
    """The model card of what a run folder holds, and of weights that are, or come, beside it."""
    return model_card(
        run,
        manifest=read_manifest(folder),
        records=read_metrics(folder),
        adapter=adapter,
        stored_dtype=stored_dtype(weights),
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


def verify(model_folder: Path, run: Run, *, adapter: bool) -> None:
    """Load the folder as a user would and predict one token. Raises ConfigError with what is wrong."""
    trust = run.student.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=trust)
        if adapter:
            model = peft.PeftModel.from_pretrained(_base(model_folder, run), model_folder)
            missing: list[str] = []
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                model_folder, dtype="auto", trust_remote_code=trust, use_safetensors=True, output_loading_info=True
            )
            missing = sorted(loading["missing_keys"])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"export: transformers does not load the student: {error}") from error
    if missing:
        raise ConfigError(f"export: the student lacks {len(missing)} weights, first {missing[0]}")
    token_ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model.eval()(token_ids).logits
    if not torch.isfinite(logits).all():
        raise ConfigError("export: the student's logits are not finite; look at the losses in the report")


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


def _merge(folder: RunFolder, working: Path, run: Run) -> None:
    """Base weights + adapter as one model; everything that is no adapter file is copied."""
    student = folder.student
    adapted = peft.PeftModel.from_pretrained(_base(student, run), student)
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


def _base(adapter: Path, run: Run) -> Any:
    """The base model of an adapter, in the dtype it is stored in."""
    name = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    source = run.student.model
    try:
        return AutoModelForCausalLM.from_pretrained(
            name or source.path,
            revision=source.revision,
            dtype="auto",
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"export: the base model {name or source.path} of the adapter does not load: {error}"
        ) from None

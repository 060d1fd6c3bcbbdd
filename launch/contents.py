"""What the inputs of a run hold, as short texts by place: a checkpoint keeps them, and a run that goes on compares.

    prompts, data.evaluation             every file of rows; of a dataset of the hub some rows and their number
    teacher.model/<file>                 config, tokenizer and generation settings, code, weights; of the hub its commit
    student.model/<file>                 config, code, weights
    teacher.chat_template                the text that is used
    labels, answers, engine code         the file of a plug-in that is not Stillhouse's own
    student.dtype, teacher.<role>.dtype  what `auto` was made of

Where things lie does not count, so a moved folder is the same. The view is that of the machine the controller runs on;
nodes are compared with it by `cluster/preflight/nodes.py`. How much is read, and what that misses:
`trainer/data/content.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.model_files import PLACES as WEIGHT_PLACES
from cluster.model_files import WHOLE_BYTES as WHOLE_WEIGHTS
from cluster.model_files import find_folder
from cluster.runtime import ROLLOUT
from configs.models import ModelSource
from configs.paths import is_url
from configs.prompts import Dataset
from configs.rules import held_out_by_place, prompts_by_place, teacher_place, teachers_by_place
from configs.schema import Run
from trainer.data.cache import PLACES, WHOLE_BYTES
from trainer.data.content import file_content, files_below, folder_content
from trainer.data.local_files import local_files
from trainer.data.remote_files import identity
from trainer.data.row_files import open_raw_rows, remote_files
from trainer.data.stream_files import stream_files
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from cluster.placement.resolve import Resolved
    from trainer.loop.inputs import Inputs

WEIGHTS = ".safetensors"
TOKENIZER_FILES = (".json", ".jinja", ".model", ".tiktoken", ".py")
TOKENIZER_NAMES = ("vocab.txt", "merges.txt")
STUDENT_NAMES = ("config.json", "generation_config.json")
SAMPLED_ROWS = 512
LOOKED_AFTER = 64  # files of a stream whose servers are asked whether they changed
CODE = " code"


def contents_of(run: Run, inputs: Inputs) -> dict[str, str]:
    """Everything but what the devices decide. Raises `ConfigError` for what cannot be read."""
    try:
        return dict(_contents(run, inputs))
    except OSError as error:
        raise ConfigError(f"cannot read an input of the run: {error}") from None


def dtypes_of(run: Run, resolved: Resolved) -> dict[str, str]:
    """What the devices of this start made of `auto`."""
    engines = {
        "rollouts.dtype"
        if plan.role == ROLLOUT
        else f"{teacher_place(run, plan.teacher)}.{plan.role}.dtype": plan.dtype
        for plan in resolved.engines
    }
    return {"student.dtype": resolved.student.dtype, **engines}


def changes(before: Mapping[str, str], now: Mapping[str, str], run: Run) -> tuple[list[str], list[str]]:
    """What is not as it was: what decides how the run goes on; and what a checkpoint makes up for, or people mend."""
    decisive, others = [], []
    for place in dict.fromkeys([*before, *now]):
        was, found = before.get(place, "not there"), now.get(place, "not there")
        if was != found:
            text = f"{place}{_where(place, run)}: {found}, was {was}"
            (decisive if _decides(place, run) else others).append(text)
    return decisive, others


def _decides(place: str, run: Run) -> bool:
    """Weights that are all trained lie in the checkpoint, frozen ones do not. Code is mended between starts."""
    if place.startswith("student.model/") and place.endswith(WEIGHTS):
        return not run.student.trained.everything
    return not place.endswith(CODE)


def _where(place: str, run: Run) -> str:
    paths: dict[str, str | None] = {"student.model": run.student.model.path}
    paths |= {name: dataset.name for name, dataset in (prompts_by_place(run) | held_out_by_place(run)).items()}
    for name, teacher in teachers_by_place(run).items():
        paths |= {f"{name}.model": teacher.model.path, f"{name}.chat_template": teacher.chat_template}
    path = paths.get(place.partition("/")[0])
    return "" if path is None else f" ({path})"


def _contents(run: Run, inputs: Inputs) -> Iterator[tuple[str, str]]:
    for place, dataset in (prompts_by_place(run) | held_out_by_place(run)).items():
        yield from _rows(place, dataset)
    for place, teacher in teachers_by_place(run).items():
        yield from _model(f"{place}.model", teacher.model)
    yield from _model("student.model", run.student.model)
    for task in run.resolved_tasks().values():
        for name in task.teachers:
            template = inputs.tasks[task.name].templates[name]
            texts = (template.text or "") + (template.with_tools or "")
            yield f"{teacher_place(run, name)}.chat_template", _digest(texts)
    if inputs.vocabulary.others:  # otherwise the student's tokenizer is the teacher's
        student = inputs.first.template
        yield "student.tokenizer", _digest(f"{inputs.vocabulary.fingerprint} {student.text} {student.with_tools}")
    for place, station, choice in run.choices():
        kind = station.kind_of(choice)
        found = importlib.util.find_spec(kind) if "." in kind else None
        if found is not None and found.origin is not None:
            yield place + CODE, file_content(Path(found.origin), whole_bytes=WHOLE_BYTES, places=PLACES)


def _rows(place: str, dataset: Dataset) -> Iterator[tuple[str, str]]:
    if dataset.streaming:
        yield from _stream(place, dataset)
        return
    for number, path in enumerate(dataset.paths, start=1):  # none for a fraction of other rows
        yield from _source(place if len(dataset.paths) == 1 else f"{place}/{number}", path, dataset)


def _source(place: str, path: str, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Of one path of a dataset; the files of a pattern by their numbers, since what they are called does not count."""
    folder = Path(path).expanduser()
    files = [file.path for file in local_files(path) or remote_files(path)]
    if len(files) == 1:
        yield place, file_content(files[0], whole_bytes=WHOLE_BYTES, places=PLACES)
    elif files or folder.is_dir():
        named = {f"{number:05}": file for number, file in enumerate(files, start=1)} or _row_files(folder)
        found = folder_content(named, whole_bytes=WHOLE_BYTES, places=PLACES)
        yield from ((f"{place}/{name}", content) for name, content in found.items())
    else:
        rows = open_raw_rows(dataset.model_copy(update={"path": path}))
        chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(int))
        lines = [json.dumps(rows.raw(int(row)), sort_keys=True, default=str) for row in chosen]
        yield place, f"{len(rows)} rows, {_digest(chr(10).join(lines))}"


def _stream(place: str, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Files here as those of rows that are read whole; of others, which are not fetched, what their servers say."""
    files = stream_files(dataset)
    here = {f"{number:05}": Path(file.path) for number, file in enumerate(files, start=1) if not is_url(file.path)}
    found = folder_content(here, whole_bytes=WHOLE_BYTES, places=PLACES)
    yield from ((f"{place}/{name}", content) for name, content in found.items())
    away = [file.path for file in files if is_url(file.path)]
    if away:
        told = [identity(url) for url in away[:LOOKED_AFTER]]
        yield place, f"{len(away)} files, {_digest(json.dumps([len(away), told], sort_keys=True))}"


def _row_files(folder: Path) -> dict[str, Path]:
    """Without what `datasets` leaves in a folder of save_to_disk when somebody sorts, maps or filters its rows."""
    return {
        name: path
        for name, path in files_below(folder).items()
        if not (path.match("cache-*.arrow") and (path.parent / "state.json").exists())
    }


def _model(place: str, source: ModelSource) -> Iterator[tuple[str, str]]:
    folder = find_folder(source.path, source.revision)
    if folder is None:
        yield place, f"{source.path}, revision {source.revision}"
        return
    if folder.parent.name == "snapshots":  # of the hub's cache
        yield place, f"commit {folder.name}"
        return
    files = {name: path for name, path in files_below(folder).items() if "/" not in name}
    for name, path in files.items():
        settings = path.suffix in TOKENIZER_FILES or name in TOKENIZER_NAMES
        if place == "student.model":  # its tokenizer is the teacher's, or the pair is refused
            settings = name in STUDENT_NAMES or path.suffix == ".py"
        if settings:
            yield f"{place}/{name}", file_content(path, whole_bytes=WHOLE_BYTES, places=PLACES)
    weights = {name: path for name, path in files.items() if path.suffix == WEIGHTS}
    found = folder_content(weights, whole_bytes=WHOLE_WEIGHTS, places=WEIGHT_PLACES)
    yield from ((f"{place}/{name}", content) for name, content in found.items())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()

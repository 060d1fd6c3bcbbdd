"""The rows of a run, opened: streams to train on, held-out rows, a few samples. `check` reads rows by the same
functions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.held_out import HeldOutSet, held_out_sets
from configs.labels import HELD_OUT, Labels
from configs.prompts import Dataset
from configs.rules import held_out_by_place, place_of_held_out
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.answers.dataset import answers_of_dataset
from trainer.data.local_files import local_files
from trainer.data.prompt_keys import PromptKeys, fewest_held_out, held_out_of, keys_of
from trainer.data.prompt_reader import Asked, PromptReader, ToWrite
from trainer.data.prompts import PromptStream
from trainer.errors import ConfigError, DataError
from trainer.loop.sources import Source
from trainer.loop.together import names_of
from trainer.types import Sequence

if TYPE_CHECKING:
    from trainer.loop.inputs import Inputs

SAMPLE_ROWS = 16  # training rows looked at for the label self-test
MAX_EVALUATION_ROWS = 4096

MOST_KEYS = 8  # datasets of which a fraction is held out; 9 bytes a row
_KEYS: dict[tuple[object, ...], PromptKeys] = {}


def open_reader(run: Run, inputs: Inputs, task: ResolvedTask) -> PromptReader:
    """The rows to train a task on."""
    of_task = inputs.tasks[task.name]
    answers = of_task.answers
    reader = PromptReader.open(
        task.prompts,
        data=run.data,
        template=of_task.template,
        vocabulary=inputs.vocabulary,
        to_write=None if answers.needs_answer else ToWrite(answers.room_for_answer, answers.rewrite),
        asks=_asked(run, task, compares=True),
        aligners=of_task.aligners,
    )
    if task.fraction is None:
        return reader
    keys = _keys_of(task.prompts, reader)
    trained = ~held_out_of(keys, task.fraction, seed=run.seed)
    return replace(reader, rows=reader.rows.only(trained, prompt_keys=keys.keys))


def open_held_out(run: Run, inputs: Inputs, held_out: HeldOutSet) -> PromptReader:
    """Held-out rows, by the template of the teacher that scores them, of several answers the best; each row names
    its set as its task. Raises `ConfigError` for a fraction that is no row."""
    task = held_out.task
    aligners = {name: one.for_evaluation() for name, one in inputs.tasks[task.name].aligners.items()}
    reader = PromptReader.open(
        held_out.rows,
        data=run.data.model_copy(update={"shuffle": False}),
        template=inputs.tasks[task.name].template,
        vocabulary=inputs.vocabulary,
        asks=replace(_asked(run, task), task=held_out.name, best=True),
        aligners=aligners,
    )
    if held_out.fraction is None:
        return reader
    return _fraction_of(reader, _keys_of(held_out.rows, reader), held_out.fraction, seed=run.seed)


def _keys_of(dataset: Dataset, reader: PromptReader) -> PromptKeys:
    """Of all rows, which are read once for both sides, and for `check` and the run that follows it."""
    stats = [file.path.stat() for path in dataset.paths for file in local_files(path)]
    changed = tuple((stat.st_ino, stat.st_size, stat.st_ctime_ns) for stat in stats)
    known = (dataset.model_dump_json(), len(reader.rows), changed)
    if known not in _KEYS:
        _KEYS[known] = keys_of(reader.rows)
        while len(_KEYS) > MOST_KEYS:
            _KEYS.pop(next(iter(_KEYS)))
    return _KEYS[known]


def _fraction_for(wanted: int, num: int) -> float:
    """About the least fraction of `num` rows that is `wanted` rows when rounded, in few digits."""
    least = (wanted - 0.5) / num
    digits = 1 - math.floor(math.log10(least))
    while round((fraction := (math.floor(least * 10**digits) + 1) / 10**digits) * num) != wanted:
        digits += 1
    return fraction


def _fraction_of(reader: PromptReader, keys: PromptKeys, fraction: float, *, seed: int) -> PromptReader:
    rows = reader.rows
    chosen = held_out_of(keys, fraction, seed=seed)
    if chosen.any() and not chosen.all():
        return replace(reader, rows=rows.only(chosen, prompt_keys=keys.keys))
    num, num_answered = len(rows), int(keys.answered.sum())
    num_prompts = len(np.unique(keys.keys[keys.answered]))
    fewest = fewest_held_out(keys)
    if not num_answered:
        hint = "held-out rows need answers: name some with path"
    elif fewest is None or fewest == num:
        hint = "rows with one prompt stay on one side: name held-out rows with path"
    elif chosen.any():
        hint = f"write at most fraction: {1 - _fraction_for(1, num):.12g}"
    else:
        hint = f"write at least fraction: {_fraction_for(fewest, num):.12g}"
    counts = f"{num} rows, of which {num_answered} have answers, with {num_prompts} different prompts"
    raise ConfigError(
        f"fraction: {fraction:g} of {rows.raw.name} holds out {int(chosen.sum())} rows ({counts}); {hint}"
    )


def _asked(run: Run, task: ResolvedTask, *, compares: bool = False) -> Asked:
    """The names of teachers are told where there are several."""
    wanted = {"compared": task.compared_rows, "scored": task.learns_scores} if compares else {}
    if not task.asks:
        return Asked(task.name, **wanted)
    name = (task.teacher or "") if run.teachers else ""
    together = task.ensemble.asked if task.ensemble is not None else name
    return Asked(task.name, together, task.route, task.ensemble, **wanted)


def open_stream(run: Run, task: ResolvedTask, inputs: Inputs, *, quarantine: Path | None) -> PromptStream:
    reader = open_reader(run, inputs, task)
    return PromptStream(reader, seed=seed_of(run, task.name), quarantine=quarantine, num_epochs=run.training.epochs)


def seed_of(run: Run, task: str) -> int:
    """Of the order of a task's rows and of what is written to them: each of several tasks has another one."""
    if not run.tasks:
        return run.seed
    digest = hashlib.blake2b(f"{run.seed}/{task}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def held_out_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """The evaluation rows as sequences, set by set in file order. Empty where the run names none."""
    sets = held_out_sets(run)
    streams = {name: PromptStream(open_held_out(run, inputs, one), seed=0) for name, one in sets.items()}
    num_rows = sum(stream.rows_per_epoch or 0 for stream in streams.values())
    if num_rows > MAX_EVALUATION_ROWS:
        raise ConfigError(_too_many(run, f"{num_rows} held-out rows"))
    found: list[Sequence] = []
    for one, stream in zip(sets.values(), streams.values(), strict=True):
        rows = [row for prompt in stream.take(stream.rows_per_epoch or 0) for row in answers_of_dataset(prompt)]
        if not rows:
            place = place_of_held_out(run, one.tasks[0])
            raise DataError(f"{place}: no row of {one.rows.name} can be used; rows need an answer")
        found += rows
        if len(found) > MAX_EVALUATION_ROWS:  # a conversation may be several sequences
            raise ConfigError(_too_many(run, f"{len(found)} held-out sequences"))
    return tuple(found)


def _too_many(run: Run, what: str) -> str:
    fraction = any(task.fraction is not None for task in run.resolved_tasks().values())
    return (
        f"{', '.join(held_out_by_place(run))}: {what}; their labels stay in memory, so at most "
        f"{MAX_EVALUATION_ROWS} are used: {'lower fraction' if fraction else 'set max_rows'} there"
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """The labels of one sequence, by one teacher."""

    teacher: str
    labels: Labels
    sequence: Sequence


def wanted_labels(run: Run, inputs: Inputs) -> Iterator[Wanted]:
    """All that a run will ask its teachers for, where the answers are the dataset's: labels of the held-out rows, then
    those of the steps in their order, until all rows were there once, since another epoch asks for the same ones.
    Renders the rows, which takes its time. Raises `DataError` as the run would."""
    only = next(iter(run.teachers_by_name()))
    sets, tasks = held_out_sets(run), run.resolved_tasks()
    for row in held_out_rows(run, inputs):
        if sets[row.task].is_scored:
            yield from _wanted(row, HELD_OUT, only)
    streams = {name: open_stream(run, task, inputs, quarantine=None) for name, task in tasks.items()}
    shares = {name: task.share for name, task in tasks.items()}
    source = Source(streams, {}, shares, sequences_per_step=run.training.sequences_per_step)
    for step in count(1):
        for prompt in source.take(step).prompts:
            labels = tasks[prompt.task].soft_labels
            for sequence in answers_of_dataset(prompt) if labels is not None else ():
                yield from _wanted(sequence, labels, only)
        if step == run.training.steps or all(stream.cursor.epoch > 0 for stream in streams.values()):
            return


def _wanted(sequence: Sequence, labels: Labels, only: str) -> Iterator[Wanted]:
    """Of each teacher, as it reads the text; `only` is who is asked where the text names nobody."""
    for name in names_of(sequence.teacher):
        asked = sequence.as_read(name)
        if asked.num_loss_tokens:
            yield Wanted(name or only, labels, asked)


def sample_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """Some training rows of every task that have answers; possibly none, where the teacher writes them all."""
    rows = []
    for task in run.resolved_tasks().values():
        stream = open_stream(run, task, inputs, quarantine=None)
        prompts = stream.take(min(SAMPLE_ROWS, stream.rows_per_epoch or SAMPLE_ROWS))
        rows += [row for prompt in prompts if prompt.loss_mask is not None for row in answers_of_dataset(prompt)]
    return tuple(rows)

"""Everything of a run that is read and checked before any role starts: tokens, rows, steps.

`read_inputs` needs no hardware and comes first, since `cluster/placement/resolve.py` asks for what it finds;
`make_job` then opens the streams.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from configs.answers import ANSWERS
from configs.labels import Labels, NoLabels
from configs.models import ModelSource
from configs.rules import teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.answers.dataset import answered_by_dataset
from trainer.data.chat import Template
from trainer.data.prompt_reader import Asked, PromptReader
from trainer.data.prompts import PromptStream
from trainer.data.vocabulary import SharedVocabulary, check_pair, load_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.labels.encoding import TeacherShape, load_encoding
from trainer.loop.manifest import TrainingState
from trainer.loop.settings import LoopSettings
from trainer.loop.sources import Source
from trainer.model.generation_settings import end_ids
from trainer.model.head import head_width
from trainer.model.load import load_config
from trainer.protocols import Author, TeacherPools
from trainer.run_folder import RunFolder
from trainer.types import Sequence, StreamCounters

SAMPLE_ROWS = 16  # training rows looked at for the label self-test
MAX_EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class TaskInputs:
    """How text becomes tokens in one task, and who writes the answers."""

    template: Template  # of its teacher
    answers: Any  # the `AnswerSource` of the task
    stop_ids_by_teacher: Mapping[str, tuple[int, ...]]
    """The ids after which a teacher writes nothing more: those of its chat template and tokenizer, and those of its
    generation settings that are no padding. Under an empty name where the run has no teacher."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Of the first teacher."""
        return next(iter(self.stop_ids_by_teacher.values()))


@dataclass(frozen=True)
class Inputs:
    """The tokenizer that all models share, and the tasks by name."""

    vocabulary: SharedVocabulary
    tokenizer: PreTrainedTokenizerBase
    tasks: Mapping[str, TaskInputs]

    @property
    def _first(self) -> TaskInputs:
        return next(iter(self.tasks.values()))

    @property
    def template(self) -> Template:
        """Of the first task: that of the student, and of the held-out rows."""
        return self._first.template

    @property
    def answers(self) -> Any:
        """Of the first task."""
        return self._first.answers

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Of the first task."""
        return self._first.stop_ids


@dataclass(frozen=True)
class Job:
    """One run, ready to be driven by `trainer/loop/controller.py`."""

    run: Run
    folder: RunFolder
    config_hash: str
    contents: Mapping[str, str]  # what the run's inputs hold, by place
    inputs: Inputs
    streams: Mapping[str, PromptStream]  # by task
    evaluation: tuple[Sequence, ...]
    samples: tuple[Sequence, ...]  # a few training rows with answers of every task, for the label self-test
    loop: LoopSettings
    teacher_dtypes: Mapping[str, str]  # by teacher
    skip_self_test: bool

    @property
    def tasks(self) -> Mapping[str, ResolvedTask]:
        return self.run.resolved_tasks()

    @property
    def labels(self) -> Mapping[str, Labels | NoLabels]:
        """By task."""
        return {name: task.labels for name, task in self.tasks.items()}

    @property
    def rows_per_epoch(self) -> int:
        """Of all tasks together."""
        return sum(stream.rows_per_epoch for stream in self.streams.values())

    @property
    def counters(self) -> StreamCounters:
        """Of all tasks together, as far as they are drawn."""
        counters = StreamCounters()
        for stream in self.streams.values():
            counters = counters.plus(stream.counters)
        return counters

    def source(self, teachers: Mapping[str, TeacherPools]) -> Source:
        """What the steps are drawn from; the teachers' generators write the missing answers."""
        answers = {}
        for name, task in self.tasks.items():
            authors = self._authors(task, teachers) if task.answers.needs_generator else {}
            answers[name] = self.inputs.tasks[name].answers.bind(authors, seed=seed_of(self.run, name))
        shares = {name: task.share for name, task in self.tasks.items()}
        return Source(self.streams, answers, shares, sequences_per_step=self.loop.sequences_per_step)

    def _authors(self, task: ResolvedTask, teachers: Mapping[str, TeacherPools]) -> dict[str, Author]:
        """The teachers that write for a task, by the name that its prompts have for them."""
        authors = {}
        for name in task.teachers:
            generators = teachers[name].generator
            assert generators is not None, name
            stop_ids = self.inputs.tasks[task.name].stop_ids_by_teacher[name]
            authors[name if self.run.teachers else ""] = Author(generators, stop_ids)
        return authors

    def total_steps_after(self, state: TrainingState | None) -> int:
        """Where a run that goes on from there ends."""
        return total_steps(self.run, rows_per_epoch=self.rows_per_epoch, after=state)


def read_inputs(run: Run) -> Inputs:
    """Tokenizers, templates and who writes the answers. Raises ConfigError where models do not fit together."""
    teachers = run.teachers_by_name()
    sources = {name: teacher.model for name, teacher in teachers.items()} or {"": run.student.model}
    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}
    vocabularies = [
        check_pair(source, run.student.model, tokenizer=tokenizers[name]) for name, source in sources.items()
    ]
    tasks = {name: _task_inputs(run, task, tokenizers, vocabularies[0]) for name, task in run.resolved_tasks().items()}
    return Inputs(vocabularies[0], next(iter(tokenizers.values())), tasks)


def _task_inputs(
    run: Run, task: ResolvedTask, tokenizers: Mapping[str, PreTrainedTokenizerBase], vocabulary: SharedVocabulary
) -> TaskInputs:
    """Raises ConfigError where the teachers of a route read conversations by different templates."""
    teachers = run.teachers_by_name()
    names = task.teachers or tuple(teachers)[:1]
    if not names:
        templates, models = {"": Template.of(tokenizers[""])}, {"": run.student.model}
    else:
        templates = {name: Template.of(tokenizers[name], teachers[name].chat_template) for name in names}
        models = {name: teachers[name].model for name in names}
    template = next(iter(templates.values()))
    for name, other in templates.items():
        if other.text != template.text:
            raise ConfigError(
                f"the teachers {names[0]} and {name} of one route have different chat templates: give them the "
                "same teachers.<name>.chat_template, or each a task of its own"
            )
    stop_ids = {
        name: tuple(dict.fromkeys([*one.stop_ids, *(i for i in end_ids(models[name]) if i < vocabulary.size)]))
        for name, one in templates.items()
    }
    return TaskInputs(template, ANSWERS.load(task.answers), stop_ids)


def make_job(
    run: Run,
    inputs: Inputs,
    folder: RunFolder,
    *,
    config_hash: str,
    teacher_dtypes: Mapping[str, str],
    skip_self_test: bool,
    contents: Mapping[str, str] | None = None,
    after: TrainingState | None = None,
) -> Job:
    """Open the streams and read the held-out rows; `after`: of the checkpoint that the run goes on from. Raises
    DataError for rows that cannot be used."""
    streams = {
        name: open_stream(run, task, inputs, quarantine=folder.rejected) for name, task in run.resolved_tasks().items()
    }
    rows_per_epoch = sum(stream.rows_per_epoch for stream in streams.values())
    return Job(
        run=run,
        folder=folder,
        config_hash=config_hash,
        contents=contents or {},
        inputs=inputs,
        streams=streams,
        evaluation=held_out_rows(run, inputs),
        samples=sample_rows(run, inputs),
        loop=loop_settings(run, inputs, teacher_dtypes, rows_per_epoch=rows_per_epoch, after=after),
        teacher_dtypes=teacher_dtypes,
        skip_self_test=skip_self_test,
    )


def open_reader(run: Run, inputs: Inputs, task: ResolvedTask | None) -> PromptReader:
    """The rows of a task, or the held-out ones where no task is given; training and `check` read them by this."""
    if task is None:
        assert run.data.evaluation is not None
        return PromptReader.open(
            run.data.evaluation,
            data=run.data.model_copy(update={"shuffle": False}),
            template=inputs.template,
            vocabulary=inputs.vocabulary,
            needs_answer=True,
            asks=asked(run, evaluating_task(run), training=False),
        )
    of_task = inputs.tasks[task.name]
    return PromptReader.open(
        task.prompts,
        data=run.data,
        template=of_task.template,
        vocabulary=inputs.vocabulary,
        needs_answer=of_task.answers.needs_answer,
        room_for_answer=of_task.answers.room_for_answer,
        rewrite=of_task.answers.rewrite,
        asks=asked(run, task),
    )


def open_stream(run: Run, task: ResolvedTask, inputs: Inputs, *, quarantine: Path | None) -> PromptStream:
    reader = open_reader(run, inputs, task)
    return PromptStream(reader, seed=seed_of(run, task.name), quarantine=quarantine, num_epochs=run.training.epochs)


def seed_of(run: Run, task: str) -> int:
    """Of the order of a task's rows and of what is written to them: each of several tasks has another one."""
    if not run.tasks:
        return run.seed
    digest = hashlib.blake2b(f"{run.seed}/{task}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def asked(run: Run, task: ResolvedTask, *, training: bool = True) -> Asked:
    """How the rows of a task are read, to be trained on or held out."""
    teacher = (task.teacher or "") if run.teachers else ""
    return Asked(task.name, teacher, task.route, pairs=training and task.compares_answers)


def evaluating_task(run: Run) -> ResolvedTask:
    """The task whose teacher scores the held-out rows: the first that takes labels, or the first."""
    tasks = list(run.resolved_tasks().values())
    return next((task for task in tasks if isinstance(task.labels, Labels)), tasks[0])


def held_out_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """The evaluation rows as sequences, in file order. Empty where the run names none."""
    if run.data.evaluation is None:
        return ()
    stream = PromptStream(open_reader(run, inputs, None), seed=0)
    if stream.rows_per_epoch > MAX_EVALUATION_ROWS:
        raise ConfigError(
            f"data.evaluation has {stream.rows_per_epoch} rows; their labels stay in memory, so at most "
            f"{MAX_EVALUATION_ROWS} are used: set data.evaluation.max_rows"
        )
    rows = tuple(answered_by_dataset(prompt) for prompt in stream.take(stream.rows_per_epoch))
    if not rows:
        raise DataError(f"data.evaluation: no row of {run.data.evaluation.path} can be used; rows need an answer")
    return rows


def sample_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """Some training rows of every task that have answers; possibly none, where the teacher writes them all."""
    rows = []
    for task in run.resolved_tasks().values():
        stream = open_stream(run, task, inputs, quarantine=None)
        prompts = stream.take(min(SAMPLE_ROWS, stream.rows_per_epoch))
        rows += [answered_by_dataset(prompt) for prompt in prompts if prompt.loss_mask is not None]
    return tuple(rows)


def total_steps(run: Run, *, rows_per_epoch: int, after: TrainingState | None = None) -> int:
    """The optimizer steps of a run. Steps go over the borders of epochs, and the last one of the last epoch is as short
    as what is left, so that every row is trained `epochs` times; one that goes on `after` such an end has a short step
    in its middle.

    Raises `ConfigError` where that many epochs are over before the learning rate has risen.
    """
    training = run.training
    if training.steps is not None:
        return training.steps
    trained = 0 if after is None else after.cursor.epoch * rows_per_epoch + after.cursor.position
    left = (training.epochs or 0) * rows_per_epoch - trained
    steps = (0 if after is None else after.step) + math.ceil(left / training.sequences_per_step)
    if run.optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {run.optimizer.warmup_steps} leaves no step after the warm-up: the run has "
            f"{steps} ({training.epochs} epochs of {rows_per_epoch} rows, {training.sequences_per_step} a step); write "
            f"at most {max(0, steps - 1)}"
        )
    return steps


def loop_settings(
    run: Run, inputs: Inputs, teacher_dtypes: Mapping[str, str], *, rows_per_epoch: int, after: TrainingState | None
) -> LoopSettings:
    training, tasks = run.training, run.resolved_tasks().values()
    labelled = {name: task for task in tasks if isinstance(task.labels, Labels) for name in task.teachers}
    replicas = [run.teachers_by_name()[name].scorer.replicas for name in labelled]
    return LoopSettings(
        total_steps=total_steps(run, rows_per_epoch=rows_per_epoch, after=after),
        sequences_per_step=training.sequences_per_step,
        micro_batch_tokens=training.micro_batch_tokens,
        depth=training.depth,
        max_label_bytes=training.max_label_bytes,
        label_bytes_per_row=label_bytes_per_row(run, inputs, teacher_dtypes=teacher_dtypes),
        units_per_rank=math.ceil(max(replicas, default=1) / run.student.ranks),
        max_unit_attempts=run.faults.max_unit_attempts,
        evaluate_every=training.evaluate_every,
        save_every=training.save_every,
        save_every_s=60.0 * training.save_every_minutes,
        max_non_finite_steps=training.max_non_finite_steps,
        compared=frozenset(name for name, task in run.resolved_tasks().items() if task.compares_answers),
        has_held_out_rows=run.data.evaluation is not None and bool(labelled),
    )


def label_bytes_per_row(run: Run, inputs: Inputs, *, teacher_dtypes: Mapping[str, str]) -> int:
    """Size of one row of labels, of the task where it is largest; 0 where no task has labels. Raises `ConfigError`
    where labels do not fit their teacher."""
    sizes = [0]
    for task in run.resolved_tasks().values():
        for name in task.teachers if isinstance(task.labels, Labels) else ():
            shape = TeacherShape(
                vocabulary_size=inputs.vocabulary.size,
                hidden_size=hidden_size_of(run.teachers_by_name()[name].model, place=teacher_place(run, name)),
                dtype=getattr(torch, teacher_dtypes[name]),
            )
            try:
                layout = load_encoding(task.labels).layout(shape)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            sizes.append(sum(column.num_bytes for column in layout))
    return max(sizes)


def hidden_size_of(source: ModelSource, *, place: str = "teacher") -> int:
    """Width of the hidden states that the teacher's head reads."""
    config = load_config(source, role=f"{place}.model")
    return head_width(config, trust_remote_code=source.trust_remote_code)

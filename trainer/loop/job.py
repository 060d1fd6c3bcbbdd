"""Everything of a run that is read and checked before any role starts: tokens, rows, steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.held_out import held_out_sets
from configs.labels import Labels
from configs.models import ModelSource
from configs.rewards import REWARDS, Reward
from configs.rules import station_place, teacher_place
from configs.schema import Run
from configs.tasks import Ensemble, ResolvedTask
from trainer.data.prompts import PromptStream
from trainer.errors import ConfigError, foreign_errors
from trainer.feedback.reward import Rewarded
from trainer.labels.encoding import TeacherShape, load_encoding
from trainer.loop.manifest import TrainingState
from trainer.loop.policy import Policy, PolicyWriter
from trainer.loop.rows import held_out_rows, open_stream, sample_rows, seed_of
from trainer.loop.settings import LoopSettings
from trainer.loop.sources import Source
from trainer.model.head import head_width
from trainer.model.load import load_config
from trainer.protocols import AnswerCollector, Author, Rollouts, TeacherPools
from trainer.run_folder import RunFolder
from trainer.types import Sequence, StreamCounters

if TYPE_CHECKING:
    from trainer.loop.inputs import Inputs


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
    def labels(self) -> Mapping[str, Labels | None]:
        """By task; None where it takes none."""
        return {name: task.soft_labels for name, task in self.tasks.items()}

    @property
    def ensembles(self) -> Mapping[str, Ensemble]:
        """By task, of those that ask several teachers about the same tokens."""
        return {name: task.ensemble for name, task in self.tasks.items() if task.ensemble is not None}

    @property
    def joined(self) -> Mapping[str, Labels]:
        """By task, of those whose teachers are asked twice: what the second request asks for."""
        return {name: task.trained_labels for name, task in self.tasks.items() if task.joins_ids}

    @property
    def rows_per_epoch(self) -> int | None:
        """Of all tasks together; None where one of them streams."""
        return summed_rows(self.streams)

    @property
    def counters(self) -> StreamCounters:
        """Of all tasks together, as far as they are drawn."""
        counters = StreamCounters()
        for stream in self.streams.values():
            counters = counters.plus(stream.counters)
        return counters

    def source(
        self,
        teachers: Mapping[str, TeacherPools],
        rollouts: Rollouts | None = None,
        policy: Policy | None = None,
    ) -> Source:
        """What the steps are drawn from; the teachers' generators write the missing answers, and `rollouts` those of
        the student, by `policy`."""
        answers, on_policy = {}, set()
        for name, task in self.tasks.items():
            authors = self._authors(task, teachers) if task.answers.needs_generator else {}
            student: dict[str, Author] = {}
            if task.answers.needs_rollouts:
                assert rollouts is not None, name
                assert policy is not None, name
                student = {"student": Author(PolicyWriter(name, policy, rollouts), self.inputs.tasks[name].stop_ids)}
                on_policy.add(name)
            answers[name] = self.inputs.tasks[name].answers.bind(authors, seed=seed_of(self.run, name), **student)
            if task.reward is not None:
                answers[name] = self._rewarded(name, task.reward, answers[name])
        shares = {name: task.share for name, task in self.tasks.items()}
        num = self.loop.sequences_per_step
        return Source(self.streams, answers, shares, sequences_per_step=num, policy=policy, on_policy=on_policy)

    def _rewarded(self, name: str, reward: Reward, collector: AnswerCollector) -> Rewarded:
        """The collector of a task, whose answers have rewards."""
        decode = partial(self.inputs.tokenizer.decode, skip_special_tokens=True)
        row_of = self.streams[name].row_of
        return Rewarded(collector, REWARDS.load(reward), row_of=row_of, decode=decode)

    def _authors(self, task: ResolvedTask, teachers: Mapping[str, TeacherPools]) -> dict[str, Author]:
        """The teachers that write for a task, by the name that its prompts have for them."""
        authors = {}
        for name in task.teachers:
            generators = teachers[name].generator
            assert generators is not None, name
            stop_ids = self.inputs.tasks[task.name].stop_ids_of(name)
            aligner = self.inputs.tasks[task.name].aligner
            authors[name if self.run.teachers else ""] = Author(generators, stop_ids, aligner)
        return authors

    def total_steps_after(self, state: TrainingState | None) -> int:
        """Where a run that goes on from there ends."""
        return total_steps(self.run, rows_per_epoch=self.rows_per_epoch, after=state)


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
    rows_per_epoch = summed_rows(streams)
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


def summed_rows(streams: Mapping[str, PromptStream]) -> int | None:
    """The rows of an epoch of all; None where one of them is a stream without a known end."""
    rows = [stream.rows_per_epoch for stream in streams.values()]
    return None if None in rows else sum(num for num in rows if num is not None)


def total_steps(run: Run, *, rows_per_epoch: int | None, after: TrainingState | None = None) -> int:
    """The optimizer steps of a run. Steps go over the borders of epochs, and the last one of the last epoch is as short
    as what is left, so that every row is trained `epochs` times; one that goes on `after` such an end has a short step
    in its middle.

    Raises `ConfigError` where that many epochs are over before the learning rate has risen.
    """
    training = run.training
    if training.steps is not None:
        return training.steps
    assert rows_per_epoch is not None  # epochs of a stream are refused
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
    run: Run,
    inputs: Inputs,
    teacher_dtypes: Mapping[str, str],
    *,
    rows_per_epoch: int | None,
    after: TrainingState | None,
) -> LoopSettings:
    training, tasks = run.training, run.resolved_tasks().values()
    labelled = {name: task for task in tasks if task.soft_labels is not None for name in task.teachers}
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
        min_aligned={name: one.align.min_ratio for name, one in run.resolved_tasks().items() if one.align is not None},
        learns_rewards={name: one.raises_rewards for name, one in run.resolved_tasks().items() if one.learns_rollouts},
        has_held_out_rows=bool(held_out_sets(run)),
    )


def label_bytes_per_row(run: Run, inputs: Inputs, *, teacher_dtypes: Mapping[str, str]) -> int:
    """Size of one row of labels, of the task where it is largest (of an ensemble those of all its teachers); 0 where no
    task has labels. Raises `ConfigError` where labels do not fit their teacher."""
    sizes = [0]
    for task in run.resolved_tasks().values():
        if task.soft_labels is None:
            continue
        of_teachers = []
        for name in task.teachers:
            shape = TeacherShape(
                vocabulary_size=inputs.vocabulary.of_teacher(name).size,
                hidden_size=hidden_size_of(run.teachers_by_name()[name].model, place=teacher_place(run, name)),
                dtype=getattr(torch, teacher_dtypes[name]),
            )
            labels = task.trained_labels
            encoding = load_encoding(labels)
            with foreign_errors(f"{station_place(run, task, 'labels')}: {labels.kind}, the layout of a row"):
                of_teachers.append(sum(column.num_bytes for column in encoding.layout(shape)))
            _check_terms(run, task, shape.vocabulary_size)
        sizes.append(max(of_teachers) if task.ensemble is None else sum(of_teachers))
    return max(sizes)


def _check_terms(run: Run, task: ResolvedTask, vocabulary_size: int) -> None:
    for index, term in enumerate(task.objective):
        if term.least_vocabulary > vocabulary_size:
            raise ConfigError(
                f"{station_place(run, task, 'objective')}.{index}: {term.loss} compares {term.least_vocabulary} ids of "
                f"each row, but the vocabulary has only V = {vocabulary_size}: write k: {vocabulary_size} or less"
            )


def hidden_size_of(source: ModelSource, *, place: str = "teacher") -> int:
    """Width of the hidden states that the teacher's head reads."""
    config = load_config(source, role=f"{place}.model")
    return head_width(config, trust_remote_code=source.trust_remote_code)

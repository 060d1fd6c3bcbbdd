"""Everything of a run that is read and checked before any role starts: tokens, rows, steps.

`read_inputs` needs no hardware and comes first, since `cluster/placement/resolve.py` asks for what it finds;
`make_job` then opens the streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from configs.answers import ANSWERS
from configs.labels import Labels
from configs.schema import ModelSource, Run
from trainer.data.chat import Template
from trainer.data.prompts import PromptStream
from trainer.data.vocabulary import SharedVocabulary, check_pair, load_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.labels.encoding import TeacherShape, load_encoding
from trainer.loop.manifest import TrainingState
from trainer.loop.settings import LoopSettings
from trainer.loop.sources import SingleSource, Source
from trainer.model.generation_settings import end_ids
from trainer.model.head import head_width
from trainer.model.load import load_config
from trainer.protocols import Writers
from trainer.run_folder import RunFolder
from trainer.types import Prompt, Sequence

SAMPLE_ROWS = 16  # training rows looked at for the label self-test
MAX_EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class Inputs:
    """The tokenizer both models share, and how text becomes tokens."""

    vocabulary: SharedVocabulary
    tokenizer: PreTrainedTokenizerBase
    template: Template
    answers: Any  # the `AnswerSource` of the run
    teacher_end_ids: tuple[int, ...] = ()  # after which the teacher's own generation settings end a text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids after which nothing more is written: those of the chat template and the tokenizer, and those of the
        teacher's generation settings. Padding among the latter is left out: it is never written."""
        known = (one for one in self.teacher_end_ids if one < self.vocabulary.size)
        return tuple(dict.fromkeys([*self.template.stop_ids, *known]))


@dataclass(frozen=True)
class Job:
    """One run, ready to be driven by `trainer/loop/controller.py`."""

    run: Run
    folder: RunFolder
    config_hash: str
    contents: Mapping[str, str]  # what the run's inputs hold, by place
    inputs: Inputs
    stream: PromptStream
    evaluation: tuple[Sequence, ...]
    samples: tuple[Sequence, ...]  # a few training rows with answers, for the label self-test
    encoding: Labels
    loop: LoopSettings
    teacher_dtype: str
    skip_self_test: bool

    def source(self, generator: Writers | None) -> Source:
        """What the steps are drawn from; `generator` writes the missing answers."""
        answers = self.inputs.answers.bind(generator, end_of_turn_ids=self.inputs.stop_ids)
        return SingleSource(self.stream, answers, sequences_per_step=self.loop.sequences_per_step)

    def total_steps_after(self, state: TrainingState | None) -> int:
        """Where a run that goes on from there ends."""
        return total_steps(self.run, rows_per_epoch=self.stream.rows_per_epoch, after=state)


def read_inputs(run: Run) -> Inputs:
    """Tokenizers, template and who writes the answers. Raises ConfigError where the pair does not fit."""
    tokenizer = load_tokenizer(run.teacher.model)
    vocabulary = check_pair(run.teacher.model, run.student.model, tokenizer=tokenizer)
    return Inputs(
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        template=Template.of(tokenizer, run.teacher.chat_template),
        answers=ANSWERS.load(run.answers),
        teacher_end_ids=end_ids(run.teacher.model),
    )


def make_job(
    run: Run,
    inputs: Inputs,
    folder: RunFolder,
    *,
    config_hash: str,
    teacher_dtype: str,
    skip_self_test: bool,
    contents: Mapping[str, str] | None = None,
    after: TrainingState | None = None,
) -> Job:
    """Open the streams and read the held-out rows; `after`: of the checkpoint that the run goes on from. Raises
    DataError for rows that cannot be used."""
    stream = open_stream(run, inputs, quarantine=folder.rejected)
    return Job(
        run=run,
        folder=folder,
        config_hash=config_hash,
        contents=contents or {},
        inputs=inputs,
        stream=stream,
        evaluation=held_out_rows(run, inputs),
        samples=sample_rows(run, inputs),
        encoding=run.labels,
        loop=loop_settings(run, inputs, teacher_dtype, rows_per_epoch=stream.rows_per_epoch, after=after),
        teacher_dtype=teacher_dtype,
        skip_self_test=skip_self_test,
    )


def open_stream(run: Run, inputs: Inputs, *, quarantine: Path | None) -> PromptStream:
    return PromptStream.open(
        run.prompts,
        data=run.data,
        template=inputs.template,
        vocabulary=inputs.vocabulary,
        seed=run.seed,
        needs_answer=inputs.answers.needs_answer,
        room_for_answer=inputs.answers.room_for_answer,
        rewrite=inputs.answers.rewrite,
        quarantine=quarantine,
        num_epochs=run.training.epochs,
    )


def held_out_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """The evaluation rows as sequences, in file order. Empty where the run names none."""
    if run.data.evaluation is None:
        return ()
    data = run.data.model_copy(update={"shuffle": False})
    stream = PromptStream.open(
        run.data.evaluation,
        data=data,
        template=inputs.template,
        vocabulary=inputs.vocabulary,
        seed=0,
        needs_answer=True,
    )
    if stream.rows_per_epoch > MAX_EVALUATION_ROWS:
        raise ConfigError(
            f"data.evaluation has {stream.rows_per_epoch} rows; their labels stay in memory, so at most "
            f"{MAX_EVALUATION_ROWS} are used: set data.evaluation.max_rows"
        )
    rows = tuple(as_sequence(prompt) for prompt in stream.take(stream.rows_per_epoch))
    if not rows:
        raise DataError(f"data.evaluation: no row of {run.data.evaluation.path} can be used; rows need an answer")
    return rows


def sample_rows(run: Run, inputs: Inputs) -> tuple[Sequence, ...]:
    """Some training rows that have answers; possibly none, where the teacher writes them all."""
    stream = open_stream(run, inputs, quarantine=None)
    prompts = stream.take(min(SAMPLE_ROWS, stream.rows_per_epoch))
    return tuple(as_sequence(prompt) for prompt in prompts if prompt.loss_mask is not None)


def as_sequence(prompt: Prompt) -> Sequence:
    assert prompt.loss_mask is not None
    return Sequence(prompt.id, prompt.token_ids, prompt.loss_mask, author="dataset")


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
    run: Run, inputs: Inputs, teacher_dtype: str, *, rows_per_epoch: int, after: TrainingState | None
) -> LoopSettings:
    training = run.training
    return LoopSettings(
        total_steps=total_steps(run, rows_per_epoch=rows_per_epoch, after=after),
        sequences_per_step=training.sequences_per_step,
        micro_batch_tokens=training.micro_batch_tokens,
        depth=training.depth,
        max_label_bytes=training.max_label_bytes,
        label_bytes_per_row=label_bytes_per_row(run, inputs, teacher_dtype=teacher_dtype),
        units_per_rank=math.ceil(run.teacher.scorer.replicas / run.student.ranks),
        max_unit_attempts=run.faults.max_unit_attempts,
        evaluate_every=training.evaluate_every,
        save_every=training.save_every,
        save_every_s=60.0 * training.save_every_minutes,
        max_non_finite_steps=training.max_non_finite_steps,
        has_held_out_rows=run.data.evaluation is not None,
    )


def label_bytes_per_row(run: Run, inputs: Inputs, *, teacher_dtype: str) -> int:
    """Size of one row of this run's labels. Raises `ConfigError` where they do not fit the teacher."""
    shape = TeacherShape(
        vocabulary_size=inputs.vocabulary.size,
        hidden_size=hidden_size_of(run.teacher.model),
        dtype=getattr(torch, teacher_dtype),
    )
    try:
        layout = load_encoding(run.labels).layout(shape)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return sum(column.num_bytes for column in layout)


def hidden_size_of(source: ModelSource) -> int:
    """Width of the hidden states that the teacher's head reads."""
    config = load_config(source, role="teacher.model")
    return head_width(config, trust_remote_code=source.trust_remote_code)

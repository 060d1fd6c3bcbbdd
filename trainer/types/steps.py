"""A step as it is planned, staged and trained, and the numbers that it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from trainer.checks.shown import TrainedTokens, Worst
    from trainer.types.cursor import Cursor
    from trainer.types.labels import Unit


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rank and micro-batch of every sequence of a step; all ranks have the same number of micro-batches."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> indices into the step's sequences
    tokens: tuple[int, ...]  # per rank

    @property
    def world(self) -> int:
        return len(self.micro_batches)

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


@dataclass(frozen=True, slots=True)
class TaskTotals:
    """Of one task in one step, over all ranks: what its terms are divided by."""

    num_loss_tokens: int
    num_groups: int  # prompts with at least one answer; of aligned chunks these


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's share of one optimizer step, without the labels: `blocks[u]` of the call goes with `units[u]`."""

    step: int
    units: tuple[Unit, ...]  # each of one task and teacher
    micro_batches: tuple[tuple[tuple[int, int], ...], ...]  # [micro-batch] -> (unit, sequence inside it)
    totals: Mapping[str, TaskTotals]  # by task, of the whole step

    @property
    def num_loss_tokens(self) -> int:
        """Of the whole step, over all ranks and tasks: the normaliser of row terms."""
        return sum(task.num_loss_tokens for task in self.totals.values())


@dataclass(frozen=True, slots=True)
class BatchPart:
    """The loss rows of one task and teacher in a micro-batch: a slice of its rows, in the order of the sequences.

    Of several teachers (names joined by TOGETHER) the labels are `<teacher>/<column>`, with `<teacher>/weight`.
    """

    task: str
    teacher: str
    rows: slice  # of the batch's N loss rows; n = its length
    labels: Mapping[str, torch.Tensor]  # columns of the task's encoding, each [n, width]
    columns: Mapping[str, torch.Tensor]  # float32 [n] each
    row_weights: torch.Tensor | None  # float32 [n] of the row terms; None: all 1
    row_sequences: torch.Tensor
    """int64 [n], the sequence of each row, counted from 0 in this part; of aligned chunks the chunk, and one number
    more for the rows in none."""
    groups: tuple[tuple[int, ...], ...]  # the same numbers: the answers to each prompt, in the order of their samples
    rewards: tuple[float | None, ...]  # of each sequence of this part
    prompts: tuple[str, ...] = ()  # of each sequence, what it is an answer to: equal in a group, on whatever rank


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One packed micro-batch on the device, its labels aligned to its loss rows. Sequences lie task by task."""

    token_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], restarting at each sequence
    sequence_offsets: tuple[int, ...]  # [S + 1] borders inside T
    loss_rows: torch.Tensor  # int64 [N], indices into T
    target_ids: torch.Tensor  # int64 [N], of each loss row: the token after it
    parts: tuple[BatchPart, ...]  # one per task and teacher with sequences here


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Numbers of one step, `{area}/{name}_{unit}`, the same on whichever rank reported them."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Trained:
    """How far the run is trained."""

    step: int
    cursor: Cursor  # after the prompts of that step
    non_finite_steps: int  # skipped so far, over all attempts
    last: bool  # no step follows


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One held-out sequence for the token viewer of the report; arrays follow the shift of this module."""

    id: str
    token_ids: np.ndarray  # int32 [L]
    rows: np.ndarray  # int64 [N] loss rows
    student_logprob: np.ndarray  # float32 [N] of the target id
    teacher_logprob: np.ndarray  # float32 [N]
    kl: np.ndarray  # float32 [N] forward KL in nats


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out quality over the full vocabulary; never a top-k bound. What is about a teacher is of the rows that one
    scored, and None where there is no such row."""

    step: int
    num_rows: int
    forward_kl: float | None  # nats per token, KL(teacher, student)
    agreement: float | None  # share of rows where both argmax are equal
    perplexity: float  # of the student on the target ids
    teacher_perplexity: float | None
    padding_mass: float = (
        0.0  # mean probability of the student on its rows beyond the vocabulary: ids that do not exist
    )
    student_entropy: float | None = None  # nats per token, of the whole vocabulary; None: an earlier version's
    teacher_entropy: float | None = None  # likewise, of its own vocabulary
    aligned_rows: int | None = None
    """Of a teacher with another tokenizer: the rows that KL and agreement are of, over the ids that both vocabularies
    have and one event of all others. None: all rows that a teacher scored, over the whole vocabulary."""
    samples: tuple[SampleTokens, ...] = ()
    worst: Worst | None = None  # where the student is furthest
    trained: tuple[TrainedTokens, ...] = ()  # of the step before it, as it was trained
    tasks: Mapping[str, Evaluation] = field(default_factory=dict)  # of each, where there are several: this is their sum
    teachers: Mapping[str, float] = field(default_factory=dict)  # forward_kl to each of several that are asked together

    @property
    def kl_unit(self) -> str:
        """What `forward_kl` is a mean over: "token", or of a teacher with another tokenizer "aligned token"."""
        return "token" if self.aligned_rows is None else "aligned token"

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the number that says most: the KL, or the perplexity where no teacher scored anything."""
        return ("perplexity", self.perplexity) if self.forward_kl is None else ("KL", self.forward_kl)

    @property
    def is_finite(self) -> bool:
        """Whether the student is whole, as far as these rows tell."""
        return math.isfinite(self.headline[1])


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """What `cluster/placement/resolve.py` decided for every student rank; nothing in it depends on the rank."""

    dtype: str  # "float32" or "bfloat16": of the parameters that are trained and of the forward pass
    device_type: str  # of torch.device
    backend: str  # of torch.distributed
    attention: str  # a name of trainer/model/attention.py
    deepspeed: Mapping[str, Any]  # the complete DeepSpeed configuration
    collective_timeout_s: float
    start_timeout_s: float = 600.0  # until the group must be ready

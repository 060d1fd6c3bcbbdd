"""What the two loops need from the outside, as small protocols; `cluster/` implements them, so do test fakes.

The consumer owns the interface: nothing here names Ray, vLLM or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from configs.labels import Labels
from trainer.types import (
    AnswerCounters,
    BlockRef,
    Collected,
    Evaluation,
    Prompt,
    RankBatch,
    SoftLabelBlock,
    StepMetrics,
    Unit,
    UnitReport,
)

if TYPE_CHECKING:
    from trainer.checks.self_tests import SelfTestResult
    from trainer.model.student import StudentInfo


class Scorers(Protocol):
    """A pool of scorer replicas of one teacher."""

    async def score(self, unit: Unit, encoding: Labels) -> tuple[UnitReport, BlockRef]:
        """Labels for every loss row of the unit, whatever dies meanwhile.

        Raises `TeachersLost` when the pool has given up, `UnitRejected` when the unit itself cannot be scored.
        """
        ...


class Writers(Protocol):
    """A pool of writer replicas of one teacher."""

    async def write(self, prompts: AbstractSequence[Prompt]) -> list[np.ndarray]:
        """The answer of each prompt as int32 ids, the end-of-turn token included when the teacher ended its turn."""
        ...


class Elicitation(Protocol):
    """Who writes the tokens that the teacher judges."""

    async def collect(self, prompts: AbstractSequence[Prompt]) -> Collected:
        """The sequences of one step, and counts of the answers written for them."""
        ...

    def judge(self, answers: AnswerCounters, *, last: bool) -> None:
        """Raises `DataError` where too many answers of the run so far could not be trained on. `last`: none follow."""
        ...


class Students(Protocol):
    """The group of student ranks. Every call goes to all ranks; a rank that dies raises `StudentsLost`."""

    world: int

    async def stage(
        self, batches: AbstractSequence[RankBatch], blocks: AbstractSequence[AbstractSequence[BlockRef]]
    ) -> None:
        """Copy each rank's labels next to its device and check them, while an earlier step may still run.

        Raises `LabelsLost` with the ids of the units whose blocks can no longer be read.
        """
        ...

    async def step(self, step: int) -> StepMetrics:
        """One optimizer step on what was staged for it."""
        ...

    async def stage_evaluation(
        self, units: AbstractSequence[AbstractSequence[Unit]], blocks: AbstractSequence[AbstractSequence[BlockRef]]
    ) -> None:
        """Keep the held-out units of each rank with their hidden labels for all later evaluations."""
        ...

    async def evaluate(self, step: int) -> Evaluation: ...

    async def save(self, step: int, folder: Path) -> None:
        """Write the shards of a checkpoint into an existing folder; the caller commits it."""
        ...


class ScoringEngine(Protocol):
    """Software that runs one replica of a teacher for scoring. Built inside its process; no method outlives `close`."""

    async def score(self, unit: Unit, encoding: Labels, *, deadline_s: float) -> tuple[UnitReport, SoftLabelBlock]:
        """Raises `DeadlineExceeded` after aborting the unit's requests, `UnitRejected` for input the model refuses."""
        ...

    def close(self) -> None: ...


class WritingEngine(Protocol):
    """Software that runs one replica of a teacher for writing."""

    async def write(self, prompts: AbstractSequence[Prompt], *, deadline_s: float) -> list[np.ndarray]: ...

    def close(self) -> None: ...


class StudentGroup(Students, Protocol):
    """Students, with what a run needs before and after the loops."""

    async def start(self, checkpoint: Path | None) -> StudentInfo:
        """Build all ranks, and load a committed checkpoint if one is given."""
        ...

    async def self_test(self) -> tuple[SelfTestResult, ...]: ...

    async def generate(
        self, prompts: AbstractSequence[np.ndarray], *, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Greedy continuations, int32, without the prompts."""
        ...

    async def export(self, folder: Path) -> None:
        """Write weights and config as a Hugging Face folder."""
        ...

    async def kill(self) -> None:
        """End every rank at once, hanging ones included."""
        ...


class Session(Protocol):
    """The roles of one run, wherever they live. Owns every process it starts."""

    scorers: Scorers
    writers: Writers | None
    students: StudentGroup

    async def start_teachers(self) -> None: ...

    async def close(self) -> None:
        """Stop every role; nothing is left running."""
        ...

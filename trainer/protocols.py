"""What the two loops need from the outside, as small protocols; `cluster/` implements them, so do test fakes.

The consumer owns the interface: nothing here names Ray, vLLM or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from configs.labels import Labels
from trainer.types import (
    AnswerCounters,
    BlockRef,
    BucketHeader,
    BucketRef,
    Collected,
    Completion,
    Evaluation,
    GenerationRequest,
    Probe,
    Prompt,
    RankBatch,
    RowIds,
    RowIdsRef,
    Sequence,
    SoftLabelBlock,
    StepMetrics,
    Trained,
    Unit,
    UnitReport,
    WeightBucket,
    WeightForm,
)

if TYPE_CHECKING:
    from trainer.align.texts import TextAligner

Moment = Literal["before", "during", "after"]
"""When an evaluation was made, seen from training; the one of the last step is `after`."""


class Observer(Protocol):
    """What records a run: metrics, progress, timeline, run artifacts. Must not block for long. What a resumed run
    reports a second time (an evaluation) is the same as the first time."""

    def phase(self, text: str) -> None:
        """A part of the run begins."""
        ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation, when: Moment) -> None: ...

    def generation(self, who: str, rows: tuple[Sequence, ...], texts: AbstractSequence[np.ndarray]) -> None:
        """Token ids that the student wrote `before` or `after` training, or the `teacher`, to the prompts of `rows`."""
        ...

    def event(self, name: str, **fields: object) -> None: ...

    def span(self, lane: str, kind: str, start_s: float, stop_s: float, label: str = "") -> None: ...


class Scorers(Protocol):
    """A pool of scorer replicas of one teacher."""

    async def score(
        self, unit: Unit, encoding: Labels, given: RowIdsRef | tuple[BlockRef, ...] | None = None
    ) -> tuple[UnitReport, BlockRef]:
        """Labels for every loss row of the unit, whatever dies meanwhile. `given`: where the encoding `takes_ids`, the
        ids, or labels of the unit whose ids are joined; raises `LabelsLost` where these can no longer be read.

        Raises `TeachersLost` when the pool has given up, `UnitRejected` when the unit itself cannot be scored.
        """
        ...


class Generators(Protocol):
    """A pool of generator replicas of one model."""

    async def generate(self, requests: AbstractSequence[GenerationRequest]) -> list[Completion]:
        """The answer to each request, in their order, whatever dies meanwhile.

        Raises `TeachersLost` when the pool has given up, `UnitRejected` for a prompt that no replica can read.
        """
        ...


class Rollouts(Generators, Protocol):
    """A pool of engines that hold the student, and write with the weights that they took in last."""

    form: WeightForm

    async def take(self, header: BucketHeader, bucket: BucketRef) -> None:
        """Every engine takes in one bucket; those of a version come in order. An engine that fails is started anew, and
        takes in all buckets of the version when the last one is there."""
        ...

    async def prove(self, probe: Probe) -> float:
        """The largest gap by which an engine differs from the student on the probe. Every engine that is started later
        is held against it too. Raises `SyncError` with both numbers where one differs by more than the probe allows."""
        ...


class OnPolicy(Generators, Protocol):
    """The student as a writer, in the turn of a step."""

    max_staleness: int

    def staleness(self, completion: Completion) -> int:
        """Optimizer steps that will have been trained since the weights that wrote it, when its step is trained."""
        ...


@dataclass(frozen=True, slots=True)
class Author:
    """A model that writes answers."""

    generators: Generators  # of the student an `OnPolicy`
    stop_ids: tuple[int, ...]  # its answers end with one of them
    aligner: TextAligner | None = None  # where it has another tokenizer than the student


class AnswerSource(Protocol):
    """A kind of answers, with its parameters: what it needs of rows, and who writes."""

    @property
    def needs_answer(self) -> bool:
        """Whether a row without an answer is a bad one."""
        ...

    @property
    def room_for_answer(self) -> int:
        """Tokens that must fit behind a prompt."""
        ...

    @property
    def rewrite(self) -> bool:
        """Whether answers of the rows are left unread."""
        ...

    def bind(self, authors: Mapping[str, Author], *, seed: int) -> AnswerCollector:
        """What collects the sequences of a step. `authors`: the teachers that write, by the name that prompts have for
        them; none where nobody writes. A kind that `needs_rollouts` is given `student` too, an `Author`."""
        ...


class AnswerCollector(Protocol):
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

    async def propose(self, batches: AbstractSequence[RankBatch]) -> Mapping[str, RowIdsRef]:
        """The ids that each rank's student finds likeliest now, for its units whose labels take ids: by unit, where
        they lie. Between two steps; what was chosen for a step before is not chosen again."""
        ...

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

    async def weights(self, version: int, index: int, form: WeightForm) -> tuple[BucketHeader, BucketRef]:
        """Between two steps: one bucket of the weights that training changes."""
        ...

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Between two steps: float32 [L - 1], the log-probabilities of tokens 1 .. L - 1 of a text."""
        ...

    async def stage_evaluation(
        self,
        units: AbstractSequence[AbstractSequence[Unit]],
        blocks: AbstractSequence[AbstractSequence[BlockRef | None]],
    ) -> None:
        """Keep the held-out units of each rank with their hidden labels, or None where nobody scores a unit, for all
        later evaluations."""
        ...

    async def evaluate(self, step: int) -> Evaluation: ...

    async def save(self, step: int, folder: Path) -> None:
        """Write the shards of a checkpoint into an existing folder; the caller commits it."""
        ...


class Hook(Protocol):
    """Work between two steps, while no rank trains. An error of any method ends the run. A hook serves every attempt of
    a run: `begin` comes again after the student group was restarted."""

    async def begin(self, step: int) -> None:
        """Training goes on after `step`; 0: it begins."""

    def due(self, step: int, *, last: bool, elapsed_s: float) -> bool:
        """Whether to `run` after this step. `elapsed_s`: since the hook ran, or since the loops began."""
        ...

    async def run(self, trained: Trained) -> None: ...

    async def finish(self, trained: Trained) -> bool:
        """The run ends early after `trained`, by a request or an error of the supply: keep what a later run needs.
        Returns whether it is kept."""
        return True

    def told(self) -> Mapping[str, float]:
        """Metrics of what it did since the last call; they go with the next step."""
        return {}


class ScoringEngine(Protocol):
    """Software that runs one replica of a teacher for scoring. Built inside its process; no method outlives `close`."""

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: RowIds | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """Raises `DeadlineExceeded` after aborting the unit's requests, `UnitRejected` for input the model refuses."""
        ...

    def close(self) -> None: ...


class GeneratingEngine(Protocol):
    """Software that runs one replica of a model for generation."""

    async def generate(self, requests: AbstractSequence[GenerationRequest], *, deadline_s: float) -> list[Completion]:
        """Raises as `ScoringEngine.score` does. Several calls at once share the engine's batches, where it has any."""
        ...

    def close(self) -> None: ...


class RolloutEngine(GeneratingEngine, Protocol):
    """Software that runs one copy of the student for rollouts."""

    async def take(self, bucket: WeightBucket, *, deadline_s: float) -> None:
        """Take in weights. After the last bucket of a version the engine writes with it, and no cache is older."""
        ...

    async def logprobs(self, token_ids: np.ndarray, *, deadline_s: float) -> np.ndarray:
        """float32 [L - 1], the log-probabilities of tokens 1 .. L - 1 of a text, over all rows of the head."""
        ...


@dataclass(frozen=True, slots=True)
class StudentInfo:
    """What was built, for people and the run's record."""

    parameters: int
    trainable_parameters: int
    dtype: str
    attention: str
    zero_stage: int
    load_s: float
    products: str = ""  # which library multiplies on a CPU, and what it was chosen by


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """One start-up self-test; `numbers` is shown to people whether it passed or not."""

    name: str
    passed: bool
    numbers: str


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


@dataclass(frozen=True, slots=True)
class TeacherPools:
    """The replicas of one teacher; None where no task asks for what they do."""

    scorer: Scorers | None
    generator: Generators | None


class Session(Protocol):
    """The roles of one run, wherever they run. Owns every process it starts.

    Called in this order: `reserve`, `check_nodes`, `start_teachers` (and `students.start`), ..., `close`.
    """

    @property
    def students(self) -> StudentGroup: ...

    @property
    def rollouts(self) -> Rollouts | None:
        """The engines that hold the student; None where it writes nothing."""
        ...

    @property
    def in_one_process(self) -> bool:
        """Whether roles compute in this process: then one thing at a time."""
        ...

    @property
    def teachers(self) -> Mapping[str, TeacherPools]:
        """By name."""
        ...

    async def reserve(self) -> None:
        """Take the slots of all roles, or raise with what is missing."""
        ...

    async def check_nodes(self) -> None:
        """Every node has the software, the models and the run folder of this process, or an error. Does nothing where
        all nodes are this process's own."""
        ...

    async def start_teachers(self) -> None: ...

    def read_block(self, ref: BlockRef) -> SoftLabelBlock:
        """Bring a block into this process; blocks the thread. Raises `InfrastructureError`."""
        ...

    async def watch_for_drain(self, stop: Callable[[str], None]) -> None:
        """Until cancelled, call `stop(why)` when a node is announced to be taken away. Returns at once where no node
        can be."""
        ...

    async def close(self) -> None:
        """Stop every role; nothing is left running. Also after an error of any other method."""
        ...

"""The values that travel between the stations of the line, all frozen.

Dims used in shape comments, here and everywhere:

    L  tokens of one sequence        T  tokens of one packed micro-batch     S  sequences
    N  label rows                    V  entries of the shared, true vocabulary (never the padded one)
    K  kept ids of a row             H  hidden width                          E  events of a pair

The shift, stated once: row i of anything `[L]` belongs to the logits *after* token i, that is to the prediction of
token i + 1. `loss_mask[i]` therefore says whether the prediction of token i + 1 counts, and `loss_mask[L - 1]` is
always False. Engines shift what they return to this convention; nobody downstream shifts again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from configs.section import MAIN, TOGETHER

if TYPE_CHECKING:
    import torch

    from configs.labels import Labels
    from trainer.checks.shown import TrainedTokens, Worst

BlockRef = object
"""Where a block lies: the block itself in one process, an object reference on a cluster. Opaque to the loops."""

RowIdsRef = object
"""Where the ids that a unit's teacher is asked about lie, likewise."""


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Positions since the run began; read = good + rejected + dropped_too_long."""

    read: int = 0
    good: int = 0
    rejected: int = 0
    dropped_too_long: int = 0
    truncated: int = 0  # among the good ones

    def plus(self, change: StreamCounters) -> StreamCounters:
        return StreamCounters(
            read=self.read + change.read,
            good=self.good + change.good,
            rejected=self.rejected + change.rejected,
            dropped_too_long=self.dropped_too_long + change.dropped_too_long,
            truncated=self.truncated + change.truncated,
        )


@dataclass(frozen=True, slots=True)
class AnswerCounters:
    """Answers that a teacher wrote, and what was wrong with them."""

    written: int = 0
    empty: int = 0  # nothing but end tokens, or nothing at all
    cut_off: int = 0  # as long as allowed, and not ended by the teacher
    dropped: int = 0  # not trained on: the empty ones, and those cut off where `answers` leaves them out

    def plus(self, more: AnswerCounters) -> AnswerCounters:
        return AnswerCounters(
            written=self.written + more.written,
            empty=self.empty + more.empty,
            cut_off=self.cut_off + more.cut_off,
            dropped=self.dropped + more.dropped,
        )

    @classmethod
    def sum(cls, counters: Iterable[AnswerCounters]) -> AnswerCounters:
        total = cls()
        for one in counters:
            total = total.plus(one)
        return total


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where a block of a streamed dataset begins (`trainer/data/streamed.py`)."""

    position: int  # of its first row in the epoch
    file: int  # in the order of the epoch
    offset: int  # byte of a text file, row of a parquet file
    line: int  # of a text file, from 1


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the prompt stream has been *trained*: `position` prompts of epoch `epoch`, in the order of `seed`."""

    epoch: int
    position: int
    seed: int
    counters: StreamCounters = StreamCounters()  # what was met on the way there, over all attempts
    answers: AnswerCounters = AnswerCounters()  # likewise, of what was written for the prompts
    place: StreamPlace | None = None  # of a stream: where the block begins in which the position lies
    tasks: dict[str, Cursor] = field(default_factory=dict)  # of each, where there are several: the rest is their sum

    def with_answers(self, by_task: Mapping[str, AnswerCounters]) -> Cursor:
        """After further answers of these tasks, counted in the sum and in each task."""
        tasks = {
            name: replace(one, answers=one.answers.plus(by_task.get(name, AnswerCounters())))
            for name, one in self.tasks.items()
        }
        return replace(self, answers=self.answers.plus(AnswerCounters.sum(by_task.values())), tasks=tasks)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Bytes of answers, and of digits in them, and how many of each the labels of a teacher reach."""

    num_bytes: int = 0
    aligned_bytes: int = 0
    num_digits: int = 0
    aligned_digits: int = 0

    def plus(self, other: Coverage) -> Coverage:
        return Coverage(
            self.num_bytes + other.num_bytes,
            self.aligned_bytes + other.aligned_bytes,
            self.num_digits + other.num_digits,
            self.aligned_digits + other.aligned_digits,
        )

    @property
    def byte_ratio(self) -> float:
        """1 where there is no byte."""
        return self.aligned_bytes / self.num_bytes if self.num_bytes else 1.0

    @property
    def digit_ratio(self) -> float | None:
        """None where there is no digit."""
        return self.aligned_digits / self.num_digits if self.num_digits else None


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """What a teacher with a tokenizer and a template of its own reads in the place of a text, and of which of the
    text's rows its labels are (`trainer/align/`)."""

    token_ids: np.ndarray  # int32 [L'], the teacher's
    loss_mask: np.ndarray | None = None  # bool [L'], shifted: the n' rows that it is asked for; None: a prompt
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [n], of each loss row of the text: rows of one number on both sides belong together; -1: has no label."""
    teacher_groups: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # int64 [n'], likewise
    num_groups: int = 0
    coverage: Coverage = Coverage()
    chunked: bool = False  # groups may have several rows of each side, and their labels are summed


@dataclass(frozen=True, slots=True)
class RowText:
    """One of the texts that a row becomes."""

    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray | None  # bool [L], shifted (module docstring); None: the answer is to be written
    row_weights: np.ndarray | None = None  # float32 [L], shifted: of each row in the row terms; None: all 1
    reading: Reading | None = None  # what the teacher reads instead, where it has another tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a dataset, rendered and tokenised once.

    `loss_mask` is None where the answer still has to be written (`token_ids` is then the prompt alone, generation
    header included); otherwise `token_ids` is the whole text and the mask follows the shift of this module.
    """

    id: str  # "<epoch>:<row>", the same whatever the world size
    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray | None  # bool [L]
    origin: str  # "file:line" or "dataset[row]", for messages to people
    task: str = MAIN
    teacher: str = ""  # who is asked about it, several as in `Sequence`; empty where nobody is, or there is one teacher
    teacher_weights: Mapping[str, float] | None = None  # as in `Sequence`
    row_weights: np.ndarray | None = None  # float32 [L], as in `RowText`
    alternatives: tuple[RowText, ...] = ()  # further answers, which are compared with the first
    scores: tuple[float, ...] | None = None  # of the first answer and the further ones, where the row says them
    turns: tuple[RowText, ...] = ()  # further turns of a conversation that is no single text for its template
    weight: float = 1.0  # of its answers' rows in the row terms of the objective, `row_weights` apart
    reading: Reading | None = None  # as in `RowText`


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of an answer are drawn: logits are divided by the temperature, then restricted by `min_p`, `top_k`
    and `top_p`, in this order."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # the smallest set of likeliest tokens of this mass (nucleus sampling, arXiv 1904.09751)
    top_k: int = 0  # the k likeliest tokens; 0: all
    min_p: float = 0.0  # tokens at least this fraction as likely as the likeliest (arXiv 2407.01082)
    stop: tuple[str, ...] = ()  # a text ends with the token that completes one of these strings
    stop_token_ids: tuple[int, ...] = ()  # a text ends with one of these
    seed: int = 0  # of the task; every answer is drawn with its own, `sample_seed`


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to one prompt. Its seed depends on nothing else, so that a retry is drawn with the same numbers."""

    prompt_id: str
    token_ids: np.ndarray  # int32 [L], generation header included
    sampling: Sampling
    sample: int = 0  # which of the answers to its prompt
    origin: str = ""  # of the prompt, for messages

    @property
    def id(self) -> str:
        return sequence_id(self.prompt_id, self.sample)

    @property
    def seed(self) -> int:
        return sample_seed(self.sampling.seed, self.prompt_id, self.sample)


FinishReason = Literal["stop", "length", "abort"]
"""Why an answer ends: at a stop token or string, at `max_tokens` or the length of the engine, or cut by the engine."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote to a request."""

    token_ids: np.ndarray  # int32 [T], without the prompt, the stop token included
    logprobs: np.ndarray  # float32 [T], of each token in the distribution it was drawn from; greedy: at temperature 1
    finish_reason: FinishReason
    author: str  # "teacher", or "teacher:<name>" where there are several
    versions: tuple[tuple[int, str], ...]  # first token and weights version of each span that one version wrote


def sequence_id(prompt_id: str, sample: int) -> str:
    """Unique in a step."""
    return f"{prompt_id}#{sample}" if sample else prompt_id


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """32 bits, of one answer: it does not depend on what else is in a batch or which replica writes it."""
    digest = hashlib.blake2b(f"{seed}:{sequence_id(prompt_id, sample)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Sequence:
    """A full token row with the rows that count in the loss: one answer to one prompt."""

    prompt_id: str
    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L], shifted (module docstring)
    author: str  # of the answer: "dataset", or as in `Completion`
    sample: int = 0  # which of the answers to its prompt
    task: str = MAIN
    teacher: str = ""  # who scores it, several joined by TOGETHER; empty where nobody does, or there is one teacher
    teacher_weights: Mapping[str, float] | None = None  # of its own, where its row says them
    weight: float = 1.0  # of all its rows in the row terms of the objective
    row_weights: np.ndarray | None = None  # float32 [L], as in `RowText`; `weight` multiplies them
    is_turn: bool = False  # of a conversation of several sequences: `sample` counts its texts, each with its own prompt
    reward: float | None = None
    version: str = ""  # of the author's weights
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [L] each, shifted as the mask is
    reading: Reading | None = None  # as in `RowText`

    def as_read(self) -> Sequence:
        """As its teacher reads it: itself, unless that has another tokenizer."""
        if self.reading is None:
            return self
        assert self.reading.loss_mask is not None, self.id
        return Sequence(
            self.prompt_id,
            self.reading.token_ids,
            self.reading.loss_mask,
            self.author,
            sample=self.sample,
            task=self.task,
            teacher=self.teacher,
            is_turn=self.is_turn,
        )

    @property
    def id(self) -> str:
        """Unique in a step."""
        return sequence_id(self.prompt_id, self.sample)

    @property
    def group(self) -> tuple[str, str]:
        """Equal for the answers to one prompt of one task."""
        return self.task, self.id if self.is_turn else self.prompt_id

    @property
    def kind(self) -> tuple[str, str]:
        """Task and teacher, which all sequences of a unit share."""
        return self.task, self.teacher

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def spans(self) -> tuple[tuple[int, int], ...]:
        """The loss rows as half-open spans, in order: the answers of a multi-turn text are no suffix."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.loss_mask.astype(np.int8), [0]])))
        return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def tokens_to_read(sequence: Sequence) -> np.ndarray:
    """The tokens up to the one that the last label row predicts; what follows changes no label."""
    return sequence.token_ids[: int(np.flatnonzero(sequence.loss_mask)[-1]) + 2]


@dataclass(frozen=True, slots=True)
class Collected:
    """What was made of the prompts of one step."""

    sequences: tuple[Sequence, ...]  # in the order of the prompts; a prompt without a usable answer has none
    answers: AnswerCounters = AnswerCounters()
    answers_by_task: Mapping[str, AnswerCounters] = field(default_factory=dict)  # of a whole step


@dataclass(frozen=True, slots=True)
class Unit:
    """The sequences that one replica scores together and one rank trains in one step. Scoring it is a pure function."""

    id: str  # from stream positions, so equal at every world size that cuts the step equally
    sequences: tuple[Sequence, ...]
    is_test: bool = False  # of a self-test: its labels come from the engine, never from a store

    @property
    def kind(self) -> tuple[str, str]:
        """Task and teacher of all its sequences."""
        return self.sequences[0].kind

    def as_read(self) -> Unit:
        """As its teacher reads it (`Sequence.as_read`)."""
        if all(sequence.reading is None for sequence in self.sequences):
            return self
        return Unit(self.id, tuple(sequence.as_read() for sequence in self.sequences))

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)

    @property
    def num_rows(self) -> int:
        return sum(s.num_loss_tokens for s in self.sequences)

    def asked(self) -> tuple[Unit, ...]:
        """What each teacher scores, in their order: the unit itself, or where several are asked one unit for each."""
        names = self.kind[1].split(TOGETHER)
        return (self,) if len(names) == 1 else tuple(self.of_teacher(name, f"{self.id}@{name}") for name in names)

    def of_teacher(self, name: str, unit_id: str) -> Unit:
        """The same sequences, scored by others."""
        return Unit(unit_id, tuple(replace(sequence, teacher=name) for sequence in self.sequences))

    def tokens_hash(self) -> str:
        """Identifies the exact tokens and rows a block was made for."""
        return hash_tokens(self.sequences)


@dataclass(frozen=True, slots=True)
class RowIds:
    """Ids that somebody chose for each loss row of a unit, on which a teacher is then asked for log-probabilities."""

    tokens_hash: str  # of the unit
    ids: np.ndarray  # int32 [N, K]: different ids of a row, at least one, then -1 from where it has no more

    def of_sequences(self, unit: Unit) -> list[np.ndarray]:
        """int32 [n, K] of each sequence that has loss rows."""
        borders = np.cumsum([s.num_loss_tokens for s in unit.sequences if s.num_loss_tokens])
        return np.split(self.ids, borders[:-1])


def hash_tokens(sequences: AbstractSequence[Sequence]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in sequences:
        digest.update(np.int64(sequence.num_tokens).tobytes())
        digest.update(np.ascontiguousarray(sequence.token_ids, dtype=np.int32).tobytes())
        digest.update(np.packbits(sequence.loss_mask).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LabelHeader:
    """What a block's numbers mean. Blocks of one task and teacher have equal headers but for `weights_version`: a
    teacher may move while the student learns."""

    teacher: str
    weights_version: str
    encoding: Labels  # its parameters
    tokenizer_fingerprint: str
    vocabulary_size: int  # V
    hidden_size: int  # H, of what the teacher's head reads
    dtype: str  # of the teacher's hidden states, a name of torch


@dataclass(frozen=True, slots=True)
class SoftLabelBlock:
    """The labels of one unit as flat arrays; rows in sequence order, inside a sequence in token order.

    The same bytes in memory, on the wire and on disk.
    """

    header: LabelHeader
    tokens_hash: str
    columns: Mapping[str, np.ndarray]  # each [N, width], a ragged one flat [R]; bfloat16 travels as uint16 bits
    row_offsets: np.ndarray  # int64 [S + 1]: sequence s owns rows row_offsets[s] : row_offsets[s + 1]

    @property
    def num_rows(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


@dataclass(frozen=True, slots=True)
class StoreUse:
    """What the label store gave to a unit: sequences with labels that it held, and that it did not."""

    hits: int
    misses: int
    num_bytes: int  # of labels, read


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What the controller reads of a scored unit; the block itself never passes through it."""

    unit_id: str
    tokens_hash: str
    replica: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    num_non_finite: int
    mean_mass: float  # mean probability mass the encoding kept (1.0 for dense and hidden labels)
    score_s: float  # from the first request of the unit entering the engine to its last row leaving it
    started_s: float  # wall clock (time.time) of the first request, for the timeline
    mean_entropy: float | None = None  # of the labels, nats per row; None: the encoding does not tell
    store: StoreUse | None = None  # None: there is none, or it was not asked
    notes: tuple[str, ...] = ()  # what a person should know


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
class PairedLogProbs:
    """Log-probabilities of student and teacher over one shared set of events; each row sums to one in both.

    `exhaustive` is True where the events are the whole vocabulary; where False the last event is the lumped tail,
    and every divergence is then a lower bound of the one over the vocabulary (data processing inequality).
    """

    student: torch.Tensor  # float32 [N, E], carries the gradient
    teacher: torch.Tensor  # float32 [N, E]
    exhaustive: bool
    student_scores: torch.Tensor | None = None  # float32 [N, E], what `student` is the log-softmax of
    ids: torch.Tensor | None = None  # int64 [N, E - 1] of the events before the tail; None: no tail, event e is id e
    teacher_entropy: torch.Tensor | None = None  # float32 [N], in nats, where `teacher` is an estimate that has another
    teacher_target: torch.Tensor | None = None  # float32 [N], of the target id, where that may lie in the tail


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

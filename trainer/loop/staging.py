"""A rank's labels on their way to its device: checked and packed in the background, taken by the step they belong to.

Nothing here is collective. Staging runs in threads beside a running step, which only ever takes what is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from configs.held_out import held_out_sets
from configs.labels import HELD_OUT, Labels
from configs.models import Teacher
from configs.schema import Run
from trainer.align.aligner import SharedIds
from trainer.align.blocks import ALIGNED_COLUMN, to_student_rows
from trainer.checks.trained import MAX_SEQUENCES, TrainedBatch, choose
from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, load_encoding
from trainer.loop.chosen_ids import ChosenIds
from trainer.loop.packing import Layouts, check_block, check_finite, layout_of, pack, parts_of, to_device
from trainer.loop.plan import plan_step
from trainer.loop.settings import every
from trainer.loop.together import Packable, Scored, names_of, packable
from trainer.losses.ensemble import target_logprobs
from trainer.model.head import Head
from trainer.model.load import load_teacher_head
from trainer.types import LabelHeader, RankBatch, SoftLabelBlock, TaskTotals, TokenBatch, Unit


class Vocabulary(Protocol):
    """What the student needs of `trainer.data.vocabulary.SharedVocabulary`."""

    size: int
    fingerprint: str

    def of_teacher(self, name: str) -> Vocabulary:
        """By which a teacher reads."""
        ...


@dataclass(frozen=True, slots=True)
class StagedStep:
    """One rank's share of a step, in host memory (pinned where a device copies from it)."""

    micro_batches: tuple[TokenBatch, ...]
    num_tokens: int  # of this rank
    totals: Mapping[str, TaskTotals]  # by task, of all ranks
    shown: TrainedBatch | None = None  # what an evaluation after the step shows of it; None where there is none

    @property
    def num_loss_tokens(self) -> int:
        """Of all ranks and tasks."""
        return sum(task.num_loss_tokens for task in self.totals.values())


@dataclass(frozen=True, slots=True)
class HeldOutBatch:
    """Held-out sequences packed together: (position among the rank's sequences, unit, sequence inside it), in order."""

    batch: TokenBatch
    members: tuple[tuple[int, Unit, int], ...]


class Staging:
    """What has arrived at one rank and was not trained yet, its held-out rows, and the heads of teachers."""

    def __init__(self, run: Run, *, vocabulary: Vocabulary, device: torch.device, last_step: int = 0) -> None:
        """`last_step`: of the run, after which it is evaluated."""
        self._run = run
        self._last_step = last_step
        self._tasks = run.resolved_tasks()
        self._teachers = run.teachers_by_name()
        self._vocabulary = vocabulary
        self._device = device
        self._pin = device.type != "cpu"
        self._lock = threading.Lock()
        self._headers: dict[tuple[str, tuple[str, str]], LabelHeader] = {}  # the first of a purpose, task and teacher
        self._steps: dict[int, StagedStep] = {}
        self.shown: TrainedBatch | None = None  # of the last step that was taken, where it is evaluated
        self.chosen = ChosenIds()
        self.held_out: tuple[HeldOutBatch, ...] = ()
        self._shared: dict[str, SharedIds] = {}  # by teacher, of those with another vocabulary
        self._common: dict[str, Mapping[str, SharedIds]] = {}  # by teachers that are asked together
        self._heads: dict[str, Head] = {}  # of the teachers whose hidden states came here

    def stage(self, batch: RankBatch, blocks: AbstractSequence[SoftLabelBlock]) -> None:
        """Keep a step; again replaces it. `blocks` are those of what was asked (`Unit.asked`) about the units whose
        task has labels, in order.

        Raises `UnitRejected` naming the unit whose labels are not what was asked.
        """
        labels = {name: task.trained_labels for name, task in self._tasks.items()}
        asked = [one for unit in batch.units if labels[unit.kind[0]] is not None for one in unit.asked()]
        layouts = self._check("training", asked, blocks, [labels[one.kind[0]] for one in asked])
        for one, block in zip(asked, blocks, strict=True):
            if self._tasks[one.kind[0]].soft_labels.takes_ids:
                self.chosen.check(batch.step, one, block)
        ready = packable(
            batch.units,
            {one.id: to_student_rows(one, block) for one, block in zip(asked, blocks, strict=True)},
            layouts,
            ensembles={name: task.ensemble for name, task in self._tasks.items()},
            pick=partial(self._pick, layouts),
        )
        packed = tuple(
            pack(ready.units, ready.moved(members), ready.blocks, layouts=ready.layouts, pin=self._pin)
            for members in batch.micro_batches
        )
        tokens = sum(unit.num_tokens for unit in batch.units)
        self._steps[batch.step] = StagedStep(packed, tokens, batch.totals, self._shown(batch, ready))

    def take(self, step: int) -> StagedStep:
        """The step's batches, which are forgotten here."""
        staged = self._steps.pop(step)
        self.shown = staged.shown
        return staged

    @property
    def num_shown(self) -> int:
        """Texts of a step that are shown at most: as many as of held-out rows, one of each task if there are more."""
        most = self._run.report.viewer_sequences
        return min(max(most, len(self._tasks)), MAX_SEQUENCES) if most else 0

    def _shown(self, batch: RankBatch, ready: Packable) -> TrainedBatch | None:
        """A few sequences of a step that is evaluated, packed by themselves: their labels outlive the step."""
        if not self.num_shown or not (
            batch.step == self._last_step or every(self._run.training.evaluate_every, batch.step)
        ):
            return None
        places = [(u, s) for u, unit in enumerate(batch.units) for s in range(len(unit.sequences))]
        places = [place for place in places if self._tasks[batch.units[place[0]].kind[0]].trained_labels is not None]
        chosen = choose(
            [batch.units[u].sequences[s] for u, s in places],
            most=self.num_shown,
            token_budget=self._run.training.micro_batch_tokens,
        )
        if not chosen:
            return None
        moved = ready.moved([places[i] for i in chosen])
        packed = pack(ready.units, moved, ready.blocks, layouts=ready.layouts, pin=self._pin)
        in_order = [place for part in parts_of(ready.units, moved) for place in part]
        return TrainedBatch(batch.step, packed, tuple(ready.units[u].sequences[s] for u, s in in_order))

    @property
    def vocabulary_size(self) -> int:
        """Of the student."""
        return self._vocabulary.size

    def teacher_head(self, teacher: str) -> Head | None:
        """Of the teacher that a part names; None where none of its hidden states came here."""
        return self._heads.get(teacher)

    def shared_ids(self, teacher: str) -> SharedIds | None:
        """With a teacher's vocabulary; None of one that has the student's and is not aligned."""
        name = self._teacher(teacher).name
        vocabulary = self._vocabulary.of_teacher(name)
        if vocabulary is self._vocabulary:
            return None
        if name not in self._shared:
            table = vocabulary.student_ids
            self._shared[name] = SharedIds.of(table, num_student=self._vocabulary.size, device=self._device)
        return self._shared[name]

    def common_ids(self, teachers: str) -> Mapping[str, SharedIds]:
        """With the vocabularies of several teachers, by name: the ids that all have. Empty where none is aligned."""
        names = names_of(teachers)
        tables = {name: self._vocabulary.of_teacher(name) for name in names}
        if any(one is self._vocabulary for one in tables.values()):
            return {}
        if teachers not in self._common:
            of_each = {name: one.student_ids for name, one in tables.items()}
            self._common[teachers] = SharedIds.common(of_each, num_student=self._vocabulary.size, device=self._device)
        return self._common[teachers]

    def stage_held_out(self, units: AbstractSequence[Unit], blocks: AbstractSequence[SoftLabelBlock | None]) -> None:
        """Keep the rank's held-out units, packed by the training's token budget, each batch of one task and teacher.
        `blocks` are those of what was asked about each, in order; that of a unit that nobody scores is None."""
        asked = [one for unit in units for one in unit.asked()]
        scored = [(one, block) for one, block in zip(asked, blocks, strict=True) if block is not None]
        layouts = self._check("evaluation", [u for u, _ in scored], [b for _, b in scored], [HELD_OUT] * len(scored))
        ready = packable(
            units,
            {one.id: to_student_rows(one, block) for one, block in scored},
            layouts,
            ensembles={name: one.task.ensemble for name, one in held_out_sets(self._run).items()},
            pick=partial(self._pick, layouts),
            merge_picked=True,
        )
        places = [(u, s) for u, unit in enumerate(units) for s in range(len(unit.sequences))]
        held_out = []
        for kind in dict.fromkeys(unit.kind for unit in units):
            own = [index for index, (u, _) in enumerate(places) if units[u].kind == kind]
            lengths = [units[places[i][0]].sequences[places[i][1]].num_tokens for i in own]
            budget = max(self._run.training.micro_batch_tokens, *lengths, 1)
            for group in plan_step(lengths, world=1, token_budget=budget).micro_batches[0]:
                members = [own[i] for i in group]
                chosen = ready.moved([places[i] for i in members])
                batch = pack(ready.units, chosen, ready.blocks, layouts=ready.layouts, pin=self._pin)
                held_out.append(HeldOutBatch(batch, tuple((i, units[places[i][0]], places[i][1]) for i in members)))
        self.held_out = tuple(held_out)

    def _pick(self, layouts: Layouts, scored: AbstractSequence[Scored]) -> np.ndarray:
        """Of each sequence [S] the teacher with the highest log-probability of its target ids; of equal ones the
        first."""
        sums = []
        for unit, block in scored:
            everything = [(0, index) for index in range(len(unit.sequences))]
            batch = to_device(pack([unit], everything, [block], layouts=layouts), self._device)
            (part,) = batch.parts
            logprobs = target_logprobs(
                load_encoding(block.header.encoding),
                part.labels,
                batch.target_ids,
                self.teacher_head(unit.kind[1]),
                vocabulary_size=self._vocabulary.size,
                chunk_rows=self._run.student.loss_chunk_rows,
            )
            sums.append(logprobs.new_zeros(len(unit.sequences)).index_add_(0, part.row_sequences, logprobs).cpu())
        return np.argmax(torch.stack(sums).numpy(), axis=0)

    def _check(
        self,
        purpose: str,
        units: AbstractSequence[Unit],
        blocks: AbstractSequence[SoftLabelBlock],
        labels: AbstractSequence[Labels],
    ) -> dict[tuple[str, str], tuple[Column, ...]]:
        """The layout of each task and teacher, after checking every block against what was asked for its unit; of
        aligned rows with the column that says so."""
        assert len(units) == len(blocks), (len(units), len(blocks))
        layouts: dict[tuple[str, str], tuple[Column, ...]] = {}
        for unit, block, wanted in zip(units, blocks, labels, strict=True):
            # The first header is held against the run, all later ones against the first.
            header = self._headers.setdefault((purpose, unit.kind), block.header)
            if unit.kind not in layouts:
                self._check_header(unit, header, wanted)
                encoding = load_encoding(wanted)
                layouts[unit.kind] = layout_of(encoding, block)
                if encoding.needs == "hidden":
                    self._load_teacher_head(unit.kind[1], getattr(torch, header.dtype))
            check_block(unit.as_read(), block, header=header, layout=layouts[unit.kind])
            check_finite(unit, block, layout=layouts[unit.kind])
        aligned = {unit.kind for unit in units if unit.sequences[0].reading is not None}
        return {kind: (*layout, ALIGNED_COLUMN) if kind in aligned else layout for kind, layout in layouts.items()}

    def _check_header(self, unit: Unit, header: LabelHeader, labels: Labels) -> None:
        meant = (header.teacher, header.vocabulary_size, header.tokenizer_fingerprint)
        name = self._teacher(unit.kind[1]).name
        vocabulary = self._vocabulary.of_teacher(name)
        wanted = (name, vocabulary.size, vocabulary.fingerprint)
        if header.encoding != labels or meant != wanted:
            raise UnitRejected(f"unit {unit.id}: its labels are {header}, this run needs {labels!r} of {wanted}")

    def _teacher(self, name: str) -> Teacher:
        return self._teachers[name] if name else next(iter(self._teachers.values()))

    def _load_teacher_head(self, name: str, dtype: torch.dtype) -> None:
        """Once, in the dtype of the teacher's hidden states, which is that of its own head."""
        with self._lock:
            if name not in self._heads:
                teacher = self._teacher(name)
                size = self._vocabulary.of_teacher(teacher.name).size
                self._heads[name] = load_teacher_head(
                    teacher.model, vocabulary_size=size, dtype=dtype, device=self._device
                )

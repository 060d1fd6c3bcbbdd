"""A rank's labels on their way to its device: checked and packed in the background, taken by the step they belong to.

Nothing here is collective. Staging runs in threads beside a running step, which only ever takes what is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Protocol

import torch

from configs.labels import HELD_OUT, Labels
from configs.schema import Run
from trainer.errors import UnitRejected
from trainer.labels.encoding import Column, load_encoding
from trainer.loop.packing import check_block, check_finite, layout_of, pack
from trainer.loop.plan import plan_step
from trainer.model.head import Head
from trainer.model.load import load_teacher_head
from trainer.types import LabelHeader, RankBatch, SoftLabelBlock, TokenBatch, Unit


class Vocabulary(Protocol):
    """What the student needs of `trainer.data.vocabulary.SharedVocabulary`."""

    size: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class StagedStep:
    """One rank's share of a step, in host memory (pinned where a device copies from it)."""

    micro_batches: tuple[TokenBatch, ...]
    num_tokens: int  # of this rank
    num_loss_tokens: int  # of all ranks


@dataclass(frozen=True, slots=True)
class HeldOutBatch:
    """Held-out sequences packed together: (position among the rank's sequences, unit, sequence inside it), in order."""

    batch: TokenBatch
    members: tuple[tuple[int, Unit, int], ...]


class Staging:
    """What has arrived at one rank and was not trained yet, its held-out rows, and the teacher's head."""

    def __init__(self, run: Run, *, vocabulary: Vocabulary, device: torch.device) -> None:
        self._run = run
        self._vocabulary = vocabulary
        self._device = device
        self._pin = device.type != torch.empty(0).device.type
        self._lock = threading.Lock()
        self._headers: dict[str, LabelHeader] = {}  # of the labels to train on, and of the held-out ones
        self._steps: dict[int, StagedStep] = {}
        self.labels = run.labels
        self.held_out: tuple[HeldOutBatch, ...] = ()
        self.teacher_head: Head | None = None  # of hidden labels only

    def stage(self, batch: RankBatch, blocks: AbstractSequence[SoftLabelBlock]) -> None:
        """Keep a step; again replaces it. Raises `UnitRejected` naming the unit whose labels are not what was asked."""
        layout = self._check("training", batch.units, blocks, self.labels)
        packed = tuple(
            pack(batch.units, members, blocks, layout=layout, pin=self._pin) for members in batch.micro_batches
        )
        tokens = sum(unit.num_tokens for unit in batch.units)
        self._steps[batch.step] = StagedStep(packed, tokens, batch.num_loss_tokens)

    def take(self, step: int) -> StagedStep:
        """The step's batches, which are forgotten here."""
        return self._steps.pop(step)

    def stage_held_out(self, units: AbstractSequence[Unit], blocks: AbstractSequence[SoftLabelBlock]) -> None:
        """Keep the rank's held-out units, packed by the training's token budget."""
        layout = self._check("evaluation", units, blocks, HELD_OUT)
        places = [(u, s) for u, unit in enumerate(units) for s in range(len(unit.sequences))]
        lengths = [units[u].sequences[s].num_tokens for u, s in places]
        budget = max(self._run.training.micro_batch_tokens, *lengths, 1)
        self.held_out = tuple(
            HeldOutBatch(
                batch=pack(units, [places[i] for i in group], blocks, layout=layout, pin=self._pin),
                members=tuple((i, units[places[i][0]], places[i][1]) for i in group),
            )
            for group in plan_step(lengths, world=1, token_budget=budget).micro_batches[0]
            if group
        )

    def _check(
        self, purpose: str, units: AbstractSequence[Unit], blocks: AbstractSequence[SoftLabelBlock], spec: Labels
    ) -> tuple[Column, ...]:
        """The layout of the blocks, after checking every one of them."""
        assert len(units) == len(blocks), (len(units), len(blocks))
        if not blocks:
            return ()
        encoding = load_encoding(spec)
        # The first header of a purpose is held against the run, all later ones against the first.
        header = self._headers.setdefault(purpose, blocks[0].header)
        meant = (header.teacher, header.vocabulary_size, header.tokenizer_fingerprint)
        wanted = (self._run.teacher.name, self._vocabulary.size, self._vocabulary.fingerprint)
        if header.encoding != spec or meant != wanted:
            raise UnitRejected(f"unit {units[0].id}: its labels are {header}, this run needs {spec!r} of {wanted}")
        layout = layout_of(encoding, blocks[0])
        for unit, block in zip(units, blocks, strict=True):
            check_block(unit, block, header=header)
            check_finite(unit, block, layout=layout)
        if encoding.needs == "hidden":
            self._load_teacher_head(layout[0].dtype)
        return layout

    def _load_teacher_head(self, dtype: torch.dtype) -> None:
        """Once, in the dtype of the teacher's hidden states, which is that of its own head."""
        with self._lock:
            if self.teacher_head is None:
                self.teacher_head = load_teacher_head(
                    self._run.teacher.model, vocabulary_size=self._vocabulary.size, dtype=dtype, device=self._device
                )

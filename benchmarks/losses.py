"""CPU time and memory of the loss of one micro-batch, by encoding and divergence, beside the formula as it is written
and Liger's chunked loss (arXiv 2410.10989), where the package liger-kernel is installed.

All sides take their turn in every round, on the same rows; ratios are of times within one round, since a machine that
others use changes its speed from second to second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional

from benchmarks.cells import allowed, divergences, encode, encodings
from configs.labels import Labels
from configs.losses import Term
from trainer.labels.encoding import load_encoding
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

NAIVE = "naive"
"""forward_kl by log_softmax, kl_div and autograd over [rows, vocabulary], from the teacher's hidden states."""
LIGER = "liger"
"""Its jsd and, at beta = 0, forward_kl from the teacher's hidden states, uncompiled, in its own chunks of 1024 rows."""


@dataclass(frozen=True, slots=True)
class LossPlan:
    rows: int
    vocabulary: int
    width: int
    rounds: int
    kinds: tuple[str, ...]  # of labels; empty: all
    chunk_rows: int = 512
    losses: tuple[str, ...] = ()  # empty: all
    dtype: str = "float32"  # of hidden states and heads


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward and backward pass of one side."""

    kind: str
    loss: str
    round: int
    cpu_s: float
    peak_bytes: int  # beyond what lay there before, and beyond the gradients that are left


@dataclass(frozen=True, slots=True)
class LossResult:
    plan: LossPlan
    turns: tuple[Turn, ...]

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((turn.kind, turn.loss) for turn in self.turns))

    def times(self, kind: str, loss: str) -> list[float]:
        return [turn.cpu_s for turn in self.turns if (turn.kind, turn.loss) == (kind, loss)]

    def ratio(self, kind: str, loss: str, to: tuple[str, str]) -> float:
        """Median over the rounds of the CPU time by that of another side."""
        return median(ours / theirs for ours, theirs in zip(self.times(kind, loss), self.times(*to), strict=True))

    def peak(self, kind: str, loss: str) -> int:
        return max(turn.peak_bytes for turn in self.turns if (turn.kind, turn.loss) == (kind, loss))

    def numbers(self) -> list[dict[str, Any]]:
        return [
            {
                "labels": kind,
                "loss": loss,
                "cpu_s": median(self.times(kind, loss)),
                "to_forward_kl": self.ratio(kind, loss, (kind, "forward_kl")),
                "to_naive": self.ratio(kind, loss, (NAIVE, "forward_kl")),
                "peak_bytes": self.peak(kind, loss),
                "peak_to_naive": self.peak(kind, loss) / max(1, self.peak(NAIVE, "forward_kl")),
            }
            for kind, loss in self.sides
        ]

    def to_json(self) -> dict[str, Any]:
        names = ("rows", "vocabulary", "width", "rounds", "chunk_rows", "dtype")
        return {
            **{name: getattr(self.plan, name) for name in names},
            "threads": torch.get_num_threads(),
            "sides": self.numbers(),
        }

    def table(self) -> Table:
        shape = f"{self.plan.rows} rows, V = {self.plan.vocabulary}, H = {self.plan.width}, {self.plan.dtype}"
        table = Table("labels", "loss", "CPU s", "x forward_kl", "x naive", "peak MB", "x naive", title=shape)
        for one in self.numbers():
            ratios = [f"{one[name]:.2f}" for name in ("cpu_s", "to_forward_kl", "to_naive")]
            peak = f"{one['peak_bytes'] / 1e6:.0f}", f"{one['peak_to_naive']:.2f}"
            table.add_row(one["labels"], one["loss"], *ratios, *peak)
        return table


def losses(plan: LossPlan, *, note: Callable[[str], None]) -> LossResult:
    """All sides in turns, after a round that is not counted."""
    batch = Batch.of(plan)
    sides = {(NAIVE, "forward_kl"): batch.naive} | batch.liger(note)
    for labels in encodings():
        if not plan.kinds or labels.kind in plan.kinds:
            columns = batch.labels(labels)
            for term in divergences():
                if allowed(term, labels) and term.loss in (plan.losses or (term.loss,)):
                    sides[labels.kind, term.loss] = batch.side(labels, term, columns)
    turns = []
    for number in range(-1, plan.rounds):
        for (kind, loss), run in sides.items():
            batch.student.grad = batch.weight.grad = None
            cpu_s, peak = _measured(run)
            peak -= sum(leaf.grad.nbytes for leaf in (batch.student, batch.weight) if leaf.grad is not None)
            if number >= 0:
                turns.append(Turn(kind, loss, number, cpu_s, peak))
        note(f"round {number + 1} of {plan.rounds}" if number >= 0 else "warmed up")
    return LossResult(plan, tuple(turns))


@dataclass(frozen=True, slots=True)
class Batch:
    """Hidden states and heads of made-up models: a teacher and a student near it."""

    plan: LossPlan
    student: torch.Tensor
    weight: torch.Tensor
    teacher: torch.Tensor
    head: Head
    target_ids: torch.Tensor

    @classmethod
    def of(cls, plan: LossPlan) -> Batch:
        g, dtype = torch.Generator().manual_seed(0), getattr(torch, plan.dtype)
        teacher = torch.randn(plan.rows, plan.width, generator=g)
        weight = torch.randn(plan.vocabulary, plan.width, generator=g) * (3 / plan.width**0.5)
        student = teacher + 0.3 * torch.randn(plan.rows, plan.width, generator=g)
        student, weight, teacher = (made.to(dtype) for made in (student, weight, teacher))
        target_ids = torch.randint(plan.vocabulary, (plan.rows,), generator=g)
        head = Head(weight.clone(), None, HeadShape(), plan.vocabulary)
        return cls(plan, student.requires_grad_(), weight.requires_grad_(), teacher, head, target_ids)

    def labels(self, labels: Labels) -> dict[str, torch.Tensor]:
        encoding, chunks, made = load_encoding(labels), self.plan.chunk_rows, []
        for start in range(0, self.plan.rows, chunks):
            rows = slice(start, start + chunks)
            source = self.teacher[rows] if encoding.needs == "hidden" else self.head.logits(self.teacher[rows])
            student = self.head.logits(self.student.detach()[rows]) if encoding.takes_ids else source
            made.append(encode(encoding, source, student, self.target_ids[rows]))
        return {name: torch.cat([columns[name] for columns in made]) for name in made[0]}

    def side(self, labels: Labels, term: Term, columns: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        encoding = load_encoding(labels)
        part = LossPart(
            slice(0, self.plan.rows), columns, encoding, Objective.of((term,), encoding), 1 / self.plan.rows, self.head
        )
        return lambda: (
            head_loss(
                self.student,
                self.weight,
                None,
                self.target_ids,
                head_shape=HeadShape(),
                vocabulary_size=self.plan.vocabulary,
                parts=[part],
                chunk_rows=self.plan.chunk_rows,
            ).loss
        )

    def naive(self) -> torch.Tensor:
        student = functional.linear(self.student, self.weight).float().log_softmax(-1)
        with torch.no_grad():
            teacher = functional.linear(self.teacher, self.head.weight).float().log_softmax(-1)
        return functional.kl_div(student, teacher, log_target=True, reduction="sum") / self.plan.rows

    def liger(self, note: Callable[[str], None]) -> dict[tuple[str, str], Callable[[], torch.Tensor]]:
        """Its sides; none where it is not installed."""
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        except ImportError:
            note("without Liger's chunked loss: pip install --no-deps liger-kernel")
            return {}

        def side(beta: float) -> Callable[[], torch.Tensor]:
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
            return lambda: loss(self.student, self.weight, self.teacher, self.head.weight, self.target_ids)

        return {(LIGER, loss): side(beta) for loss, beta in (("forward_kl", 0.0), ("jsd", 0.5))}


def _measured(run: Callable[[], torch.Tensor]) -> tuple[float, int]:
    """(CPU seconds of forward and backward, bytes at the peak beyond what was there before)."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before, started = _status_bytes("VmRSS"), time.process_time()
    torch.autograd.backward(run())
    return time.process_time() - started, _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    """Of this process; 0 where the system does not tell."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)

"""The arithmetic floor of `benchmarks distil` and `scoring`: what the same work costs as nothing but its arithmetic.

    products   every linear layer at its very shape and the rows of a step, by the faster of both libraries; the
               student's three times (forward, gradient of inputs, of weights), heads over the rows that have a loss
    passes     the logits read once; with hidden labels the teacher's too
    optimizer  the bytes of AdamW: weight, gradient and two moments read, all but the gradient written

A side's multiple of it says how near it is to what the processor can do, whatever the processor. Attention, norms,
embeddings and activations are left out, so that nothing reaches 1. So are copies into another layout and clearing the
pages of a result: matrices lie as the library likes them, and memory is kept. Measured in a process of its own, in
turns with the sides, on one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.model.fast.product import MULTIPLY

TURNS = 3  # the first only warms up
ADAMW_TENSORS = 7  # of float32, read or written for each weight


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of one model: linear layers of its body as (outputs, inputs) with their number, its head, its weights."""

    layers: tuple[tuple[int, int, int], ...]  # m, k, count
    head: tuple[int, int]  # V, H
    weights: int

    @classmethod
    def of(cls, folder: Path) -> Shapes:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        head = model.get_output_embeddings()
        layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
        counted = Counter(tuple(one.weight.shape) for one in layers)
        return cls(
            layers=tuple((m, k, count) for (m, k), count in counted.items()),
            head=tuple(head.weight.shape),
            weights=sum(parameter.numel() for parameter in model.parameters()),
        )


@dataclass(frozen=True, slots=True)
class FloorSetup:
    teacher: Shapes
    student: Shapes | None  # None where there is none: its parts are 0
    dtype: str
    tokens: int  # of a step
    chunk_rows: int  # of a head


@dataclass(frozen=True, slots=True)
class Floor:
    """CPU-seconds of the parts, as they were measured in one turn."""

    teacher_body: float  # per token, as all below but the last
    teacher_head: float  # its product and one pass
    student_forward: float
    student_backward: float
    student_head: float  # its product and one pass
    student_head_backward: float
    optimizer: float  # per step

    def teacher_s(self, labels: str, *, tokens: int, rows: int) -> float:
        """Of the teacher's role. `hidden` labels leave its head to the student."""
        return tokens * self.teacher_body + (0.0 if labels == "hidden" else rows * self.teacher_head)

    def student_s(self, labels: str, *, tokens: int, rows: int, steps: int) -> float:
        """Of the student's role. `given_ids` labels take a forward pass more, which chooses the ids."""
        forward = tokens * self.student_forward + rows * self.student_head
        backward = tokens * self.student_backward + rows * self.student_head_backward
        more = {"hidden": rows * self.teacher_head, "given_ids": forward}.get(labels, 0.0)
        return forward + backward + more + steps * self.optimizer


def prepare(setup: FloorSetup) -> Callable[[None], Floor]:
    """A worker's end: every question is one turn."""
    torch.set_num_threads(1)
    dtype = getattr(torch, setup.dtype)
    multiply = MULTIPLY if dtype is torch.float32 and torch.backends.mkldnn.is_available() else {"": _mm}

    def product(n: int, m: int, k: int, layout: str) -> float:
        x, w, d = (torch.full(shape, 0.5, dtype=dtype) for shape in ((n, k), (m, k), (n, m)))
        a, b = {"nt": (x, w), "nn": (d, w.t()), "tn": (d.t(), x.t())}[layout]
        laid = [(a, b)] if a.is_contiguous() and b.is_contiguous() else [(a, b), (a.contiguous(), b.contiguous())]
        return min(_seconds(lambda one=one, pair=pair: one(*pair)) for one in multiply.values() for pair in laid)

    def body(shapes: Shapes, *layouts: str) -> float:
        spent = {(m, k): sum(product(setup.tokens, m, k, one) for one in layouts) for m, k, _ in shapes.layers}
        return sum(count * spent[m, k] for m, k, count in shapes.layers) / setup.tokens

    def head(shapes: Shapes, *layouts: str) -> float:
        return sum(product(setup.chunk_rows, *shapes.head, one) for one in layouts) / setup.chunk_rows

    def one_pass(shapes: Shapes) -> float:
        logits = torch.full((setup.chunk_rows, shapes.head[0]), 0.5, dtype=dtype)
        return _seconds(logits.sum) / setup.chunk_rows

    def answer(_: None) -> Floor:
        teacher = body(setup.teacher, "nt"), head(setup.teacher, "nt") + one_pass(setup.teacher)
        if setup.student is None:
            return Floor(*teacher, 0.0, 0.0, 0.0, 0.0, 0.0)
        return Floor(
            *teacher,
            student_forward=body(setup.student, "nt"),
            student_backward=body(setup.student, "nn", "tn"),
            student_head=head(setup.student, "nt") + one_pass(setup.student),
            student_head_backward=head(setup.student, "nn", "tn"),
            optimizer=4 * ADAMW_TENSORS * setup.student.weights * _per_byte(),
        )

    return answer


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b.t())


def _per_byte() -> float:
    """Seconds of a byte read or written, of more than any cache holds."""
    numbers = torch.full((2**25,), 0.5)
    return _seconds(lambda: numbers.mul_(1.0)) / (2 * 4 * len(numbers))


def _seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread, the least of a few turns."""
    spent = []
    for _ in range(TURNS):
        started = time.thread_time()
        work()
        spent.append(time.thread_time() - started)
    return min(spent[1:])

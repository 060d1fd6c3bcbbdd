"""How far each divergence with each encoding is from itself over the whole vocabulary, on real models and text.

    teacher, student: logits of the answers' rows  ->  exact value and gradient by the student's logits, float64
                                                   ->  those of each encoding, as a run computes them

Measured, beside what the registry claims, as shares of the exact ones: the bias of the mean value, and of the gradient
the distance of its mean over draws to the exact one. Where labels are drawn, the spread of one draw is told too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.answered import answered
from benchmarks.cells import allowed, divergences, encode, encodings
from configs.labels import Labels
from configs.losses import Term
from launch.report.environment import manifest_environment
from trainer.labels.dense import Encoding as Dense
from trainer.labels.encoding import Encoding, load_encoding
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

BLOCK_ROWS = 32
DRAWS = 64


@dataclass(frozen=True, slots=True)
class ExactnessPlan:
    teacher: Path
    student: Path
    rows: Path  # JSON lines with `prompt` and `completion`, lists of messages
    num_texts: int
    rows_per_text: int
    kinds: tuple[str, ...] = ()  # of labels; empty: all


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of both models at which an answer's next token is known."""

    hidden: torch.Tensor  # float32 [N, H], the teacher's
    head: Head
    student: torch.Tensor  # float32 [N, V] logits
    target_ids: torch.Tensor  # int64 [N]

    def blocks(self) -> Iterator[Rows]:
        for start in range(0, len(self.target_ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield Rows(self.hidden[part], self.head, self.student[part], self.target_ids[part])


def exactness(plan: ExactnessPlan, *, note: Callable[[str], None]) -> dict[str, Any]:
    """Everything that docs/exactness.md is made of; the numbers of a cell by kind of labels and loss."""
    rows = read_rows(plan)
    note(f"{len(rows.target_ids)} rows of {plan.num_texts} texts")
    terms = divergences()
    cells: dict[str, dict[str, Any]] = {}
    for labels in encodings():
        if plan.kinds and labels.kind not in plan.kinds:
            continue
        own = [term for term in terms if allowed(term, labels)]
        cells[labels.kind] = _measured(rows, labels, own)
        note(f"labels: {labels.kind}")
    return {
        "date": date.today().isoformat(),
        "processor": manifest_environment()["hardware"]["processor"],
        "teacher": plan.teacher.name,
        "student": plan.student.name,
        "rows": len(rows.target_ids),
        "texts": plan.num_texts,
        "labels": {labels.kind: labels.flat() for labels in encodings()},
        "terms": {term.loss: term.parameters() for term in terms},
        "cells": cells,
    }


def read_rows(plan: ExactnessPlan) -> Rows:
    """Rows spread evenly over each answer."""
    tokenizer = AutoTokenizer.from_pretrained(plan.teacher)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (plan.teacher, plan.student)]
    hidden, student, target_ids = [], [], []
    for ids, first in islice(answered(plan.rows, tokenizer), plan.num_texts):
        at = torch.linspace(first, len(ids) - 2, plan.rows_per_text).long().unique()
        with torch.no_grad():
            hidden.append(models[0].base_model(ids[None]).last_hidden_state[0, at])
            student.append(models[1](ids[None]).logits[0, at].float())
        target_ids.append(ids[at + 1])
    vocabulary = min(len(tokenizer), student[0].shape[1])
    weight = models[0].get_output_embeddings().weight.detach()
    head = Head(weight, None, HeadShape.of_config(models[0].config), vocabulary)
    return Rows(torch.cat(hidden), head, torch.cat(student)[:, :vocabulary], torch.cat(target_ids))


def _measured(rows: Rows, labels: Labels, terms: list[Term]) -> dict[str, dict[str, float]]:
    """By loss: value, its relative bias, that of the gradient, and the spread of one draw of it."""
    encoding, draws = load_encoding(labels), DRAWS if labels.needs_row_keys else 1
    totals = {term.loss: _Totals() for term in terms}
    for block in rows.blocks():
        teacher = rows.head.logits(block.hidden)
        source = block.hidden if encoding.needs == "hidden" else teacher
        dense = Dense().encode(teacher.double(), block.target_ids)
        made = [encode(encoding, source, block.student, block.target_ids, draw=draw) for draw in range(draws)]
        for term in terms:
            exact = _value_and_gradient(term, Dense(), dense, block, block.student.double())
            found = [_value_and_gradient(term, encoding, one, block, block.student) for one in made]
            totals[term.loss].add(exact, found)
    return {loss: found.numbers() for loss, found in totals.items()}


def _value_and_gradient(
    term: Term, encoding: Encoding, labels: dict[str, torch.Tensor], block: Rows, student: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Both summed over the block's rows: float64 [], [n, V]."""
    logits = student.detach().requires_grad_()
    values, _ = Objective.of((term,), encoding).rows(logits, labels, block.target_ids, encoding, block.head)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return float(values.detach().double().sum()), gradient.double()


class _Totals:
    """Of one cell, over blocks."""

    def __init__(self) -> None:
        self.exact = self.value = self.exact_square = self.bias_square = self.spread_square = self.value_square = 0.0
        self.draws = 1

    def add(self, exact: tuple[float, torch.Tensor], found: list[tuple[float, torch.Tensor]]) -> None:
        self.draws = len(found)
        values = torch.tensor([value for value, _ in found], dtype=torch.float64)
        mean = sum(gradient for _, gradient in found) / len(found)
        self.exact += exact[0]
        self.value += float(values.mean())
        self.exact_square += float(exact[1].square().sum())
        self.bias_square += float((mean - exact[1]).square().sum())
        if len(found) > 1:
            self.spread_square += sum(float((g - mean).square().sum()) for _, g in found) / (len(found) - 1)
            self.value_square += float(values.var()) / len(found)

    def numbers(self) -> dict[str, float]:
        norm = self.exact_square**0.5
        made = {
            "exact": self.exact,
            "value_bias": self.value / self.exact - 1.0,
            "gradient_bias": self.bias_square**0.5 / norm,
        }
        if self.draws > 1:  # what of the distance is the error of a mean of so many draws
            made["value_error"] = self.value_square**0.5 / self.exact
            made["gradient_error"] = (self.spread_square / self.draws) ** 0.5 / norm
            made["gradient_spread"] = self.spread_square**0.5 / norm
        return made

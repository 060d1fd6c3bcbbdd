"""How far each divergence with each encoding is from itself over the whole vocabulary, on real models and text.

    teacher, student: logits of the answers' rows  ->  exact value and gradient by the student's logits, float64
                                                   ->  those of each encoding, as a run computes them

Measured, beside what the registry claims, as shares of the exact ones: the bias of the mean value, and of the gradient
the distance of its mean over draws to the exact one. Where labels are drawn, the spread of one draw is told too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.answered import answered
from benchmarks.cells import allowed, divergences, encode, encodings, sampled_encodings
from benchmarks.exactness_rows import Rows, Totals
from benchmarks.sampled_exactness import measured as measured_samples
from benchmarks.sampled_exactness import sampled_terms
from configs.labels import Labels
from configs.losses import Term
from launch.report.environment import manifest_environment
from trainer.labels.dense import Encoding as Dense
from trainer.labels.encoding import Encoding, load_encoding
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

DRAWS = 64


@dataclass(frozen=True, slots=True)
class ExactnessPlan:
    teacher: Path
    student: Path
    rows: Path  # JSON lines with `prompt` and `completion`, lists of messages
    num_texts: int
    rows_per_text: int
    kinds: tuple[str, ...] = ()  # of labels; empty: all
    losses: tuple[str, ...] = ()  # likewise


def exactness(plan: ExactnessPlan, *, note: Callable[[str], None]) -> dict[str, Any]:
    """Everything that docs/exactness.md is made of; the numbers of a cell by kind of labels and loss."""
    rows = read_rows(plan)
    note(f"{len(rows.target_ids)} rows of {plan.num_texts} texts")
    terms, sampled = divergences(), sampled_terms()
    cells: dict[str, dict[str, Any]] = {}
    for some, kinds, measure in ((terms, encodings(), _measured), (sampled, sampled_encodings(), measured_samples)):
        for labels in kinds:
            own = [term for term in some if allowed(term, labels) and (not plan.losses or term.loss in plan.losses)]
            if own and (not plan.kinds or labels.kind in plan.kinds):
                cells.setdefault(labels.kind, {}).update(measure(rows, labels, own))
                note(f"labels: {labels.kind}, {', '.join(term.loss for term in own)}")
    return {
        "date": date.today().isoformat(),
        "processor": manifest_environment()["hardware"]["processor"],
        "teacher": plan.teacher.name,
        "student": plan.student.name,
        "rows": len(rows.target_ids),
        "texts": plan.num_texts,
        "labels": {labels.kind: labels.flat() for labels in encodings()},
        "terms": {term.loss: term.parameters() for term in (*terms, *sampled)},
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
    totals = {term.loss: Totals() for term in terms}
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

"""What a student has learnt after equal steps: held-out KL under each encoding, and under each divergence.

    teacher, once: hidden states of the answers' rows      -> labels of any encoding, as the teacher's worker makes them
    student, anew for each cell and seed: N steps of AdamW -> held-out KL over the whole vocabulary, after the last step

One process, the product's encodings and objectives on plain transformers: what is compared is what labels and losses
teach, not how fast a run is. A seed decides the order of rows and what is drawn. Finished runs are kept in the file of
results after each, so a benchmark that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.answered import answered
from benchmarks.cells import encode
from configs.labels import LABELS
from configs.losses import LOSSES
from configs.models import Trained
from configs.schema import Optimizer
from launch.report.environment import manifest_environment
from trainer.labels.encoding import load_encoding
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape
from trainer.model.optimizer import learning_rate
from trainer.model.trained import EMBEDDINGS, choose_trained

ENCODINGS: tuple[dict[str, Any], ...] = (
    *({"kind": "topk", "k": k} for k in (4, 16, 64, 256)),
    {"kind": "nucleus"},
    {"kind": "sampled"},
    {"kind": "hidden"},
)
DIVERGENCES: tuple[dict[str, Any], ...] = (
    {"loss": "forward_kl"},
    {"loss": "reverse_kl"},
    {"loss": "jsd", "beta": 0.5},
    {"loss": "skew_forward_kl"},
    {"loss": "skew_reverse_kl"},
    {"loss": "tvd"},
    {"loss": "adaptive_kl"},
    {"loss": "alpha_beta"},
)
BLOCK_ROWS = 64
WHOLE = 32
"""Lengths are multiples of it: oneDNN writes code for every other one that it meets in bfloat16."""
POOL = 2
"""Texts that seeds draw from, as a multiple of those that a run reads."""
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t of a 95 % interval, by the number of seeds."""


@dataclass(frozen=True, slots=True)
class LearningPlan:
    teacher: Path
    student: Path
    train: Path  # JSON lines with `prompt` and `completion`, lists of messages
    held_out: Path
    steps: int
    sequences_per_step: int
    learning_rate: float
    warmup_steps: int
    num_held_out: int
    max_length: int
    dtype: str  # of the student's products: "float32", or "bfloat16" with weights of float32 beside it

    def products(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its answer: row i predicts token i + 1."""

    token_ids: torch.Tensor  # int64 [T]
    first_row: int  # of the answer
    hidden: torch.Tensor  # float32 [T - 1 - first_row, H], the teacher's at the answer's rows

    @property
    def target_ids(self) -> torch.Tensor:
        return self.token_ids[self.first_row + 1 :]


@dataclass(frozen=True, slots=True)
class Cell:
    labels: dict[str, Any]
    objective: dict[str, Any]

    @property
    def name(self) -> str:
        kinds = (list(one.values()) for one in (self.labels, self.objective))
        return ", ".join(" ".join([kind, *(f"{value:g}" for value in values)]) for kind, *values in kinds)


def cells() -> tuple[Cell, ...]:
    """`forward_kl` under each encoding, then the other divergences under exact labels."""
    exact = ENCODINGS[-1]
    first = [Cell(labels, DIVERGENCES[0]) for labels in ENCODINGS]
    return (*first, *(Cell(exact, objective) for objective in DIVERGENCES[1:]))


def learning(
    plan: LearningPlan, seeds: Sequence[int], wanted: Sequence[Cell], out: Path, *, note: Callable[[str], None]
) -> dict[str, Any]:
    """All runs that `out` does not have yet, seed by seed, written after each. Raises `ValueError` where `out` is of
    another plan."""
    found = _begun(plan, out)
    todo = [(seed, cell) for seed in seeds for cell in wanted if str(seed) not in found["cells"].get(cell.name, {})]
    if not todo:
        return found
    material = _Material.of(plan)
    found["before"] = material.held_out_kl(material.student())
    for done, (seed, cell) in enumerate(todo, start=1):
        value = material.learn(cell, seed)
        found["cells"].setdefault(cell.name, {})[str(seed)] = value
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        note(f"{done} of {len(todo)}: {cell.name}, seed {seed}: held-out KL {value:.4f} nats per token")
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; infinite of one value."""
    if len(values) not in T_95:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _begun(plan: LearningPlan, out: Path) -> dict[str, Any]:
    settings = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    settings = {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        if found["plan"] != settings:
            raise ValueError(f"{out} has runs of another plan: {found['plan']}; name another file with --out")
        return found
    processor = manifest_environment()["hardware"]["processor"]
    return {"date": date.today().isoformat(), "processor": processor, "plan": settings, "cells": {}}


@dataclass(frozen=True, slots=True)
class _Material:
    plan: LearningPlan
    train: tuple[Text, ...]
    held_out: tuple[Text, ...]
    head: Head

    @classmethod
    def of(cls, plan: LearningPlan) -> _Material:
        teacher = AutoModelForCausalLM.from_pretrained(plan.teacher, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(plan.teacher)
        pool = POOL * plan.steps * plan.sequences_per_step
        train = tuple(islice(_texts(plan.train, teacher, tokenizer, plan.max_length), pool))
        held_out = tuple(islice(_texts(plan.held_out, teacher, tokenizer, plan.max_length), plan.num_held_out))
        weight = teacher.get_output_embeddings().weight.detach()
        return cls(plan, train, held_out, Head(weight, None, HeadShape.of_config(teacher.config), len(tokenizer)))

    def student(self) -> PreTrainedModel:
        """Anew, with frozen embeddings, as in configs/demo.yaml."""
        student = AutoModelForCausalLM.from_pretrained(self.plan.student, dtype=torch.float32)
        choose_trained(student, Trained(freeze=(EMBEDDINGS,)), revision=None)
        return student

    def learn(self, cell: Cell, seed: int) -> float:
        """Held-out KL after the last step."""
        plan, student = self.plan, self.student()
        torch.manual_seed(seed)
        order = torch.randperm(len(self.train)).tolist()
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = Optimizer(learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps, schedule="cosine")
        loss = _Loss(cell, self.head, seed)
        for step in range(plan.steps):
            at = [order[(step * plan.sequences_per_step + i) % len(order)] for i in range(plan.sequences_per_step)]
            texts = [self.train[i] for i in at]
            rows = sum(len(text.hidden) for text in texts)
            with plan.products():  # around the step: weights are rounded once
                for text in texts:
                    (loss.of(student, text) / rows).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step + 1, settings=schedule, total_steps=plan.steps)
            optimizer.step()
            optimizer.zero_grad()
        return self.held_out_kl(student)

    @torch.no_grad()
    def held_out_kl(self, student: PreTrainedModel) -> float:
        """Mean over the rows of the held-out answers, over the whole vocabulary; nats."""
        total, rows = 0.0, 0
        for text in self.held_out:
            with self.plan.products():
                log_q = _logits(student, _states(student, text), self.head.vocabulary_size).double().log_softmax(1)
            log_p = self.head.logits(text.hidden).double().log_softmax(1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            rows += len(log_p)
        return total / rows


class _Loss:
    """Of one text, summed over the rows of its answer."""

    def __init__(self, cell: Cell, head: Head, seed: int) -> None:
        self._encoding = load_encoding(LABELS.validate(cell.labels))
        self._objective = Objective.of((LOSSES.validate(cell.objective),), self._encoding)
        self._head = head
        self._draw = seed * 1_000_000

    def of(self, student: PreTrainedModel, text: Text) -> torch.Tensor:
        hidden = _states(student, text)
        total = torch.zeros(())
        for start in range(0, len(hidden), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            logits = _logits(student, hidden[part], self._head.vocabulary_size)
            with torch.autocast("cpu", enabled=False):
                total = total + self._of_rows(logits, text.target_ids[part], text.hidden[part])
        return total

    def _of_rows(self, logits: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        source = hidden if self._encoding.needs == "hidden" else self._head.logits(hidden)
        self._draw += 1
        labels = encode(self._encoding, source, logits, targets, draw=self._draw)
        values, _ = self._objective.rows(logits, labels, targets, self._encoding, self._head)
        return values.sum()


def _states(student: PreTrainedModel, text: Text) -> torch.Tensor:
    """Last hidden states at the rows of the answer; what is appended comes after them all."""
    token_ids = torch.nn.functional.pad(text.token_ids, (0, -len(text.token_ids) % WHOLE))
    return student.base_model(token_ids[None]).last_hidden_state[0, text.first_row : len(text.token_ids) - 1]


def _logits(student: PreTrainedModel, hidden: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    return student.get_output_embeddings()(hidden)[:, :vocabulary_size].float()


@torch.no_grad()
def _texts(file: Path, teacher: PreTrainedModel, tokenizer: Any, max_length: int) -> Iterator[Text]:
    """Rows with an answer that are no longer than `max_length`."""
    for ids, first in answered(file, tokenizer):
        if len(ids) <= max_length:
            yield Text(ids, first, teacher.base_model(ids[None]).last_hidden_state[0, first:-1].clone())

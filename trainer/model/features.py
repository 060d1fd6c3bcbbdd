"""Terms on states inside the student: which layers they look at, the projectors that are learnt with it, and their sum.

    base model -> hidden_states of some layers, loss rows only -> projector -> distance to the teacher's -> loss

Layers are numbered as transformers' `hidden_states` are, on both sides (`configs/labels.py`, `layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from configs.losses import Features
from configs.models import ModelSource
from configs.rules import station_place, teacher_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from trainer.errors import ConfigError
from trainer.labels.hidden import Encoding as HiddenEncoding
from trainer.losses.terms import function_of
from trainer.model.head import head_width
from trainer.model.load import StatesCall, load_config
from trainer.types import BatchPart


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of a model, as its configuration says."""

    num_layers: int
    width: int

    @classmethod
    def of(cls, source: ModelSource, *, role: str) -> LayerShape:
        """Raises `ConfigError` where it cannot be known."""
        text = load_config(source, role=role).get_text_config()
        return cls(text.num_hidden_layers, text.hidden_size)


@dataclass(frozen=True, slots=True)
class FeatureTerm:
    """One term of one task."""

    task: str
    term: Features
    width: tuple[int, int]  # of the student's states and of the teacher's
    projector: int | None  # its number

    @classmethod
    def all_of(cls, run: Run) -> tuple[FeatureTerm, ...]:
        """Task by task, in the order of each objective, as `Objective.feature_names` has them. Raises `ConfigError`
        naming the place for layers that are not there and widths that do not fit."""
        found: list[FeatureTerm] = []
        for task in run.resolved_tasks().values():
            for index, term in enumerate(task.objective):
                if isinstance(term, Features):
                    place = f"{station_place(run, task, 'objective')}.{index}"
                    number = sum(one.projector is not None for one in found) if term.projector == "linear" else None
                    found.append(cls(task.name, term, _widths(run, task, term, place), number))
        return tuple(found)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return function_of(self.term)


def _widths(run: Run, task: ResolvedTask, term: Features, place: str) -> tuple[int, int]:
    student = LayerShape.of(run.student.model, role="student.model")
    if term.student_layer > student.num_layers:
        raise ConfigError(
            f"{place}.student_layer: {term.student_layer}, and {run.student.model.path} has layers 0 to "
            f"{student.num_layers}: write one of these"
        )
    widths: dict[int, str] = {}
    for name in task.teachers:
        model = run.teachers_by_name()[name].model
        role = f"{teacher_place(run, name)}.model"
        teacher = LayerShape.of(model, role=role)
        if term.teacher_layer > teacher.num_layers:
            raise ConfigError(
                f"{place}.teacher_layer: {term.teacher_layer}, and {model.path} has layers 0 to {teacher.num_layers}: "
                "write one of these, in labels.layers too"
            )
        if head_width(load_config(model, role=role), trust_remote_code=model.trust_remote_code) != teacher.width:
            raise ConfigError(
                f"{place}.teacher_layer: the states of {model.path} change their width before its head, which labels "
                "do not carry: choose another teacher"
            )
        widths[teacher.width] = name
    if len(widths) > 1:
        told = " and ".join(f"{width} ({name})" for width, name in widths.items())
        raise ConfigError(f"{place}: the teachers of the task differ in width, {told}: give each a task of its own")
    (width,) = widths
    if width != student.width and term.projector == "none":
        raise ConfigError(
            f"{place}: the student's states have {student.width} numbers, the teacher's {width}: write projector: "
            "linear, which is learnt"
        )
    return student.width, width


def make_projectors(terms: Sequence[FeatureTerm], *, dtype: torch.dtype, seed: int) -> torch.nn.ModuleList:
    """A matrix [teacher's width, student's width] for each term that has one, equal on all ranks: the identity where
    both are as wide, else rows or columns that are orthonormal, so that lengths are about kept."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.ModuleList()
    for one in terms:
        if one.projector is not None:
            student, teacher = one.width
            projector = torch.nn.Linear(student, teacher, bias=False, dtype=dtype)
            weight = torch.eye(student)
            if student != teacher:
                weight = torch.nn.init.orthogonal_(torch.empty(teacher, student), generator=generator)
            projector.weight.data.copy_(weight)
            made.append(projector)
    return made


@dataclass(frozen=True, slots=True)
class FeaturesOfBatch:
    """All terms of a micro-batch."""

    terms: tuple[FeatureTerm, ...]
    projectors: torch.nn.ModuleList
    parts: Sequence[BatchPart]
    encodings: Mapping[str, HiddenEncoding]  # by task, of those with terms
    scales: Sequence[float]  # of row terms, by part

    def call(self) -> StatesCall:
        return StatesCall(frozenset(one.term.student_layer for one in self.terms), self._sum)

    def _sum(self, states: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss float32 [], bare sums float64 [terms]) of the student's states [N, H] by layer.

        Every projector is used once, if only on no row: its gradient is reduced over all ranks, and at ZeRO-3 it is
        gathered from all of them."""
        loss = next(iter(states.values())).new_zeros((), dtype=torch.float32)
        sums = []
        for one in self.terms:
            value = loss.new_zeros((), dtype=torch.float64)
            own = [(part, scale) for part, scale in zip(self.parts, self.scales, strict=True) if part.task == one.task]
            student = states[one.term.student_layer]
            given = torch.cat([student[:0], *(student[part.rows] for part, _ in own)])
            if one.projector is not None:
                given = self.projectors[one.projector](given)
            loss = loss + given[:0].float().sum()  # nothing, and yet a gradient where no part has rows
            sizes = [part.rows.stop - part.rows.start for part, _ in own]
            for (part, scale), rows in zip(own, given.split(sizes) if own else (), strict=True):
                teacher = self.encodings[one.task].states_of(part.labels, one.term.teacher_layer)
                values = one.function(rows, teacher, **one.term.parameters())
                if part.row_weights is not None:
                    values = values * part.row_weights
                total = values.sum()
                loss = loss + total.float() * (scale * one.term.weight)
                value = value + total.detach().double()
            sums.append(value)
        return loss, torch.stack(sums)


def check_features(run: Run) -> int:
    """The number of terms on states. Raises `ConfigError` for what cannot be compared."""
    return len(FeatureTerm.all_of(run))

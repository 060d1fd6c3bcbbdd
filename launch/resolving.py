"""A run on given machines: what is read of its models for `cluster.placement.resolve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster import runtime
from cluster.model_files import ModelFiles, find_folder, model_contents
from cluster.placement.facts import KnownModel, RunFacts
from cluster.placement.hardware import Hardware
from cluster.placement.resolve import Resolved, resolve
from cluster.placement.roles import rollouts_of
from configs.models import ModelSource
from configs.rules import teacher_place
from configs.schema import Run
from trainer.model.load import load_config

if TYPE_CHECKING:
    from trainer.loop.inputs import Inputs


def resolve_run(run: Run, inputs: Inputs, hardware: Hardware, *, with_students: bool = True) -> Resolved:
    """All that follows from a run, what was read for it, and the machines."""
    teachers = run.teachers_by_name()
    models = (run.student.model, *(teacher.model for teacher in teachers.values()))
    facts = RunFacts(
        vocabulary_size=inputs.vocabulary.size,
        tokenizer_fingerprint=inputs.vocabulary.fingerprint,
        vocabularies={name: (one.size, one.fingerprint) for name, one in inputs.vocabulary.others.items()},
        student=_known(run.student.model, "student.model"),
        teachers={
            name: _known(teacher.model, f"{teacher_place(run, name)}.model", reads_files=run.store is not None)
            for name, teacher in teachers.items()
        },
        offline=all(Path(model.path).is_dir() for model in models),
        bytecode_folder=runtime.bytecode_folder(),
    )
    return resolve(run, hardware, facts, with_students=with_students)


def sent_bytes(run: Run) -> int:
    """Of the student's weights, where engines take them in, as its files hold them; 0 where they are not here yet."""
    return 0 if rollouts_of(run) is None else _weight_bytes(run.student.model) or 0


def _known(source: ModelSource, role: str, *, reads_files: bool = False) -> KnownModel:
    files = model_contents(source.path, source.revision, place=role) if reads_files else None
    return KnownModel(load_config(source, role=role), _weight_bytes(source), files)


def _weight_bytes(source: ModelSource) -> int | None:
    """None where the weights are not on this machine yet."""
    folder = find_folder(source.path, source.revision)
    return None if folder is None else ModelFiles.of(folder).weight_bytes

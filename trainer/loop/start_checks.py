"""The self-tests at the start of a run: of the students, and of the teacher's labels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import TYPE_CHECKING

from configs.labels import HELD_OUT, Labels, TopK
from trainer.checks.label_check import check_labels, plan_check, some_ids, teacher_lengths, teacher_truth
from trainer.checks.layer_check import check_states, states_truth
from trainer.errors import SelfTestError
from trainer.heap import give_back
from trainer.loop.together import names_of
from trainer.protocols import Observer, SelfTestResult, Session
from trainer.types import Sequence

if TYPE_CHECKING:
    from trainer.loop.job import Job


async def check_students(job: Job, session: Session, observer: Observer) -> tuple[SelfTestResult, ...]:
    """Raises `SelfTestError` where packing, loss or collectives are wrong on this machine."""
    if job.skip_self_test:
        observer.event("self_test_skipped")
        return ()
    return _passed(await session.students.self_test(), observer)


async def check_teachers(job: Job, session: Session, observer: Observer) -> tuple[SelfTestResult, ...]:
    """Raises `SelfTestError` where labels are wrong on this machine. Asks nothing of the students."""
    if job.skip_self_test:
        return ()
    return _passed(await _check_labels(job, session), observer)


def _passed(results: tuple[SelfTestResult, ...], observer: Observer) -> tuple[SelfTestResult, ...]:
    for result in results:
        observer.event("self_test", test=result.name, passed=result.passed, numbers=result.numbers)
    failed = [f"{result.name}: {result.numbers}" for result in results if not result.passed]
    if failed:
        raise SelfTestError(
            "the start-up self-test failed, so training would learn from wrong numbers:\n  "
            + "\n  ".join(failed)
            + "\nEither this machine computes wrongly (a driver, a kernel, an interconnect), or the model's code "
            "does what is not covered here. --skip-self-test trains all the same, and the report says so"
        )
    return results


async def _check_labels(job: Job, session: Session) -> tuple[SelfTestResult, ...]:
    """Of every teacher whose labels a task takes: by the first such task."""
    if job.run.store is not None and job.run.store.mode == "only":
        return (SelfTestResult("labels", True, "from the label store: they were tested where they were made"),)
    results: list[SelfTestResult] = []
    for name, pools in session.teachers.items():
        tasks = [task for task in job.tasks.values() if name in task.teachers and task.soft_labels is not None]
        if pools.scorer is None or not tasks:
            continue
        rows = [row for row in (job.samples or job.evaluation) if not row.teacher or name in names_of(row.teacher)]
        found = await _check_teacher(job, session, name, tasks[0].labels, rows)
        found += await _check_states(job, session, name, rows)
        results += [replace(one, name=f"{one.name} of {name}") for one in found] if job.run.teachers else found
    return tuple(results)


async def _check_teacher(
    job: Job, session: Session, name: str, labels: Labels, rows: AbstractSequence[Sequence]
) -> tuple[SelfTestResult, ...]:
    run, scorer = job.run, session.teachers[name].scorer
    model, dtype = run.teachers_by_name()[name].model, job.teacher_dtypes[name]
    lengths = await asyncio.to_thread(teacher_lengths, model)
    vocabulary = job.inputs.vocabulary.of_teacher(name)
    plan = plan_check([row.as_read(name) for row in rows], lengths=lengths, max_length=run.data.max_length)
    if plan is None:
        return (SelfTestResult("labels", True, "no row with an answer to check on"),)
    unit = plan.unit
    encoding, given = _checked_encoding(labels, vocabulary.size), None
    if encoding.takes_ids:
        given = some_ids(unit, encoding.num_given, vocabulary_size=vocabulary.size)
    asked = [scorer.score(unit, HELD_OUT)]
    asked += [scorer.score(unit, encoding)] if given is None else [scorer.score(unit, encoding, given)]
    (_, hidden), (_, checked) = await asyncio.gather(*asked)
    head, logits = await asyncio.to_thread(teacher_truth, unit, model, vocabulary_size=vocabulary.size, dtype=dtype)
    give_back()  # the whole teacher was here for a moment
    return check_labels(
        unit,
        hidden=await asyncio.to_thread(session.read_block, hidden),
        labels=await asyncio.to_thread(session.read_block, checked),
        teacher_head=head,
        dtype=dtype,
        reference_logits=logits,
        note=plan.note,
    )


async def _check_states(
    job: Job, session: Session, name: str, rows: AbstractSequence[Sequence]
) -> tuple[SelfTestResult, ...]:
    """Of the layers that tasks compare with the student's, if any."""
    asked = [task.labels for task in job.tasks.values() if name in task.teachers and getattr(task.labels, "layers", ())]
    plan = plan_check([row.as_read(name) for row in rows], lengths=(), max_length=job.run.data.max_length)
    if not asked or plan is None:
        return ()
    model, found = job.run.teachers_by_name()[name].model, []
    for labels in dict.fromkeys(asked):
        _, block = await session.teachers[name].scorer.score(plan.unit, labels)
        truth = await asyncio.to_thread(states_truth, plan.unit, model, labels.layers)
        give_back()
        read = await asyncio.to_thread(session.read_block, block)
        found.append(check_states(plan.unit, read, truth, dtype=job.teacher_dtypes[name]))
    return tuple(found)


def _checked_encoding(labels: Labels, vocabulary_size: int) -> Labels:
    """What is held against hidden states: a task's labels, or where those are hidden states some logits, so that the
    teacher's head as it is known here is held against the engine's."""
    if labels.kind != HELD_OUT.kind:
        return labels
    return TopK(k=min(64, vocabulary_size - 1))

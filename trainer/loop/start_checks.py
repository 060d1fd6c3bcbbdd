"""The self-tests at the start of a run: of the students, and of the teacher's labels."""

from __future__ import annotations

import asyncio

from configs.labels import HELD_OUT, Labels, TopK
from trainer.checks.label_check import check_labels, plan_check, teacher_lengths, teacher_truth
from trainer.checks.self_tests import SelfTestResult
from trainer.errors import SelfTestError
from trainer.loop.job import Job
from trainer.protocols import Observer, Session


async def check_start(job: Job, session: Session, observer: Observer) -> tuple[SelfTestResult, ...]:
    """Raises `SelfTestError` where labels, packing, loss or collectives are wrong on this machine."""
    if job.skip_self_test:
        observer.event("self_test_skipped")
        return ()
    results = (*await session.students.self_test(), *await _check_labels(job, session))
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
    run, scorer = job.run, session.teachers[job.run.teacher.name].scorer
    lengths = await asyncio.to_thread(teacher_lengths, run.teacher.model)
    plan = plan_check(job.samples or job.evaluation, lengths=lengths, max_length=run.data.max_length)
    if plan is None:
        return (SelfTestResult("labels", True, "no row with an answer to check on"),)
    unit = plan.unit
    (_, hidden), (_, labels) = await asyncio.gather(
        scorer.score(unit, HELD_OUT), scorer.score(unit, _checked_encoding(job))
    )
    head, logits = await asyncio.to_thread(
        teacher_truth, unit, run.teacher.model, vocabulary_size=job.inputs.vocabulary.size, dtype=job.teacher_dtype
    )
    return check_labels(
        unit,
        hidden=await asyncio.to_thread(session.read_block, hidden),
        labels=await asyncio.to_thread(session.read_block, labels),
        teacher_head=head,
        dtype=job.teacher_dtype,
        reference_logits=logits,
        note=plan.note,
    )


def _checked_encoding(job: Job) -> Labels:
    """What is held against hidden states: the run's labels, or where those are hidden states some logits, so that the
    teacher's head as it is known here is held against the engine's."""
    if job.encoding.kind != HELD_OUT.kind:
        return job.encoding
    return TopK(k=min(64, job.inputs.vocabulary.size - 1))

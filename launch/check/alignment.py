"""What `check` says of teachers with another tokenizer: what both vocabularies share, and how much of real rows that
reaches."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.preflight.finding import Finding, attempt, ok, warning
from configs.rules import station_place
from configs.schema import Run
from trainer.align.share import AlignedShare, covered, described
from trainer.loop.inputs import Inputs, TaskInputs
from trainer.loop.job import Job
from trainer.loop.rows import sample_rows
from trainer.types import Sequence

FEW_DIGITS = 0.5


def alignment(run: Run, inputs: Inputs, *, unreadable: bool = False) -> Iterator[Finding]:
    """Of every aligned task, on some of its training rows, unless those are `unreadable` and told so already."""
    tasks = [task for task in run.resolved_tasks().values() if inputs.tasks[task.name].aligner is not None]
    if not tasks:
        return
    for task in tasks:
        for note in notes_of(inputs.tasks[task.name]):
            yield ok("alignment" if len(tasks) == 1 else f"alignment of {task.name}", note)
    if unreadable:
        yield Finding("not checked", "aligned share", "it needs rows that can be used")
        return
    rows: list[Sequence] = []
    share = AlignedShare({task.name: task.align.min_ratio for task in tasks})

    def look() -> None:
        rows.extend(sample_rows(run, inputs))
        share.add(rows, least_bytes=1)

    def say() -> str:
        found = [f"{described(one)}{_of(run, *named)}" for named, one in share.found.items()]
        return (
            f"of the answers of {len(rows)} rows are aligned: {'; '.join(found)}" if found else "no answers to look at"
        )

    yield attempt("aligned share", look, say)
    for (name, teacher), digits in covered(rows).items():
        if digits.digit_ratio is not None and digits.digit_ratio < FEW_DIGITS:
            by = f" by {teacher}" if teacher else ""
            text = (
                f"{station_place(run, run.resolved_tasks()[name], 'align')}: only {digits.digit_ratio:.1%} of the "
                f"digits of answers are reached{by}, since both tokenizers cut numbers differently: the teacher "
                "teaches no arithmetic this way; write align: chunks with labels: token"
            )
            yield warning("aligned share", text)


def notes_of(task: TaskInputs) -> tuple[str, ...]:
    """What was matched, of each teacher."""
    several = len(task.aligners) > 1
    return tuple(f"{name}: {note}" if several else note for name, one in task.aligners.items() for note in one.notes)


def _of(run: Run, task: str, teacher: str) -> str:
    return (f" of {task}" if run.tasks else "") + (f" by {teacher}" if teacher else "")


def aligned_at_start(job: Job) -> list[str]:
    """A line for each aligned task, of the special tokens among them and of the share."""
    share = covered(job.samples)
    lines = []
    for name, task in job.inputs.tasks.items():
        if task.aligner is not None:
            of = f" of {name}" if job.run.tasks else ""
            found = [f"{described(one)}{_of(job.run, '', t)}" for (of_task, t), one in share.items() if of_task == name]
            reached = f"; on {len(job.samples)} rows {', '.join(found)} are aligned" if found else ""
            lines.append(f"teacher and student{of} have different tokenizers: {'; '.join(notes_of(task))}{reached}")
    return lines

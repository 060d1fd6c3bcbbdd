"""What `check` asks of the rows: whether they can be read, how long they are, how many steps they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.preflight.finding import Finding, attempt, ok, warning
from configs.held_out import HeldOutSet, held_out_sets
from configs.paths import is_url
from configs.prompts import Dataset
from configs.rules import place_of_held_out, station_place
from configs.schema import Run
from configs.tasks import ResolvedTask
from launch.check.bad_rows import bad_rows
from launch.check.overlap import Opened, overlaps
from trainer.data.local_files import local_files
from trainer.data.prompt_reader import PromptReader
from trainer.data.prompts import RowReport, check_rows
from trainer.errors import ConfigError, DataError, WrongKey
from trainer.loop.inputs import Inputs
from trainer.loop.job import total_steps
from trainer.loop.rows import open_held_out, open_reader

SUBJECT = "rows"
"""What findings about rows end in."""
ROW_BUDGET = 2000
"""Rows read of each dataset; of a larger one they are spread evenly. Training checks every row as it reads it."""


def examine_rows(run: Run, inputs: Inputs | None) -> Iterator[Finding]:
    tasks = run.resolved_tasks().values()
    training: list[Opened] = []
    for task in tasks:
        subject = f"{task.name if run.tasks else 'train'} {SUBJECT}"
        place = station_place(run, task, "prompts")
        if inputs is None:
            yield Finding("not checked", subject, "they need the tokenizer")
        elif task.prompts is not None:
            read = partial(open_reader, run, inputs, task)
            yield from _dataset(run, _Source(subject, place, task.prompts, training=True), read, training)
    held_out: list[Opened] = []
    yield from _held_out(run, inputs, held_out)
    yield from overlaps(held_out, training)
    if run.tasks:
        total = sum(task.share for task in tasks)
        drawn = (run.training.steps or 0) * run.training.sequences_per_step
        yield from (_task(task, total, drawn) for task in tasks)


def _held_out(run: Run, inputs: Inputs | None, opened: list[Opened]) -> Iterator[Finding]:
    sets = held_out_sets(run)
    if not sets:
        yield warning("evaluation rows", "data.evaluation: none, so the run cannot tell how good the student is")
    for name, one in sets.items():
        subject = f"evaluation {SUBJECT}" if len(sets) == 1 else f"{name} evaluation {SUBJECT}"
        if inputs is None:
            yield Finding("not checked", subject, "they need the tokenizer")
        else:
            read = partial(open_held_out, run, inputs, one)
            place = place_of_held_out(run, one.tasks[0])
            source = _Source(subject, place, one.rows, training=False, fraction=one.fraction)
            yield from _dataset(run, source, read, opened)
        if left := _left_behind(one):
            text = f"prompts has {' and '.join(left)}, and these rows have not: they are measured as other texts than "
            yield warning(subject, f"{place_of_held_out(run, one.tasks[0])}: {text}the trained ones; write it here too")
        if not one.is_scored:
            yield ok(subject, "no teacher's labels: perplexity is measured, KL and agreement are not")
        elif any(task.has_reference for task in one.tasks):
            yield ok(subject, "KL and agreement are those with the reference: how far the student has moved from it")


def _left_behind(held_out: HeldOutSet) -> list[str]:
    """Options of the rows to train on, as they are written, that their held-out rows do not say anything of."""
    fields, trained = Dataset.model_fields, held_out.task.prompts
    return [
        f"{name}: {getattr(trained, name)[:40]}"
        for name in ("system_prompt", "loss_on")
        if trained is not None and getattr(trained, name) != fields[name].default == getattr(held_out.rows, name)
    ]


def _task(task: ResolvedTask, total: float, drawn: int) -> Finding:
    """`total` of all shares, `drawn` prompts of the run."""
    if task.share / total * drawn < 1:
        text = (
            f"{task.share:g} of {total:g} is less than one of the run's {drawn} prompts: raise it, or remove the task "
        )
        return warning(f"task {task.name}", f"tasks.{task.name}.share: {text}with its teacher")
    objective = " + ".join(term.loss for term in task.objective)
    teachers = ", ".join(task.teachers) or "none"
    share = f"{task.share / total:.1%} of the sequences"
    return ok(f"task {task.name}", f"{share}, weight {task.weight:g}, {objective}, teacher: {teachers}")


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of a run, and what to call them."""

    subject: str
    place: str
    dataset: Dataset
    training: bool
    fraction: float | None = None  # of the dataset that is held out

    @property
    def name(self) -> str:
        return self.dataset.name if self.fraction is None else f"{self.fraction:g} of {self.dataset.name}"


def _dataset(
    run: Run, source: _Source, read_from: Callable[[], PromptReader], opened: list[Opened]
) -> Iterator[Finding]:
    """What the rows are found to be; those that could be opened are added to `opened`."""
    subject, place = source.subject, source.place
    reports: list[RowReport] = []
    titles: list[str] = []

    def read() -> None:
        try:
            reader = read_from()
            opened.append(Opened(subject, place, reader.rows))
            report = check_rows(reader, budget=ROW_BUDGET)
        except ConfigError as error:
            below = "." if isinstance(error, WrongKey) else ": "
            raise ConfigError(f"{place}{below}{error}") from None
        reports.append(report)
        titles.append(reader.rows.title)
        if report.num_ok == 0 or (report.problems and run.data.on_bad_row == "error"):
            raise DataError(bad_rows(place, report))
        if source.training and report.max_compared_tokens > (budget := run.training.micro_batch_tokens):
            raise ConfigError(
                f"training.micro_batch_tokens = {budget}: the answers to one prompt of {source.name} have up to "
                f"{report.max_compared_tokens} tokens together and are compared with each other in one micro-batch: "
                f"write at least {report.max_compared_tokens}, or leave longer rows out"
            )

    yield attempt(subject, read, lambda: _found(source, reports[0], titles[0]))
    if reports and reports[0].num_ok:
        yield from _remarks(run, source, reports[0])


def _found(source: _Source, report: RowReport, title: str) -> str:
    seen = "all" if report.num_checked == report.num_rows else f"{report.num_checked} of {report.num_rows}"
    counts = f"{source.name}: {report.num_rows} rows, {seen} checked, {report.num_ok} good"
    if source.dataset.streaming:
        first = f"of the first {report.num_rows} rows {report.num_checked}"
        counts = f"{source.name}: a stream, {first} checked, {report.num_ok} good; the others as they are trained"
    lengths = f"{report.min_tokens} to {report.max_tokens} tokens, median {report.median_tokens}"
    written = report.num_ok - report.num_answered
    answers = f"; {report.num_answered} have answers, the teacher writes those of {written}" if written else ""
    return f"{counts}; {lengths}{answers}; read as {title}{_options(source.dataset)}"


def _remarks(run: Run, source: _Source, report: RowReport) -> Iterator[Finding]:
    """What a person should know of rows that can be trained."""
    if source.training and run.training.epochs is not None:
        steps = partial(total_steps, run, rows_per_epoch=report.num_rows)
        yield attempt("steps", steps, lambda: _epochs(run, steps(), rows=report.num_rows))
    texts = []
    if report.special.num and run.data.special_tokens_in_text == "warn":
        texts.append(
            f"{report.special.num} of {report.num_checked} rows contain special tokens in their text, which become "
            f"control tokens: {report.special.first}; write data.special_tokens_in_text: escape to read them as "
            "plain text, or allow where they are meant"
        )
    if report.media.num:
        texts.append(
            f"{report.media.num} of {report.num_checked} rows have marks in their text that stand for pictures, sound "
            f"or films: {report.media.first}; only text is read, so the answers would be about what no model sees: "
            "leave such rows out, unless the marks are meant as text"
        )
    if report.num_split:
        texts.append(
            f"{report.num_split} conversations became {report.num_of_split} sequences: the template rewrites "
            "earlier turns, so each answer is learnt behind the text that it was asked with; loss_on: last learns "
            "the last one alone"
        )
    if report.num_dropped or report.num_truncated:
        texts.append(f"{report.num_dropped} rows are too long and dropped, {report.num_truncated} truncated")
    if report.problems and run.data.on_bad_row == "skip":
        yield warning(source.subject, bad_rows(source.place, report))
    again = _named_again(source.dataset) if source.fraction is None else None
    if again is not None:
        texts.append(f"{again} is named more than once, and its rows are read as often; tasks with shares weigh files")
    yield from (warning(source.subject, f"{source.place}: {text}") for text in texts)


def _named_again(dataset: Dataset) -> str | None:
    """The first file that several paths of a dataset name, if only through patterns."""
    named = [(path, path) for path in dataset.paths if is_url(path)]
    named += [(file.name, file.path.resolve()) for path in dataset.paths for file in local_files(path)]
    seen: set[str | Path] = set()
    return next((name for name, place in named if place in seen or seen.add(place)), None)


def _options(dataset: Dataset) -> str:
    texts = {
        "; learnt: the last answer of each conversation": dataset.loss_on == "last",
        "; system_prompt before those without a system turn": dataset.system_prompt is not None,
    }
    return "".join(text for text, said in texts.items() if said)


def _epochs(run: Run, steps: int, *, rows: int) -> str:
    size = run.training.sequences_per_step
    last = (run.training.epochs or 0) * rows - (steps - 1) * size
    text = f"{run.training.epochs} epochs of {rows} rows are {steps} steps of {size}"
    return text if last == size else f"{text}, the last of {last}"

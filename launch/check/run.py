"""`stillhouse check`: everything about a run that can be known before an accelerator is asked for.

    plug-ins   models   tokenizers   label size   rows   licences   run folder   disk
       each gives findings: ok, a warning, or a problem; all are collected, none hides the next

`stillhouse train` asks the same questions before it starts anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import typer

from cluster.preflight import software
from cluster.preflight.finding import Finding, attempt, ok, warning
from cluster.preflight.finding import examine as examine_looks
from configs.load import LoadedRun, load_run, run_folder
from configs.losses import Term
from configs.rules import station_place, teacher_place, teachers_by_place, unused_teachers
from configs.schema import Run
from launch.check import memory, models, places, rows, store, trackers
from launch.check.alignment import alignment
from launch.check.needs import needs_of
from launch.check.on_policy import examine_rollouts
from launch.check.shown_rows import Wanted, show_rows
from launch.check.there import HERE, UNSEEN, There
from launch.check.watching import examine_metrics, examine_notify
from launch.contents import contents_of
from launch.quiet import quiet_libraries
from launch.resuming import Standing, standing
from trainer.errors import ConfigError, DataError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.inputs import Inputs
from trainer.losses.terms import function_of
from trainer.run_folder import RunFolder


def check(path: Path, overrides: Sequence[str], *, wanted: Wanted | None = None) -> int:
    """Print one line for each thing looked at, and the rows that are `wanted`. 0: a run may start; 2, 3: exit code of
    `ConfigError`, `DataError`."""
    quiet_libraries()
    loaded = load_run(path, overrides)
    run = loaded.run
    findings = [ok("configuration", f"{path}, run {run.name}")]
    _print(findings[0])
    inputs: list[Inputs] = []
    later = (trackers.reached(run), _stored(run, inputs, findings), _standing(run, inputs))
    for finding in chain(examine(run, inputs), *later):
        _print(replace(finding, text=loaded.located(finding.text)))
        findings.append(finding)
    if wanted is not None:
        for line in show_rows(run, inputs[0], wanted) if inputs else ["rows are not shown: they need the tokenizer"]:
            typer.echo(line, color=True)
    code = _told(findings, "nothing was started")
    if code == 0:
        sets = [part for text in overrides for part in ("--set", text)]
        typer.echo(f"ready: {shlex.join(['stillhouse', 'train', str(path), *sets])}")
    return code


def _stored(run: Run, inputs: list[Inputs], found: Sequence[Finding]) -> Iterator[Finding]:
    """A start looks too, when it knows its machines."""
    if inputs and not any(finding.fatal and finding.subject.endswith(rows.SUBJECT) for finding in found):
        yield from store.examine_labels(run, inputs[0])


def _standing(run: Run, inputs: list[Inputs]) -> Iterator[Finding]:
    """What the run folder holds already, and whether this run may go on from it."""
    folder = RunFolder(run_folder(run))
    if not inputs or not folder.config.exists():
        return
    here: list[Standing] = []
    damaged: list[str] = []

    def look() -> None:
        here.append(standing(run, folder, contents_of(run, inputs[0])))
        Checkpoints(folder.checkpoints, keep=1, note=damaged.append).peek()

    def say() -> str:
        if here[0].finished:
            return "finished; more training.steps or epochs make it longer"
        return f"goes on after step {here[0].after.step}" if here[0].after else "none, so it begins from the start"

    yield attempt("earlier steps", look, say)
    yield from (warning("earlier steps", text) for text in (*damaged, *(here[0].changed if here else ())))


def check_to_send(path: Path, overrides: Sequence[str], there: There) -> int:
    """As `check`, of a run that is sent elsewhere: warnings, problems, its memory, and what only the nodes can tell.
    0: it may be sent."""
    quiet_libraries()
    loaded = load_run(path, overrides)
    findings = []
    for finding in examine(loaded.run, there=there):
        if finding.status != "ok" or finding.subject == memory.SUBJECT:
            _print(replace(finding, text=loaded.located(finding.text)))
        findings.append(finding)
    return _told(findings, "nothing was sent; send it as it is with --no-check")


def _told(findings: Sequence[Finding], nothing: str) -> int:
    problems = [finding for finding in findings if finding.fatal]
    if not problems:
        return 0
    typer.echo(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; {nothing}")
    return min(problem.exit_code for problem in problems)


def collect_problems(run: Run, inputs: list[Inputs] | None = None) -> list[Finding]:
    """All findings that are not ok, warnings among them (`fatal` tells them apart). Starts and writes nothing."""
    return [finding for finding in examine(run, inputs) if finding.status in ("warning", "problem")]


def raise_problems(loaded: LoadedRun) -> tuple[list[str], Inputs]:
    """The warnings of a run, and what was read for it.

    Raises one `ConfigError`, or `DataError` where only rows are wrong, with all problems.
    """
    inputs: list[Inputs] = []
    found = collect_problems(loaded.run, inputs)
    problems = [finding for finding in found if finding.fatal]
    if problems:
        text = loaded.located("\n".join(["the run cannot start:", *(f"  {problem.message}" for problem in problems)]))
        raise (ConfigError if any(p.exit_code == ConfigError.exit_code for p in problems) else DataError)(text)
    return [loaded.located(finding.message) for finding in found], inputs[0]


def examine(run: Run, inputs: list[Inputs] | None = None, there: There = HERE) -> Iterator[Finding]:
    """Every finding, in the order of the pipeline. What is read of the pair on the way is added to `inputs`."""
    inputs = [] if inputs is None else inputs
    yield from _plugins(run)
    if not there.elsewhere:
        yield from _packages(run)
        yield from trackers.installed(run)
    yield from unused(run)
    facts, found = models.examine_models(run, there)
    yield from found
    known = set(facts)
    sources = {role: source for role, source, _ in models.models_of(run)}
    if known == set(sources):
        yield from models.tokenizers(run, inputs)
    else:
        yield Finding("not checked", "tokenizers", "they need all models")
    row_bytes: list[int] = []
    if inputs:
        yield from models.label_bytes(run, inputs[0], row_bytes)
        yield from models.features(run)
    unreadable = False
    for finding in rows.examine_rows(run, inputs[0] if inputs else None):
        unreadable = unreadable or finding.fatal
        yield finding
    yield from ensembles(run)
    yield from examine_rollouts(run)
    if inputs:
        yield from alignment(run, inputs[0], unreadable=unreadable)
    for place, teacher in teachers_by_place(run).items():
        if place in facts:
            yield from models.engine(place, teacher)
        if place in facts and teacher.generator is not None:
            yield from models.generation(run, place, teacher)
    yield from models.attention(run, known=known)
    yield from places.placement(run, sources, known=known)
    offer = there.offer if there.elsewhere else memory.offer_here(run)
    yield from memory.examine_memory(run, facts, label_bytes=sum(row_bytes), offer=offer)
    yield from models.licences(run)
    if there.elsewhere:
        unseen = "packages, trackers, notify, run folder and disk: the run asks its nodes when it starts"
        yield Finding(UNSEEN, "nodes", unseen)
    else:
        yield from places.examine_folder(run, facts.get("student"))
        yield from store.examine_store(run)
        yield from examine_metrics(run)
        yield from examine_notify(run)


def _plugins(run: Run) -> Iterator[Finding]:
    """The classes' own checks of their parameters, which need their modules."""
    for place, station, choice in run.choices():
        load = partial(function_of, choice) if isinstance(choice, Term) else partial(station.load, choice)
        yield attempt(place, load, partial(station.kind_of, choice))


def ensembles(run: Run) -> Iterator[Finding]:
    """Teachers that are asked about the same tokens, what becomes of them, and what that costs."""
    for task in run.resolved_tasks().values():
        if (together := task.ensemble) is None or not task.asks:
            continue
        weights = together.weights or dict.fromkeys(together.teachers, 1.0)
        shares = ", ".join(f"{name} {weight / sum(weights.values()):.1%}" for name, weight in weights.items())
        by = f"weights of the row's {together.weights_column}" if together.weights_column else shares
        of_each = ", ".join(together.teachers) if together.how == "min_ce" else f"{', '.join(together.teachers)} ({by})"
        twice = "; each reads every token twice, the second time for the ids that any keeps" if task.joins_ids else ""
        lost = "a lost one is gone on without" if together.on_lost == "continue" else "a lost one ends the run"
        yield ok(station_place(run, task, "ensemble"), f"{together.how} of {of_each}; {lost}{twice}")


def _packages(run: Run) -> Iterator[Finding]:
    """What is wrong with the packages here, as a warning: the run may be submitted to where it is not."""
    for finding in examine_looks(software.looks(needs_vllm=needs_of(run).vllm)):
        if finding.status != "ok":
            yield replace(finding, status="warning", text=f"{finding.subject} here: {finding.text}")


def unused(run: Run) -> Iterator[Finding]:
    """Teachers that are started for nothing."""
    for name in unused_teachers(run):
        text = f"{teacher_place(run, name)}: no task asks {name} for labels or answers; remove it, or name it in a task"
        yield warning("teachers", text)


def _print(finding: Finding) -> None:
    colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    typer.secho(f"{finding.status:<11}", fg=colours.get(finding.status), nl=False)
    typer.echo(f"  {finding}")

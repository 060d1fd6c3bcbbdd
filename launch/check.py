"""`stillhouse check`: everything about a run that can be known before an accelerator is asked for.

    plug-ins   models   tokenizers   label size   rows   licences   run folder   disk
       each gives findings: ok, a warning, or a problem; all are collected, none hides the next

`stillhouse train` asks the same questions before it starts anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import typer

from cluster.engines.vllm_limits import check_rotation, check_split
from cluster.engines.vllm_registry import check_architecture, unknown_quantisation
from cluster.placement.roles import started_roles
from cluster.runtime import actors_of
from configs.answers import TeacherAnswers
from configs.engines import Hf, Vllm
from configs.held_out import held_out_sets
from configs.load import LoadedRun, load_run, run_folder
from configs.models import ModelSource, Teacher
from configs.paths import refuse_pattern
from configs.prompts import Dataset
from configs.rules import place_of_held_out, teacher_place, teachers_by_place, unused_teachers
from configs.schema import Run, Training
from configs.tasks import ResolvedTask
from launch.contents import contents_of
from launch.disk import DiskNeed, check_writable, free_bytes, size_text
from launch.model_folder import ModelFacts, find_model, licence_of, read_facts
from launch.quiet import quiet_libraries
from launch.resuming import Standing, standing
from trainer.data.prompt_reader import PromptReader
from trainer.data.prompts import RowReport, check_rows
from trainer.errors import ConfigError, DataError, StillhouseError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.job import label_bytes_per_row, total_steps
from trainer.loop.rows import open_held_out, open_reader
from trainer.model.attention_choice import refuse_unpackable
from trainer.model.generation_settings import unused_settings
from trainer.model.load import load_config
from trainer.run_folder import RunFolder

ROW_BUDGET = 2000
"""Rows read of each dataset; of a larger one they are spread evenly. Training checks every row as it reads it."""

SHOWN_ROWS = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing. `text` says where, what is wrong and what to write."""

    subject: str
    status: Literal["ok", "warning", "problem", "not checked"]
    text: str
    exit_code: int = 0

    @property
    def fatal(self) -> bool:
        """Whether a run must not start."""
        return self.status == "problem"


def check(path: Path, overrides: Sequence[str]) -> int:
    """Print one line for each thing looked at. 0: a run may start; 2, 3: exit code of `ConfigError`, `DataError`."""
    quiet_libraries()
    loaded = load_run(path, overrides)
    run = loaded.run
    findings = [Finding("configuration", "ok", f"{path}, run {run.name}")]
    _print(findings[0])
    inputs: list[Inputs] = []
    for finding in chain(examine(run, inputs), _standing(run, inputs)):
        _print(replace(finding, text=loaded.located(finding.text)))
        findings.append(finding)
    problems = [finding for finding in findings if finding.fatal]
    if problems:
        typer.echo(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started")
        return min(problem.exit_code for problem in problems)
    typer.echo(
        f"ready: {shlex.join(['stillhouse', 'train', str(path), *(p for o in overrides for p in ('--set', o))])}"
    )
    return 0


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

    yield _attempt("earlier steps", look, say)
    yield from (Finding("earlier steps", "warning", text) for text in (*damaged, *(here[0].changed if here else ())))


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
        text = loaded.located("\n".join(["the run cannot start:", *(f"  {problem.text}" for problem in problems)]))
        raise (ConfigError if any(p.exit_code == ConfigError.exit_code for p in problems) else DataError)(text)
    return [loaded.located(finding.text) for finding in found], inputs[0]


def examine(run: Run, inputs: list[Inputs] | None = None) -> Iterator[Finding]:
    """Every finding, in the order of the pipeline. What is read of the pair on the way is added to `inputs`."""
    inputs = [] if inputs is None else inputs
    yield from _plugins(run)
    yield from unused(run)
    facts: dict[str, ModelFacts] = {}
    for role, source, needs_weights in _models(run):
        yield from _model(run, role, source, facts, needs_weights=needs_weights)
    if len(facts) == len(_models(run)):
        yield from _tokenizers(run, inputs)
    else:
        yield Finding("tokenizers", "not checked", "they need all models")
    if inputs:
        yield from _label_bytes(run, inputs[0])
    yield from _rows(run, inputs[0] if inputs else None)
    for place, teacher in teachers_by_place(run).items():
        if place in facts:
            yield from _engine(place, teacher)
        if place in facts and teacher.generator is not None:
            yield from _generation(run, place, teacher)
    yield from _attention(run, known=set(facts))
    yield from _placement(run, known=set(facts))
    yield from _licences(run)
    yield from _folder(run, facts.get("student"))


def _models(run: Run) -> list[tuple[str, ModelSource, bool]]:
    """(role, source, whether its weights are read)."""
    models = []
    for place, teacher in teachers_by_place(run).items():
        engines = [replicas.engine for replicas in teacher.roles().values()]
        made_up = all(isinstance(engine, Vllm) and engine.load_format == "dummy" for engine in engines)
        models.append((place, teacher.model, not made_up))
    return [*models, ("student", run.student.model, True)]


def _plugins(run: Run) -> Iterator[Finding]:
    """The classes' own checks of their parameters, which need their modules."""
    for place, station, choice in run.choices():
        yield _attempt(place, partial(station.load, choice), partial(str, choice.kind))


def unused(run: Run) -> Iterator[Finding]:
    """Teachers that are started for nothing."""
    for name in unused_teachers(run):
        text = f"{teacher_place(run, name)}: no task asks {name} for labels or answers; remove it, or name it in a task"
        yield Finding("teachers", "warning", text)


def _model(
    run: Run, role: str, source: ModelSource, facts: dict[str, ModelFacts], *, needs_weights: bool
) -> Iterator[Finding]:
    place = f"{role}.model.path"
    where = ""

    def look() -> None:
        nonlocal where
        where = find_model(source, path_name=place, needs_weights=needs_weights)
        teacher = teachers_by_place(run).get(role)
        other = teacher is not None and any(not isinstance(r.engine, Hf) for r in teacher.roles().values())
        if where == "folder" and other:
            refuse_pattern(place, Path(source.path).expanduser(), reader="vLLM")
            if source.local_copy is not None:
                refuse_pattern(f"{role}.model.local_copy", source.local_copy.expanduser(), reader="vLLM")
        student = run.student if role == "student" else None
        facts[role] = read_facts(source, path_name=place, student=student, needs_weights=needs_weights)
        longest = facts[role].max_length
        if longest is not None and run.data.max_length > longest:
            raise ConfigError(
                f"data.max_length: {run.data.max_length} is more than the {longest} positions of the {role} "
                f"{source.path}; write at most {longest}"
            )

    def say() -> str:
        model = facts[role]
        size = f"{source.path}: {model.architecture}, {_count(model.num_parameters)} parameters"
        if model.num_adapter_parameters:
            size += f", {_count(model.num_adapter_parameters)} of them new in adapters"
        return size + (", from the hub" if where == "hub" else "")

    yield _attempt(f"{role} model", look, say)


def _tokenizers(run: Run, inputs: list[Inputs]) -> Iterator[Finding]:
    def say() -> str:
        shared = inputs[0].vocabulary
        rows = {"teacher": shared.teacher_rows, "student": shared.student_rows}
        padded = ", ".join(f"{name} has {number} rows" for name, number in rows.items() if number > shared.size)
        return f"the same, {shared.size} tokens" + (f" (padded: {padded})" if padded else "")

    yield _attempt("tokenizers", lambda: inputs.append(read_inputs(run)), say)


def _label_bytes(run: Run, inputs: Inputs) -> Iterator[Finding]:
    """Whether the labels can be made over this vocabulary, and what one costs."""
    num_bytes: list[int] = []

    def look() -> None:
        num_bytes.append(
            label_bytes_per_row(run, inputs, teacher_dtypes=dict.fromkeys(run.teachers_by_name(), "float32"))
        )

    labels = [task.soft_labels for task in run.resolved_tasks().values()]
    kinds = ", ".join(dict.fromkeys(one.kind for one in labels if one is not None)) or "none"
    yield _attempt("label size", look, lambda: f"{kinds}: at most {num_bytes[0]} bytes a loss token")


def _engine(place: str, teacher: Teacher) -> Iterator[Finding]:
    """Whether vLLM has a model for the teacher, as far as that can be known without starting one."""
    if all(not isinstance(replicas.engine, Vllm) for replicas in teacher.roles().values()):
        return
    path = teacher.model.path
    config = load_config(teacher.model, role=f"{place}.model")
    look = partial(check_architecture, config, place=f"{place}.model.path: {path}")
    found = _attempt(f"{place} engine", look, str)
    if found.fatal:
        yield found
    quantisation = unknown_quantisation(config)
    if quantisation is not None:
        text = f"{path} is quantised by {quantisation}, which the vLLM here does not name; its engine may refuse it"
        yield Finding(f"{place} engine", "warning", f"{place}.model.path: {text}")


def _generation(run: Run, place: str, teacher: Teacher) -> Iterator[Finding]:
    """Which of the teacher's own generation settings its generators do not apply."""
    asking = [task.answers for task in run.resolved_tasks().values() if teacher.name in task.teachers]
    written = [answers for answers in asking if isinstance(answers, TeacherAnswers)]
    temperature = max((answers.temperature for answers in written), default=1)
    said = {"stop_strings" if name == "stop" else name for answers in written for name in answers.model_fields_set}
    unused: dict[str, object] = {}

    def look() -> None:
        unused.update(unused_settings(teacher.model, temperature=temperature, decided=said))

    found = _attempt(f"{place} generation", look, lambda: "as configured")
    if found.fatal:
        yield found
    if not unused:
        return
    named = ", ".join(f"{name}: {str(value)[:60]}" for name, value in unused.items())
    text = (
        f"{teacher.model.path}/generation_config.json sets {named}, which a generator does not apply: its answers "
        "are drawn as `answers` says, and end at the ids of eos_token_id. Write top_k, min_p and stop (of "
        "stop_strings) into `answers`; where others matter, let the answers be written elsewhere and give them as rows"
    )
    yield Finding(f"{place} generation", "warning", text)


def _rows(run: Run, inputs: Inputs | None) -> Iterator[Finding]:
    tasks = run.resolved_tasks().values()
    for task in tasks:
        subject = f"{task.name} rows" if run.tasks else "train rows"
        place = f"tasks.{task.name}.prompts" if run.tasks else "prompts"
        if inputs is None:
            yield Finding(subject, "not checked", "they need the tokenizer")
        elif task.prompts is not None:
            read = partial(open_reader, run, inputs, task)
            yield from _dataset(run, subject, place, task.prompts, read, training=True)
    yield from _held_out(run, inputs)
    if run.tasks:
        total = sum(task.share for task in tasks)
        yield from (Finding(f"task {task.name}", "ok", _task(task, total)) for task in tasks)


def _held_out(run: Run, inputs: Inputs | None) -> Iterator[Finding]:
    sets = held_out_sets(run)
    if not sets:
        text = "data.evaluation: none, so the run cannot tell how good the student is"
        yield Finding("evaluation rows", "warning", text)
    for name, one in sets.items():
        subject = "evaluation rows" if len(sets) == 1 else f"{name} evaluation rows"
        if inputs is None:
            yield Finding(subject, "not checked", "they need the tokenizer")
        else:
            read = partial(open_held_out, run, inputs, one)
            yield from _dataset(run, subject, place_of_held_out(run, one.tasks[0]), one.rows, read, training=False)
        if not one.is_scored:
            text = "no teacher's labels: perplexity is measured, KL and agreement are not"
            yield Finding(subject, "ok", text)
        elif any(task.compares_answers for task in one.tasks):
            text = "KL and agreement are those with the reference: how far the student has moved from it"
            yield Finding(subject, "ok", text)


def _task(task: ResolvedTask, total: float) -> str:
    objective = " + ".join(term.loss for term in task.objective)
    teachers = ", ".join(task.teachers) or "none"
    return f"{task.share / total:.1%} of the sequences, weight {task.weight:g}, {objective}, teacher: {teachers}"


def _dataset(
    run: Run, subject: str, place: str, dataset: Dataset, opened: Callable[[], PromptReader], *, training: bool
) -> Iterator[Finding]:
    reports: list[RowReport] = []

    def read() -> None:
        report = check_rows(opened(), budget=ROW_BUDGET)
        reports.append(report)
        if report.num_ok == 0 or (report.problems and run.data.on_bad_row == "error"):
            raise DataError(_bad_rows(place, report))

    def say() -> str:
        report = reports[0]
        seen = "all" if report.num_checked == report.num_rows else f"{report.num_checked} of {report.num_rows}"
        counts = f"{dataset.path}: {report.num_rows} rows, {seen} checked, {report.num_ok} good"
        lengths = f"{report.min_tokens} to {report.max_tokens} tokens, median {report.median_tokens}"
        written = report.num_ok - report.num_answered
        answers = f"; {report.num_answered} have answers, the teacher writes those of {written}" if written else ""
        return f"{counts}; {lengths}{answers}"

    yield _attempt(subject, read, say)
    if reports and reports[0].num_ok:
        report = reports[0]
        if training and run.training.epochs is not None:
            steps = partial(total_steps, run, rows_per_epoch=report.num_rows)
            yield _attempt("steps", steps, lambda: _epochs(run, steps(), rows=report.num_rows))
        if report.problems and run.data.on_bad_row == "skip":
            yield Finding(subject, "warning", _bad_rows(place, report))
        if report.num_special and run.data.special_tokens_in_text == "warn":
            text = (
                f"{report.num_special} of {report.num_checked} rows contain special tokens in their text, which become "
                f"control tokens: {report.first_special}; write data.special_tokens_in_text: escape to read them as "
                "plain text, or allow where they are meant"
            )
            yield Finding(subject, "warning", f"{place}: {text}")
        if report.num_dropped or report.num_truncated:
            text = f"{report.num_dropped} rows are too long and dropped, {report.num_truncated} truncated"
            yield Finding(subject, "warning", f"{place}: {text}")


def _epochs(run: Run, steps: int, *, rows: int) -> str:
    size = run.training.sequences_per_step
    last = (run.training.epochs or 0) * rows - (steps - 1) * size
    text = f"{run.training.epochs} epochs of {rows} rows are {steps} steps of {size}"
    return text if last == size else f"{text}, the last of {last}"


def _bad_rows(place: str, report: RowReport) -> str:
    lines = [f"{place}: {len(report.problems)} of {report.num_checked} rows cannot be used"]
    if not report.problems:
        lines = [
            f"{place}: no row is left: {report.num_dropped} of {report.num_checked} are too long; raise data.max_length"
        ]
    lines += [f"    {problem}" for problem in report.problems[:SHOWN_ROWS]]
    if len(report.problems) > SHOWN_ROWS:
        lines.append(f"    and {len(report.problems) - SHOWN_ROWS} more")
    return "\n".join(lines)


def _attention(run: Run, *, known: set[str]) -> Iterator[Finding]:
    """What the code of the models does with long rows, and with rows that lie beside others."""
    if "student" in known:
        source = run.student.model

        def look() -> None:
            config = load_config(source, role="student.model")
            trusted = source.trust_remote_code
            refuse_unpackable(config, max_length=run.data.max_length, trust_remote_code=trusted)

        yield _attempt("student attention", look, lambda: "its sequences can be packed")
    for name, teacher in run.teachers_by_name().items():
        place = teacher_place(run, name)
        if place not in known:
            continue
        rotate = partial(_rotation, run, name, teacher.model, f"{place}.model")
        finding = _attempt(f"{place} attention", rotate, lambda: "the same at every length of the data")
        if finding.fatal:
            yield finding


def _rotation(run: Run, name: str, source: ModelSource, role: str) -> None:
    check_rotation(run, name, load_config(source, role=role))


def _split(run: Run, name: str, source: ModelSource, role: str) -> None:
    check_split(run, name, load_config(source, role=role))


def _placement(run: Run, *, known: set[str]) -> Iterator[Finding]:
    """What the run asks for, and what of the placement follows from the models alone; the rest needs the machines."""
    yield Finding("devices", "ok", devices_text(run))
    for name, teacher in run.teachers_by_name().items():
        place = teacher_place(run, name)
        sizes = {role: replicas.tensor_parallel_size for role, replicas in teacher.roles().items()}
        if place in known and max(sizes.values()) > 1:
            text = ", ".join(f"{role} in {size} parts" for role, size in sizes.items())
            look = partial(_split, run, name, teacher.model, f"{place}.model")
            yield _attempt(f"{place} split", look, partial(str, text))
    for role, source, _ in _models(run):
        if source.local_copy is not None and not Path(source.path).expanduser().is_dir():
            text = f"{role}.model.local_copy copies a folder, and {source.path} is none here; the hub has its own cache"
            yield Finding(f"{role} copy", "problem", text, ConfigError.exit_code)


def devices_text(run: Run) -> str:
    """`16 GPUs, or as many cores where there is no GPU: student 8, scorer 2 x 4`."""
    if run.runtime == "in_process":
        return "one process for student and teacher"
    counts = {"student": (run.student.ranks, 1)}
    for name, roles in started_roles(run).items():
        prefix = name if run.teachers else ""
        counts |= {actors_of(role, prefix): (r.replicas, r.tensor_parallel_size) for role, r in roles.items()}
    total = sum(num * size for num, size in counts.values())
    parts = ", ".join(f"{role} {num}" + (f" x {size}" if size > 1 else "") for role, (num, size) in counts.items())
    kind = {"auto": "GPUs, or as many cores where there is no GPU", "gpu": "GPUs", "cpu": "cores"}[run.accelerator]
    return f"{total} {kind}: {parts}"


def _licences(run: Run) -> Iterator[Finding]:
    for role, source, _ in _models(run):
        licence = licence_of(source)
        if licence is None:
            text = "not stated, and the student's model card will say so; write for example licence: apache-2.0"
            yield Finding(f"{role} licence", "warning", f"{role}.model.licence: {text}")
        else:
            yield Finding(f"{role} licence", "ok", licence)


def _folder(run: Run, student: ModelFacts | None) -> Iterator[Finding]:
    folder = run_folder(run).absolute()

    def look() -> None:
        refuse_pattern("folder", folder, reader="DeepSpeed")
        check_writable(folder)

    yield _attempt("run folder", look, lambda: str(folder))
    yield Finding("checkpoints", "ok", cost_of_a_crash(run.training))
    if student is None:
        yield Finding("disk", "not checked", "its need follows from the student's size")
        return
    need = DiskNeed.of(run, student)

    def say() -> str:
        there = need.num_bytes - need.bytes_to_come(folder)
        replaced = f", and {size_text(there)} lie in the run folder already" if there else ""
        return f"{need}; {size_text(free_bytes(folder))} are free{replaced}"

    yield _attempt("disk", lambda: need.check(folder), say)


def cost_of_a_crash(training: Training) -> str:
    """What is lost where a run dies without being asked to stop."""
    steps, minutes = training.save_every, training.save_every_minutes
    every = [f"{steps} steps"] * (steps > 0) + [f"{minutes:g} minutes"] * (minutes > 0)
    if not every:
        return "saved at the end and when asked to stop: a crash costs everything trained until then"
    several = ", whichever comes first" if len(every) > 1 else ""
    return f"saved every {' or '.join(every)}{several}: a crash costs at most what was trained in between, and a start"


def _attempt(subject: str, look: Callable[[], object], say: Callable[[], str]) -> Finding:
    """A finding from a check that raises when something is wrong."""
    try:
        look()
    except StillhouseError as error:
        return Finding(subject, "problem", str(error), error.exit_code)
    except ValueError as error:
        return Finding(subject, "problem", f"{subject}: {error}", ConfigError.exit_code)
    return Finding(subject, "ok", say())


def _print(finding: Finding) -> None:
    colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    typer.secho(f"{finding.status:<11}", fg=colours.get(finding.status), nl=False)
    typer.echo(f"  {finding.subject}: {finding.text}")


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)

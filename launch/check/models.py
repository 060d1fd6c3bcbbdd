"""What `check` asks of the models: files, size, tokenizers, labels, engines, attention, licences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cluster.engines.vllm_limits import check_cache, check_rotation
from cluster.engines.vllm_registry import check_architecture, check_layers, unknown_quantisation
from cluster.preflight.finding import Finding, attempt, ok, warning
from configs.answers import TeacherAnswers
from configs.engines import Hf, Vllm
from configs.models import ModelSource, Teacher
from configs.paths import refuse_pattern
from configs.rules import station_place, teacher_place, teachers_by_place
from configs.schema import Run
from launch.check.there import HERE, UNSEEN, There
from launch.model_folder import ModelFacts, find_model, licence_of, read_facts
from trainer.errors import ConfigError
from trainer.loop.control_ids import control_tokens, with_control_ids
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.job import label_bytes_per_row
from trainer.model.attention_choice import refuse_unpackable
from trainer.model.features import check_features
from trainer.model.generation_settings import unused_settings
from trainer.model.load import load_config


def examine_models(run: Run, there: There = HERE) -> tuple[dict[str, ModelFacts], list[Finding]]:
    """By role what is known of the models that can be read, and the findings about all."""
    facts: dict[str, ModelFacts] = {}
    found: list[Finding] = []
    for role, source, needs_weights in models_of(run):
        if not there.sees(source):
            found.append(Finding(UNSEEN, f"{role} model", f"{source.path} is on the nodes, and not on this machine"))
            continue

        def look(role: str = role, source: ModelSource = source, needs_weights: bool = needs_weights) -> None:
            facts[role] = _read(run, role, source, needs_weights=needs_weights)

        found.append(attempt(f"{role} model", look, lambda role=role, source=source: _size(source, facts[role])))
        if role in facts and source.trust_remote_code:
            text = f"{role}.model: {source.path} runs code of its own (trust_remote_code)"
            found.append(warning(f"{role} model", text, "read its code, or trust_remote_code: false"))
    return facts, found


def models_of(run: Run) -> list[tuple[str, ModelSource, bool]]:
    """(role, source, whether its weights are read)."""
    models = []
    for place, teacher in teachers_by_place(run).items():
        engines = [replicas.engine for replicas in teacher.roles().values()]
        made_up = all(isinstance(engine, Vllm) and engine.load_format == "dummy" for engine in engines)
        models.append((place, teacher.model, not made_up))
    return [*models, ("student", run.student.model, True)]


def _read(run: Run, role: str, source: ModelSource, *, needs_weights: bool) -> ModelFacts:
    """Raises `ConfigError` for a model that is not there, or that this run cannot use."""
    place = f"{role}.model.path"
    where = find_model(source, path_name=place, needs_weights=needs_weights)
    teacher = teachers_by_place(run).get(role)
    other = teacher is not None and any(not isinstance(r.engine, Hf) for r in teacher.roles().values())
    if where == "folder" and other:
        refuse_pattern(place, Path(source.path).expanduser(), reader="vLLM")
        if source.local_copy is not None:
            refuse_pattern(f"{role}.model.local_copy", source.local_copy.expanduser(), reader="vLLM")
    student = run.student if role == "student" else None
    facts = read_facts(source, path_name=place, student=student, needs_weights=needs_weights)
    if facts.max_length is not None and run.data.max_length > facts.max_length:
        raise ConfigError(
            f"data.max_length: {run.data.max_length} is more than the {facts.max_length} positions of the {role} "
            f"{source.path}; write at most {facts.max_length}"
        )
    return facts


def _size(source: ModelSource, model: ModelFacts) -> str:
    size = f"{source.path}: {model.architecture}, {_count(model.num_parameters)} parameters"
    if model.num_adapter_parameters:
        size += f", {_count(model.num_adapter_parameters)} of them new in adapters"
    elif model.num_trained < model.num_parameters:
        size += f", {_count(model.num_trained)} of them trained"
    return size + ("" if Path(source.path).expanduser().is_dir() else ", from the hub")


def tokenizers(run: Run, inputs: list[Inputs]) -> Iterator[Finding]:
    def say() -> str:
        shared = inputs[0].vocabulary
        rows = {"teacher": shared.teacher_rows, "student": shared.student_rows}
        if shared.others:
            aligned = ", ".join(f"{name} has {one.size} of its own" for name, one in shared.others.items())
            return f"the student has {shared.size} tokens, {aligned}"
        padded = ", ".join(f"{name} has {number} rows" for name, number in rows.items() if number > shared.size)
        return f"the same, {shared.size} tokens" + (f" (padded: {padded})" if padded else "")

    yield attempt("tokenizers", lambda: inputs.append(read_inputs(run)), say)


def label_bytes(run: Run, inputs: Inputs, num_bytes: list[int]) -> Iterator[Finding]:
    """Whether the labels can be made over this vocabulary, and what one costs, which is added to `num_bytes`."""

    made: list[Run] = []

    def look() -> None:
        dtypes = dict.fromkeys(run.teachers_by_name(), "float32")
        num_bytes.append(label_bytes_per_row(made[0], inputs, teacher_dtypes=dtypes))

    def kept() -> str:
        tokens = control_tokens(made[0], inputs)
        return "; ".join(f"{place}: {', '.join(names)}" for place, names in tokens.items())

    found = attempt("control ids", lambda: made.append(with_control_ids(run, inputs)), kept)
    if found.fatal or made[0] is not run:
        yield found
    if found.fatal:
        return
    labels = [task.soft_labels for task in run.resolved_tasks().values()]
    kinds = ", ".join(dict.fromkeys(one.kind for one in labels if one is not None)) or "none"
    yield attempt("label size", look, lambda: f"{kinds}: at most {num_bytes[0]} bytes a loss token")


def features(run: Run) -> Iterator[Finding]:
    """Whether layers that terms compare are there, as wide as they must be, and given by the teachers' engines."""
    tasks = run.resolved_tasks()
    layers = {name: getattr(task.labels, "layers", ()) for name, task in tasks.items()}
    if not any(layers.values()):
        return
    number: list[int] = []

    def look() -> None:
        number.append(check_features(run))
        for name, task in tasks.items():
            for teacher in (run.teachers_by_name()[one] for one in task.teachers if layers[name]):
                if isinstance(teacher.scorer.engine, Vllm):
                    config = load_config(teacher.model, role=f"{teacher_place(run, teacher.name)}.model")
                    check_layers(config, layers[name], place=f"{station_place(run, task, 'labels')}.layers")

    yield attempt("features", look, lambda: f"{number[0]} terms on states, whose layers are there")


def engine(place: str, teacher: Teacher) -> Iterator[Finding]:
    """Whether vLLM has a model for the teacher, as far as that can be known without starting one."""
    if all(not isinstance(replicas.engine, Vllm) for replicas in teacher.roles().values()):
        return
    path = teacher.model.path
    config = load_config(teacher.model, role=f"{place}.model")
    look = partial(check_architecture, config, place=f"{place}.model.path: {path}")
    found = attempt(f"{place} engine", look, str)
    if found.fatal:
        yield found
    quantisation = unknown_quantisation(config)
    if quantisation is not None:
        text = f"{path} is quantised by {quantisation}, which the vLLM here does not name; its engine may refuse it"
        yield warning(f"{place} engine", f"{place}.model.path: {text}")


def generation(run: Run, place: str, teacher: Teacher) -> Iterator[Finding]:
    """Which of the teacher's own generation settings its generators do not apply."""
    asking = [task.answers for task in run.resolved_tasks().values() if teacher.name in task.teachers]
    written = [answers for answers in asking if isinstance(answers, TeacherAnswers)]
    temperature = max((answers.temperature for answers in written), default=1)
    said = {"stop_strings" if name == "stop" else name for answers in written for name in answers.model_fields_set}
    unused: dict[str, object] = {}

    def look() -> None:
        unused.update(unused_settings(teacher.model, temperature=temperature, decided=said))

    found = attempt(f"{place} generation", look, lambda: "as configured")
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
    yield warning(f"{place} generation", text)


def attention(run: Run, *, known: set[str]) -> Iterator[Finding]:
    """What the code of the models does with long rows, and with rows that lie beside others."""
    if "student" in known:
        source = run.student.model

        def look() -> None:
            config = load_config(source, role="student.model")
            trusted = source.trust_remote_code
            refuse_unpackable(config, max_length=run.data.max_length, trust_remote_code=trusted)

        yield attempt("student attention", look, lambda: "its sequences can be packed")
    for name, teacher in run.teachers_by_name().items():
        place = teacher_place(run, name)
        if place not in known:
            continue
        config = load_config(teacher.model, role=f"{place}.model")
        for subject, look in (("attention", check_rotation), ("cache", check_cache)):
            finding = attempt(f"{place} {subject}", partial(look, run, name, config), lambda: "fits the data")
            if finding.fatal:
                yield finding


def licences(run: Run) -> Iterator[Finding]:
    for role, source, _ in models_of(run):
        licence = licence_of(source)
        if licence is None:
            text = "not stated, and the student's model card will say so; write for example licence: apache-2.0"
            yield warning(f"{role} licence", f"{role}.model.licence: {text}")
        else:
            yield ok(f"{role} licence", licence)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)

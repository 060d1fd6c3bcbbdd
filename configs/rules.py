"""Rules between sections of a run: each yields the place that breaks it, the value there, and what to write instead.

All rules are checked, so that all problems are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.alignment import alignment_problems
from configs.engines import Vllm
from configs.labels import GivenIds, NoLabels
from configs.losses import Features, ForwardKl, Need, Term
from configs.refusal import did_you_mean
from configs.rollouts import rollout_problems
from configs.section import MAIN

if TYPE_CHECKING:
    from configs.prompts import Dataset, HeldOutRows
    from configs.schema import Run, Teacher
    from configs.tasks import ResolvedTask

NO_TEACHER = "labels come from a teacher, and the run has none: add teacher, or write labels: none"

Place = tuple[str | int, ...]
Problem = tuple[Place, Any, str]


def broken_rules(run: Run) -> Iterator[Problem]:
    """Everything that is wrong between the sections of a run, each of which is right in itself."""
    yield from _names(run)
    tasks = run.resolved_tasks().values()
    for task in tasks:
        yield from _stations(run, task)
        yield from _objective(run, task)
        yield from _reward(run, task)
        yield from _pairs(run, task)
        yield from _ensemble(run, task)
        yield from ((_place(run, task, at), value, text) for at, value, text in alignment_problems(task))
    wrong = [problem for task in tasks for problem in _asked(run, task)]
    yield from wrong or _generators(run)
    if run.runtime == "in_process":
        yield from _one_process(run)
    yield from rollout_problems(run)
    yield from _steps(run)
    yield from _store(run)


def place_of_teacher(run: Run, name: str) -> Place:
    """Where a teacher stands in the configuration."""
    return ("teacher",) if run.teacher is not None else ("teachers", name)


def teacher_place(run: Run, name: str) -> str:
    """`teacher`, or `teachers.<name>`: for messages."""
    return ".".join(map(str, place_of_teacher(run, name)))


def teachers_by_place(run: Run) -> dict[str, Teacher]:
    """Every teacher that the run reads, by its place in the configuration."""
    return {teacher_place(run, name): teacher for name, teacher in run.teachers_by_name().items()}


def station_place(run: Run, task: ResolvedTask, station: str) -> str:
    """Where a station of a task was said, `tasks.<name>.labels` or `labels`: for messages."""
    return ".".join(map(str, _place(run, task, station)))


def prompts_by_place(run: Run) -> dict[str, Dataset]:
    """All rows to train on, each once, by their place in the configuration."""
    places = {".".join(map(str, _place(run, task, "prompts"))): task for task in run.resolved_tasks().values()}
    return {place: task.prompts for place, task in places.items() if task.prompts is not None}


def held_out_by_place(run: Run) -> dict[str, HeldOutRows]:
    """All held-out rows that a task is evaluated on, each once, by their place in the configuration."""
    tasks = [task for task in run.resolved_tasks().values() if task.evaluation is not None]
    return {place_of_held_out(run, task): task.evaluation for task in tasks}


def place_of_held_out(run: Run, task: ResolvedTask) -> str:
    """Where the held-out rows of a task are named."""
    return ".".join(map(str, _held_out_place(run, task)))


def _held_out_place(run: Run, task: ResolvedTask) -> Place:
    own = run.tasks.get(task.name)
    return ("data", "evaluation") if own is None or own.evaluation is None else ("tasks", task.name, "evaluation")


def unused_teachers(run: Run) -> tuple[str, ...]:
    """Teachers that no task asks for anything."""
    asked = {name for task in run.resolved_tasks().values() for name in task.teachers}
    return tuple(name for name in run.named_teachers() if name not in asked)


def _place(run: Run, task: ResolvedTask, station: str) -> Place:
    """Where a station of a task is configured: in the task, or at the top level."""
    own = run.tasks.get(task.name)
    return (station,) if own is None or getattr(own, station) is None else ("tasks", task.name, station)


def _names(run: Run) -> Iterator[Problem]:
    if run.teacher is not None and run.teachers:
        yield ("teachers",), None, "teacher is given too: keep one of teacher (for one) and teachers (for several)"
    if run.tasks and not any(task.share for task in run.tasks.values()):
        text = "every share is 0, so that nothing is trained; give at least one task a share above 0"
        yield ("tasks", next(iter(run.tasks)), "share"), 0, text
    if MAIN in run.tasks:
        text = f"{MAIN} is the only task of a run that names none: give this one another name"
        yield ("tasks", MAIN), None, text


def _stations(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """What the rows must hold for who writes the answers."""
    kind = task.answers.kind
    if task.prompts is None:
        text = "'prompts' is missing: give the task rows, prompts: {path: rows.jsonl}, here or at the top level"
        yield ("tasks", task.name, "prompts"), None, text
        return
    rows, place = task.prompts.format, (*_place(run, task, "prompts"), "format")
    if task.answers.needs_answer and rows == "prompt":
        write = "write answers: teacher and teacher.generator: {}"
        yield place, rows, f"answers: {kind} needs rows with answers: name another format, or {write}"
    if task.fraction is not None and rows == "prompt":
        text = "held-out rows need answers, and a fraction of these has none: name rows with data.evaluation.path"
        yield place, rows, text
    if task.fraction is not None and task.prompts.streaming:
        text = "a fraction needs the number of rows, which a stream does not tell: name held-out rows with path"
        yield (*_held_out_place(run, task), "fraction"), task.fraction, text
    if (task.answers.needs_generator or task.answers.needs_rollouts) and rows == "text":
        yield place, rows, f"answers: {kind} answers prompts, and format: text has none; write answers: dataset"


def _objective(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    at = _place(run, task, "objective")
    own_labels = _place(run, task, "labels") != ("labels",)
    by_default = at == ("objective",) and (own_labels or "objective" not in run.model_fields_set)
    for index, term in enumerate(task.objective):
        place: Place = _place(run, task, "labels") if by_default else (*at, index, "loss")
        value = task.labels.kind if by_default else term.loss
        if any(term.same_as(earlier) for earlier in task.objective[:index]):
            text = f"{term.loss} is a term already: give one term the sum of both weights"
            yield (*at, index, "loss"), term.loss, text
        missing = term.needs - task.labels.gives
        if "labels" in missing or "target_logprobs" in missing:
            yield place, value, _needs(task, term, missing)
        elif term.exactness_with(task.labels) == "refused":
            text = f"{term.loss} cannot be computed from labels: {task.labels.kind}; {term.instead}"
            yield place, value, text
        elif problem := term.problem_with(task.labels):
            yield place, value, problem
        yield from _token_weights(task, term, (*at, index, "token_weights"))
        if "rollouts" in term.needs:
            yield from ((place, value, problem) for problem in _on_rollouts(task, term))
    yield from _layers(run, task)


def _on_rollouts(task: ResolvedTask, term: Term) -> Iterator[str]:
    """What is sampled must be the student's own text, judged by one teacher."""
    if not task.answers.needs_rollouts:
        yield (
            f"{term.loss} learns from text that the student wrote, and answers: {task.answers.kind} are of others: "
            "write answers: student, or a divergence, such as reverse_kl, which any text can have"
        )
    if getattr(task.answers, "temperature", 1.0) == 0:
        yield (
            f"{term.loss} learns from tokens that were drawn, and answers with temperature: 0 are greedy: write "
            "temperature: 1, or a divergence, such as reverse_kl, which any text can have"
        )
    if getattr(term, "reward_weight", 0.0) and task.reward is None:
        yield (
            f"{term.loss} raises a verifier's reward with reward_weight, and the task has none: write reward: "
            "package.module, a file of yours, or remove reward_weight"
        )
    if task.ensemble is not None:
        yield (
            f"{term.loss} has its reward from one teacher: write teacher: {task.ensemble.teachers[0]} instead of "
            "ensemble, or a divergence, such as reverse_kl"
        )
    if getattr(term, "baseline", "none") == "group" and getattr(task.answers, "n", 2) == 1:
        yield (
            f"{term.loss} with baseline: group compares the answers to a prompt, and answers.n: 1 has one each: write "
            "n: 2 or more, or baseline: batch"
        )


def _reward(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """A function is asked where a term raises what it says, and of rows that can be read again."""
    if task.reward is None:
        return
    place = _place(run, task, "reward")
    if not task.raises_rewards:
        text = "no term raises it: write reward_weight in loss: policy_gradient, or remove reward"
        yield place, task.reward.kind, text
    if task.prompts is not None and task.prompts.streaming:
        text = "is asked about rows by their number, which a stream does not have: write streaming: false"
        yield place, task.reward.kind, text


def _layers(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """States of the teacher are of one teacher, and travel only where they are compared."""
    features = [term for term in task.objective if isinstance(term, Features)]
    if features and task.ensemble is not None:
        text = f"features are states of one teacher: write teacher: {task.ensemble.teachers[0]} instead of ensemble"
        yield _place(run, task, "ensemble"), None, text
    compared = {term.teacher_layer for term in features}
    for index, layer in enumerate(getattr(task.labels, "layers", ())):
        if layer not in compared:
            text = "no term compares this layer: remove it, or add {loss: features, student_layer: N, teacher_layer: "
            yield (*_place(run, task, "labels"), "layers", index), layer, f"{text}{layer}}}"


def _token_weights(task: ResolvedTask, term: Term, at: Place) -> Iterator[Problem]:
    """What weights of tokens need of labels."""
    no_distribution = isinstance(task.labels, NoLabels) or ForwardKl.exactness_with(task.labels) == "refused"
    for index, weight in enumerate(term.token_weights):
        if weight.needs and (no_distribution or weight.needs - task.labels.gives):
            what = "probability of the target id" if "target_event" in weight.needs else "distribution"
            text = f"weights by {weight.kind} look at the teacher's {what}, labels: {task.labels.kind} do not tell it: "
            yield (*at, index, "kind"), weight.kind, text + "write labels: topk or labels: hidden"


def _pairs(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """What terms that compare answers need of rows and of micro-batches."""
    first = next((term for term in task.objective if term.compares_answers), None)
    if first is None or task.prompts is None:
        return
    compared, wanted = first.loss, first.compared_rows
    bad, good = ("rejected", "chosen") if wanted == "preference" else ("bad", "good")
    rows, budget = task.prompts.format, run.training.micro_batch_tokens
    for index, term in enumerate(task.objective):
        if term.form != "sequence":
            text = f"{term.loss} would learn the {bad} answers of {compared} as well as the {good} ones: give it a "
            place = (*_place(run, task, "objective"), index, "loss")
            yield place, term.loss, text + f"task of its own, whose rows have the {good} answers as completion"
        elif term.compares_answers and term.compared_rows != wanted:
            text = f"{term.loss} compares rows of format: {term.compared_rows}, and {compared} those of format: "
            place = (*_place(run, task, "objective"), index, "loss")
            yield place, term.loss, text + f"{wanted}: give it a task of its own"
    if rows not in ("auto", wanted):
        num = "two" if wanted == "preference" else "the"
        text = f"{compared} compares {num} answers to each prompt, and rows of format: {rows} hold "
        text += "others" if rows in ("preference", "candidates") else "one at most"
        yield (*_place(run, task, "prompts"), "format"), rows, f"{text}: write format: {wanted}"
    if task.answers.kind != "dataset":
        text = f"{compared} compares the answers of {wanted} rows: write answers: dataset"
        yield _place(run, task, "answers"), task.answers.kind, text
    if budget < 2 * run.data.max_length:
        least = 2 * run.data.max_length
        text = f"{compared} compares answers to a prompt in one micro-batch: write at least {least}, twice "
        yield ("training", "micro_batch_tokens"), budget, text + "data.max_length, or a smaller data.max_length"


def _needs(task: ResolvedTask, term: Term, missing: frozenset[Need]) -> str:
    what, write = "labels of every token", "labels: topk"
    if "labels" not in missing:
        what, write = "a teacher's log-probability of each target id", "labels: token"
    made = "makes none" if isinstance(task.labels, NoLabels) else "does not hold that"
    return (
        f"{term.loss} needs {what}, and labels: {task.labels.kind} {made}: write {write}, or objective: [cross_entropy]"
    )


def _asked(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """Whether the teachers that a task asks exist, and are as many as it can ask."""
    known = tuple(run.named_teachers())
    own = run.tasks.get(task.name)
    if own is not None and own.teacher is not None:
        if own.route is not None:
            yield ("tasks", task.name, "route"), None, "teacher is given too: keep one of teacher and route"
        if own.ensemble is not None:
            yield ("tasks", task.name, "ensemble"), None, "teacher is given too: keep one of teacher and ensemble"
        if own.teacher not in known:
            yield ("tasks", task.name, "teacher"), own.teacher, _unknown(own.teacher, known)
    if task.route is not None and task.ensemble is not None:
        yield _place(run, task, "ensemble"), None, "route is given too: keep one of route and ensemble"
    for index, name in enumerate(task.ensemble.teachers if task.ensemble else ()):
        if name not in known:
            yield (*_place(run, task, "ensemble"), "teachers", index), name, _unknown(name, known)
    if task.route is not None:
        place = _place(run, task, "route")
        for value, name in task.route.map.items():
            if name not in known:
                yield (*place, "map", value), name, _unknown(name, known)
    if task.asks and not known:
        if not isinstance(task.labels, NoLabels):
            yield _place(run, task, "labels"), task.labels.kind, NO_TEACHER
        if task.answers.needs_generator:
            text = "the run has no teacher to write them: add teacher with generator: {}, or write answers: dataset"
            yield _place(run, task, "answers"), task.answers.kind, text
    elif task.asks and not task.teachers:
        names = ", ".join(known)
        if run.tasks:
            text = f"the run has several teachers: write teacher: with one of {names}, a route, or an ensemble"
            yield ("tasks", task.name, "teacher"), None, text
        else:
            text = f"the run has several teachers ({names}), and no task says which is asked: write tasks, a route, or "
            yield ("teachers",), None, text + "an ensemble"


def _ensemble(run: Run, task: ResolvedTask) -> Iterator[Problem]:
    """What several teachers on the same tokens cannot do."""
    ensemble, labels = task.ensemble, task.soft_labels
    if isinstance(labels, GivenIds) and labels.ids == "teachers":
        text = "is what topk labels of an ensemble become: write labels: topk"
        yield (*_place(run, task, "labels"), "ids"), labels.ids, text
    if ensemble is None:
        return
    place = _place(run, task, "ensemble")
    if task.answers.needs_generator:
        text = f"answers: {task.answers.kind} are written by one teacher, and an ensemble is several: write answers: "
        yield _place(run, task, "answers"), task.answers.kind, text + "dataset, or teacher: NAME instead of ensemble"
    if compared := next((term.loss for term in task.objective if "target_logprobs" in term.needs), None):
        text = f"{compared} compares with one reference: write teacher: {ensemble.teachers[0]} instead of ensemble"
        yield place, None, text
    elif labels is not None and ensemble.how == "logit_mean" and not labels.of_every_id:
        text = f"is renormalised over the whole vocabulary, of which labels: {labels.kind} hold a part: write "
        yield (*place, "how"), ensemble.how, text + "labels: hidden, or how: probability_mean"
    elif labels is not None and ensemble.how == "probability_mean" and not task.has_shared_ids:
        text = f"needs the same ids of every teacher, and labels: {labels.kind} hold each its own: write "
        yield (*place, "how"), ensemble.how, text + "labels: topk or hidden, or how: per_teacher"
    elif task.joins_ids and (other := next((t.loss for t in task.objective if "likeliest_ids" in t.needs), None)):
        text = f"joins the ids of several teachers, and {other} needs those that are one teacher's likeliest: write "
        yield (*place, "how"), ensemble.how, text + "labels: hidden"
    elif labels is not None and ensemble.how == "min_ce" and "target_event" not in labels.gives:
        text = f"needs log-probabilities of the target ids, which labels: {labels.kind} do not tell: write "
        yield (*place, "how"), ensemble.how, text + "labels: topk, or how: per_teacher"
    elif ensemble.how == "per_teacher" and (moving := next((one.loss for one in task.objective if one.moves), None)):
        text = f"{moving} follows the run by one schedule, and per_teacher makes a term of it for each: write how: "
        yield (*place, "how"), ensemble.how, text + "probability_mean, or another loss"
    elif ensemble.how == "per_teacher" and any(one.needs for term in task.objective for one in term.token_weights):
        text = "token_weights look at one teacher's labels, and per_teacher has several: write how: probability_mean, "
        yield (*place, "how"), ensemble.how, text + "or weights by position alone"


def _unknown(name: str, known: tuple[str, ...]) -> str:
    return f"there is no teacher '{name}'{did_you_mean(name, known)} (there are: {', '.join(known) or 'none'})"


def _generators(run: Run) -> Iterator[Problem]:
    """A teacher that writes needs generator replicas, and only such a one."""
    asked: dict[str, str] = {}
    for task in run.resolved_tasks().values():
        if task.answers.needs_generator:
            asked |= dict.fromkeys(task.teachers, task.answers.kind)
    for name, teacher in run.named_teachers().items():
        place = (*place_of_teacher(run, name), "generator")
        if name in asked and teacher.generator is None:
            at = "teacher.generator" if run.teacher is not None else f"teachers.{name}.generator"
            text = f"answers: {asked[name]} lets the teacher write: add {at}, if only generator: {{}}"
            yield place, None, text
        if name not in asked and teacher.generator is not None:
            text = "no task lets this teacher write: remove generator, or write answers: teacher in a task that asks it"
            yield place, None, text


def _one_process(run: Run) -> Iterator[Problem]:
    if run.student.ranks != 1:
        yield ("student", "ranks"), run.student.ranks, "runtime: in_process has one process: write ranks: 1"
    if run.report.prometheus_port is not None:
        text = "runtime: in_process has no Ray, which serves metrics: write runtime: ray, or remove it"
        yield ("report", "prometheus_port"), run.report.prometheus_port, text
    teachers: Mapping[str, Teacher] = run.teachers_by_name()
    labelled = [task for task in run.resolved_tasks().values() if not isinstance(task.labels, NoLabels)]
    scoring = {name for task in labelled for name in task.teachers}
    for name, teacher in teachers.items():
        for role, replicas in teacher.roles().items():
            place = (*place_of_teacher(run, name), role)
            if role == "scorer" and name not in scoring:
                continue  # it is not started
            if replicas.replicas != 1:
                text = "runtime: in_process has one process: write replicas: 1"
                yield (*place, "replicas"), replicas.replicas, text
            if isinstance(replicas.engine, Vllm):
                text = "runtime: in_process needs an engine without processes of its own: write engine: hf"
                yield (*place, "engine"), "vllm", text


def _steps(run: Run) -> Iterator[Problem]:
    budget, longest = run.training.micro_batch_tokens, run.data.max_length
    if budget < longest:
        text = f"is less than data.max_length: {longest}; write at least {longest}, or a smaller data.max_length"
        yield ("training", "micro_batch_tokens"), budget, text
    if run.tasks and run.training.epochs is not None:
        text = "tasks come to their ends at different times: write steps, the number of optimizer steps, instead"
        yield ("training", "epochs"), run.training.epochs, text
    if run.training.epochs is not None and any(rows.streaming for rows in prompts_by_place(run).values()):
        text = "where a stream ends is known only there: write steps, the number of optimizer steps, instead"
        yield ("training", "epochs"), run.training.epochs, text
    steps, warmup, every = run.training.steps, run.optimizer.warmup_steps, run.training.evaluate_every
    if steps is not None and warmup >= steps:
        text = f"leaves no step after the warm-up (training.steps: {steps}); write at most {steps - 1}"
        yield ("optimizer", "warmup_steps"), warmup, text
    if every > 0 and not held_out_by_place(run):
        text = "there is nothing to evaluate on: add data.evaluation, or write evaluate_every: 0"
        yield ("training", "evaluate_every"), every, text


def _store(run: Run) -> Iterator[Problem]:
    """Whether there are labels to keep; and in a run without teachers, whether all of them can be there."""
    if run.store is None:
        return
    labelled = [task for task in run.resolved_tasks().values() if task.soft_labels is not None]
    if not labelled:
        yield ("store",), None, "no task takes labels from a teacher, so there is nothing to keep: remove store"
    if run.store.mode != "only":
        return
    mode: Place = ("store", "mode")
    for task in run.resolved_tasks().values():
        at = ".".join(map(str, _place(run, task, "answers")))
        if task.answers.needs_generator:
            text = f"starts no teacher, and {at}: {task.answers.kind} lets one write: write mode: read_write"
            yield mode, "only", text
        if task.joins_ids:
            text = "keeps no labels of a second request, as mixtures of topk labels make: write labels: hidden, or "
            yield mode, "only", text + "mode: read_write"
        if task.soft_labels is not None and task.soft_labels.takes_ids:
            text = f"labels: {task.labels.kind} depend on the student of the moment, and are not kept: write other "
            yield mode, "only", text + "labels, or mode: read_write"

"""Tasks and teachers by name: what a run with several of them is, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.answers import DatasetAnswers, TeacherAnswers
from configs.errors import ConfigError
from configs.labels import Hidden, NoLabels, TopK
from configs.load import config_hash, dump_run, load_run
from configs.losses import CrossEntropy, ForwardKl
from configs.rules import unused_teachers
from configs.schema import Run

ONE = """\
name: x
student: {model: {path: models/student}}
teacher: {name: big, model: {path: models/big}}
prompts: {path: rows.jsonl}
training: {steps: 10}
"""
TWO = """\
name: x
student: {model: {path: models/student}}
teachers:
  big: {model: {path: models/big}, generator: {}}
  code: {model: {path: models/code}}
prompts: {path: rows.jsonl}
labels: {kind: topk, k: 32}
tasks:
  chat:
    teacher: big
    answers: teacher
    share: 0.25
  code:
    prompts: {path: code.jsonl, format: text}
    labels: hidden
    objective: [{loss: forward_kl, weight: 0.5}, {loss: cross_entropy}]
    route: {column: domain, map: {python: code, prose: big}}
    weight: 2
training: {steps: 10}
"""

Refused = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Run]:
    def load_text(text: str, *overrides: str) -> Run:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return load_run(file, overrides).run

    return load_text


@pytest.fixture
def refused(load: Callable[..., Run], tmp_path: Path) -> Refused:
    def message(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message


def test_a_run_without_tasks_is_one_task_of_its_stations(load: Callable[..., Run]) -> None:
    run = load(ONE)
    assert {name: teacher.model.path for name, teacher in run.teachers_by_name().items()} == {"big": "models/big"}
    (task,) = run.resolved_tasks().values()
    assert (task.name, task.teacher, task.teachers, task.prompts) == ("main", "big", ("big",), run.prompts)
    assert (task.answers, task.labels, task.objective) == (DatasetAnswers(), TopK(), (ForwardKl(),))
    assert (task.weight, task.share, task.normaliser) == (1.0, 1.0, "run")


def test_what_a_task_does_not_say_comes_from_the_top_level(load: Callable[..., Run], tmp_path: Path) -> None:
    run = load(TWO)
    chat, code = run.resolved_tasks().values()
    assert [teacher.name for teacher in run.teachers_by_name().values()] == ["big", "code"]
    assert (chat.prompts, chat.labels, chat.objective) == (run.prompts, TopK(k=32), (ForwardKl(),))
    assert (chat.answers, chat.teachers, chat.share) == (TeacherAnswers(), ("big",), 0.25)
    assert (code.answers, code.labels) == (DatasetAnswers(), Hidden())
    assert code.objective == (ForwardKl(weight=0.5), CrossEntropy())
    assert (code.teacher, code.teachers, code.weight) == (None, ("code", "big"), 2.0)
    assert unused_teachers(run) == ()
    (tmp_path / "again.yaml").write_text(dump_run(run))
    assert load_run(tmp_path / "again.yaml").run == run


def test_hard_labels_alone_need_no_teacher(load: Callable[..., Run]) -> None:
    text = ONE.replace("teacher: {name: big, model: {path: models/big}}\n", "labels: none\n")
    run = load(text, "objective=[{loss: cross_entropy}]")
    assert run.teachers_by_name() == {}
    (task,) = run.resolved_tasks().values()
    assert (task.labels, task.teacher, task.teachers) == (NoLabels(), None, ())


def test_a_teacher_that_no_task_asks_is_found(load: Callable[..., Run]) -> None:
    assert unused_teachers(load(TWO, "tasks.code.route=null", "tasks.code.teacher=big")) == ("code",)
    assert unused_teachers(load(ONE, "labels=none", "objective=[{loss: cross_entropy}]")) == ("big",)


def test_an_override_reaches_into_a_task_and_a_teacher(load: Callable[..., Run]) -> None:
    run = load(TWO, "tasks.code.labels.temperature=2", "teachers.code.scorer.engine.max_num_seqs=4")
    assert run.resolved_tasks()["code"].labels == Hidden(temperature=2.0)
    assert run.teachers["code"].scorer.engine.max_num_seqs == 4


NONE = ONE.replace("teacher: {name", "# {name")
MISTAKES = {
    "a task without prompts": (TWO.replace("\nprompts: {path: rows.jsonl}", ""), [], "run.yaml:8: tasks.chat.prompts"),
    "all shares zero": (TWO, ["tasks.chat.share=0", "tasks.code.share=0"], "every share is 0"),
    "a negative share": (TWO, ["tasks.chat.share=-1"], "tasks.chat.share = -1\n      must be at least 0"),
    "a weight of zero": (TWO, ["tasks.chat.weight=0"], "tasks.chat.weight = 0\n      must be at least 0.000000001"),
    "a weight that float32 cannot hold": (TWO, ["tasks.chat.weight=1e300"], "must be at most 1000000000"),
    "a weight of a term that float32 cannot hold": (TWO, ["tasks.code.objective.0.weight=1e300"], "must be at most"),
    "the name of the only task": (
        TWO.replace("  chat:", "  main:"),
        [],
        "run.yaml:9: tasks.main\n      main is the only task of a run that names none",
    ),
    "hard labels of rejected answers": (
        ONE,
        ["objective=[{loss: dpo}, {loss: cross_entropy}]", "labels=token"],
        "cross_entropy would learn the rejected answers of dpo as well as the chosen ones: give it a task of its own",
    ),
    "a teacher that does not exist": (
        TWO.replace("teacher: big", "teacher: bog"),
        [],
        "run.yaml:10: tasks.chat.teacher = 'bog'\n      there is no teacher 'bog'; did you mean 'big'?",
    ),
    "a route to a teacher that does not exist": (
        TWO.replace("python: code", "python: coda"),
        [],
        "run.yaml:17: tasks.code.route.map.python = 'coda'\n      there is no teacher 'coda'; did you mean 'code'?",
    ),
    "teacher and route": (TWO, ["tasks.code.teacher=code"], "keep one of teacher and route"),
    "teacher and teachers": (ONE + "teachers: {a: {model: {path: a}}}\n", [], "keep one of teacher (for one)"),
    "several teachers and no choice": (
        TWO.replace("    teacher: big\n", ""),
        [],
        "write teacher: with one of big, code",
    ),
    "several teachers and no tasks": (
        ONE.replace("teacher: {name: big,", "teachers: {a: {model: {path: a}}, b: {").replace("}}\np", "}}}\np"),
        [],
        "no task says which is asked",
    ),
    "a name beside the key": (TWO, ["teachers.code.name=other"], "the name of a teacher is its key, code"),
    "no teacher": (
        NONE,
        [],
        "labels\n      labels come from a teacher",
    ),
    "nobody to write": (
        NONE + "labels: none\nobjective: [{loss: cross_entropy}]\nanswers: teacher\n",
        [],
        "the run has no teacher to write them",
    ),
    "an objective without its labels": (
        TWO,
        ["tasks.code.labels=none"],
        "run.yaml:16: tasks.code.objective.0.loss = 'forward_kl'\n      forward_kl needs labels of every token, and "
        "labels: none makes none: write labels: topk, or objective: [cross_entropy]",
    ),
    "a divergence of one id alone": (
        TWO,
        ["tasks.code.labels=token"],
        "forward_kl cannot be computed from labels: token; write labels: topk (some ids of each row) or labels: hidden",
    ),
    "a term of the target id, from labels of a user's that do not tell it": (
        ONE,
        ["objective=[{loss: dkd}]", "labels=fakes.poisoned_labels"],
        "dkd cannot be computed from labels: fakes.poisoned_labels; write labels: topk (some ids of each row) or",
    ),
    "more ids than the labels keep beside the control ids": (
        ONE,
        ["objective=[{loss: lsm, k: 16}]", "labels={kind: topk, k: 16, control_ids: [2]}"],
        "topk keep 16, 1 of them control ids: write k: 15 or less here, or k: 17 there",
    ),
    "more ids than the labels keep": (
        ONE,
        ["objective=[{loss: lsm, k: 20}]", "labels={kind: topk, k: 16}"],
        "lsm compares the 20 likeliest ids of each row, and labels: topk keep 16: write k: 16 or less here, or k: 20 "
        "there",
    ),
    "a weight of tokens that the labels do not tell": (
        ONE,
        ["objective=[{loss: cross_entropy, token_weights: [entropy]}]", "labels=token"],
        "weights by entropy look at the teacher's distribution, labels: token do not tell it: write labels: topk or",
    ),
    "a weight of tokens by a target that the labels do not tell": (
        ONE,
        ["objective=[{loss: forward_kl, token_weights: [confidence]}]", "labels=fakes.poisoned_labels"],
        "weights by confidence look at the teacher's probability of the target id, labels: fakes.poisoned_labels do",
    ),
    "weights of tokens for whole answers": (
        ONE,
        ["objective=[{loss: dpo, token_weights: [{kind: position, half_life: 9}]}]", "labels=token"],
        "a term that compares whole answers has no weights of tokens: remove token_weights",
    ),
    "one weight of tokens twice": (
        ONE,
        ["objective=[{loss: forward_kl, token_weights: [entropy, {kind: entropy, at: 2}]}]"],
        "entropy is named twice: keep one of both",
    ),
    "a schedule that goes back": (
        ONE,
        ["objective=[{loss: taid, start: 0.9, end: 0.8}]"],
        "taid moves from start to end: start (0.9) must not exceed end (0.8)",
    ),
    "a comparison of answers without log-probabilities": (
        ONE,
        ["objective=[{loss: dpo}]"],
        "dpo needs a teacher's log-probability of each target id, and labels: topk does not hold that: write "
        "labels: token",
    ),
    "a comparison of answers without any labels": (
        ONE,
        ["objective=[{loss: dpo}]", "labels=none"],
        "labels: none makes none: write labels: token",
    ),
    "a comparison of rows with one answer": (
        ONE,
        ["objective=[{loss: dpo}]", "labels=token", "prompts.format=messages"],
        "prompts.format = 'messages'\n      dpo compares two answers to each prompt, and rows of format: messages hold "
        "one at most: write format: preference",
    ),
    "a list of candidates without log-probabilities": (
        ONE,
        ["objective=[{loss: listwise_kl}]"],
        "listwise_kl needs a teacher's log-probability of each target id, and labels: topk does not hold that: write "
        "labels: token",
    ),
    "a list of candidates in rows of pairs": (
        ONE,
        ["objective=[{loss: scored_listwise_kl}]", "labels=none", "prompts.format=preference"],
        "scored_listwise_kl compares the answers to each prompt, and rows of format: preference hold others: write "
        "format: candidates",
    ),
    "pairs beside a list of candidates": (
        ONE,
        ["objective=[{loss: listwise_kl}, {loss: dpo}]", "labels=token"],
        "dpo compares rows of format: preference, and listwise_kl those of format: candidates: give it a task of its "
        "own",
    ),
    "hard labels of bad candidates": (
        ONE,
        ["objective=[{loss: listwise_kl}, {loss: cross_entropy}]", "labels=token"],
        "cross_entropy would learn the bad answers of listwise_kl as well as the good ones: give it a task of its own",
    ),
    "features of labels that have no layers": (
        ONE,
        ["objective=[{loss: features, student_layer: 1, teacher_layer: 2}]"],
        "features cannot be computed from labels: topk; write labels: {kind: hidden, layers: [the teacher_layer of "
        "each such term]}",
    ),
    "features of a layer that the labels do not hold": (
        ONE,
        ["objective=[{loss: features, student_layer: 1, teacher_layer: 2}]", "labels={kind: hidden, layers: [1]}"],
        "teacher_layer: 2 is compared, and labels: hidden hold layers [1]: write labels: {kind: hidden, layers: [1, "
        "2]}",
    ),
    "a layer that no term compares": (
        ONE,
        ["labels={kind: hidden, layers: [4]}"],
        "labels.layers.0 = 4\n      no term compares this layer: remove it, or add {loss: features, student_layer: N, "
        "teacher_layer: 4}",
    ),
    "a layer named twice": (ONE, ["labels={kind: hidden, layers: [4, 4]}"], "names a layer twice; name each once"),
    "a temperature of a distance that has none": (
        ONE,
        ["objective=[{loss: features, student_layer: 1, teacher_layer: 2, temperature: 2}]"],
        "distance: l2 has none, only ce does: remove it",
    ),
    "weights of tokens of features": (
        ONE,
        [
            "objective=[{loss: features, student_layer: 1, teacher_layer: 2, token_weights: [{kind: position, "
            "half_life: 9}]}]",
        ],
        "a term that is about states inside the models has no weights of tokens: remove token_weights",
    ),
    "labels of a task that the objective of all cannot use": (
        TWO.replace("    teacher: big\n", "    teacher: big\n    labels: token\n")
        + "objective: [{loss: reverse_kl}]\n",
        [],
        "run.yaml:11: tasks.chat.labels = 'token'\n      reverse_kl cannot be computed from labels: token",
    ),
    "an override of a name with a dot": (
        TWO.replace("  chat:", "  chat.en:"),
        ["tasks.chat.en.share=-1"],
        "--set tasks.chat.en.share=-1: tasks.chat.en.share = -1\n      must be at least 0",
    ),
    "an objective that nobody wrote, without labels": (
        ONE,
        ["labels=none"],
        "--set labels=none: labels = 'none'\n      forward_kl needs labels of every token",
    ),
    "a teacher that writes without a generator": (TWO, ["teachers.big.generator=null"], "add teachers.big.generator"),
    "a teacher of a route that writes without a generator": (
        TWO,
        ["tasks.chat.teacher=null", "tasks.chat.route={column: c, map: {x: big, y: code}}"],
        "teachers.code.generator\n      answers: teacher lets the teacher write: add teachers.code.generator",
    ),
    "a generator that nobody asks": (TWO, ["teachers.code.generator={}"], "teachers.code.generator"),
    "text for a teacher that writes": (
        TWO,
        ["tasks.code.answers=teacher", "teachers.code.generator={}"],
        "format: text has none",
    ),
    "a term twice in a task": (
        TWO,
        ["tasks.code.objective.1.loss=forward_kl"],
        "objective.1.loss = 'forward_kl'",
    ),
    "an unknown station": (
        TWO,
        ["tasks.code.label=topk"],
        "unknown key 'label'; did you mean 'labels'?",
    ),
    "a word of another section of a teacher": (
        TWO,
        ["teachers.code.tp=4"],
        "unknown key 'tp'; it belongs in teachers.code.scorer.tensor_parallel_size or "
        "teachers.code.generator.tensor_parallel_size",
    ),
    "an unknown parameter": (TWO, ["tasks.code.labels={kind: topk, kk: 3}"], "unknown key 'kk'"),
    "an unknown key of a teacher": (
        TWO,
        ["teachers.code.scorer.engine.k=3"],
        "teachers.code.scorer.engine.k = 3",
    ),
    "a name that leaves its folder": (TWO.replace("  chat:", "  ../chat:"), [], "letters, digits, dots"),
    "in one process": (TWO, ["runtime=in_process"], "teachers.code.scorer.engine"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_tasks_or_teachers_is_answered_with_what_to_write(case: str, refused: Refused) -> None:
    text, overrides, part = MISTAKES[case]
    message = refused(text, *overrides)
    assert part in message
    for jargon in ("Input should", "Extra inputs", "pydantic", "Value error", "Traceback", "[key]"):
        assert jargon not in message


def test_all_broken_rules_are_told_at_once(refused: Refused) -> None:
    message = refused(TWO, "tasks.chat.teacher=a", "tasks.code.route.map.python=b", "training.micro_batch_tokens=64")
    assert "3 problems" in message


def test_where_teachers_and_rows_of_tasks_lie_is_no_part_of_what_is_learnt(load: Callable[..., Run]) -> None:
    base = config_hash(load(TWO))
    moved = ("teachers.code.model.path=x", "teachers.big.scorer.placement={nodes: 1}", "tasks.code.prompts.path=y")
    assert config_hash(load(TWO, *moved)) == base
    for other in ("tasks.code.share=2", "tasks.code.prompts.max_rows=5", "teachers.code.scorer.replicas=2"):
        assert config_hash(load(TWO, other)) != base, other


def test_every_kind_that_has_code_is_named_with_its_place(load: Callable[..., Run]) -> None:
    places = {
        place: choice.kind
        for place, _, choice in load(
            TWO, "tasks.chat.labels=none", "tasks.chat.objective=[{loss: cross_entropy}]"
        ).choices()
    }
    assert places == {
        "labels": "topk",
        "answers": "dataset",
        "tasks.chat.answers": "teacher",
        "tasks.code.labels": "hidden",
        "teachers.big.scorer.engine": "vllm",
        "teachers.big.generator.engine": "vllm",
        "teachers.code.scorer.engine": "vllm",
    }


def test_the_json_schema_knows_tasks_and_the_parameters_of_their_kinds() -> None:
    schema = Run.model_json_schema()
    task = schema["$defs"]["Task"]["properties"]
    forms = task["labels"]["anyOf"]
    assert {form.get("title") for form in forms} >= {"topk", "hidden", "dense", "none"}
    (of_a_name,) = schema["properties"]["tasks"]["patternProperties"].values()
    assert of_a_name["$ref"].endswith("/Task")
    losses = {form.get("title"): form for form in task["objective"]["anyOf"][0]["items"]["anyOf"]}
    assert set(losses["jsd"]["required"]) == {"loss", "beta"}


def test_the_recipe_of_two_teachers_is_a_run() -> None:
    run = load_run(Path(__file__).parents[2] / "configs/recipes/two_teachers.yaml").run
    tasks = run.resolved_tasks()
    assert {name: task.teachers for name, task in tasks.items()} == {"chat": ("prose",), "code": ("code",)}
    assert [task.share for task in tasks.values()] == [3, 1]
    assert all(task.evaluation is not None for task in tasks.values())


def test_tasks_are_trained_by_steps() -> None:
    recipe = Path(__file__).parents[2] / "configs/recipes/two_teachers.yaml"
    with pytest.raises(ConfigError, match=r"training.epochs = 2\n.*write steps"):
        load_run(recipe, ["training.steps=null", "training.epochs=2"])


def test_a_scorer_that_is_not_started_may_name_any_engine_in_one_process(
    load: Callable[..., Run], refused: Refused
) -> None:
    writes = ["runtime=in_process", "teacher.generator={engine: hf}", "answers=teacher"]
    run = load(ONE, *writes, "labels=none", "objective=[{loss: cross_entropy}]")
    assert run.teacher.scorer.engine.kind == "vllm"
    assert "teacher.scorer.engine = 'vllm'" in refused(ONE, *writes)


TOGETHER = """\
name: x
student: {model: {path: models/student}}
teachers:
  big: {model: {path: models/big}}
  code: {model: {path: models/code}}
prompts: {path: rows.jsonl}
labels: hidden
ensemble: {teachers: [big, code], weights: {big: 3, code: 1}}
training: {steps: 10}
"""


def test_several_teachers_are_asked_together_and_a_task_may_ask_others(load: Callable[..., Run]) -> None:
    (task,) = load(TOGETHER).resolved_tasks().values()
    assert (task.teacher, task.teachers, task.ensemble.asked) == (None, ("big", "code"), "big+code")
    assert (task.ensemble.how, task.ensemble.on_lost) == ("probability_mean", "end")
    tasks = "tasks={a: {}, b: {teacher: code}, c: {ensemble: {teachers: [code, big], how: min_ce}}}"
    a, b, c = load(TOGETHER, tasks).resolved_tasks().values()
    assert (a.ensemble, b.ensemble, c.ensemble.how) == (task.ensemble, None, "min_ce")
    assert (b.teachers, c.teachers) == (("code",), ("code", "big"))


WRONG_ENSEMBLES = {
    "an unknown teacher": (
        ["ensemble.teachers=[big, cod]", "ensemble.weights={}"],
        "ensemble.teachers.1 = 'cod'\n      there is no teacher 'cod'; did you mean 'code'?",
    ),
    "one teacher": (["ensemble={teachers: [big]}"], "for one, write teacher: big, no ensemble"),
    "a teacher twice": (
        ["ensemble={teachers: [big, big]}"],
        "big is named twice: name it once, and give it more weight",
    ),
    "a weight of another": (
        ["ensemble.weights.bog=1"],
        "is no teacher of the ensemble (big, code): remove it",
    ),
    "a weight that is missing": (
        ["ensemble.weights={big: 2}"],
        "code has no weight: give one to each, weights: {big: 1, code: 1}, or to none",
    ),
    "a weight of zero": (["ensemble.weights.code=0"], "ensemble.weights.code = 0\n      must be at least 0.000000001"),
    "weights twice": (["ensemble.weights_column=w"], "weights are given too: keep one of the two"),
    "weights where one is picked": (
        ["ensemble.how=min_ce"],
        "min_ce takes one teacher for each sequence: remove weights, or write how: probability_mean",
    ),
    "a method that does not exist": (
        ["ensemble.how=mean"],
        "'probability_mean', 'logit_mean', 'per_teacher' or 'min_ce'",
    ),
    "a geometric mean of some ids": (
        ["labels=topk", "ensemble.how=logit_mean"],
        "is renormalised over the whole vocabulary, of which labels: topk hold a part: write labels: hidden, or how: "
        "probability_mean",
    ),
    "a mixture of no distributions": (
        ["labels=token", "objective=[{loss: cross_entropy}]"],
        "needs the same ids of every teacher, and labels: token hold each its own: write labels: topk or hidden",
    ),
    "ids of one teacher where those of all are joined": (
        ["labels=topk", "objective=[{loss: lsm}]"],
        "joins the ids of several teachers, and lsm needs those that are one teacher's likeliest: write labels: hidden",
    ),
    "joined ids that a store is to hold": (
        ["labels=topk", "store={path: labels, mode: only}"],
        "store.mode = 'only'\n      keeps no labels of a second request, as mixtures of topk labels make",
    ),
    "ids of each that are added to the student's": (
        ["labels={kind: given_ids, add_teacher_topk: 4}"],
        "needs the same ids of every teacher, and labels: given_ids hold each its own",
    ),
    "what topk labels become": (
        ["labels={kind: given_ids, ids: teachers}", "ensemble={teachers: [big, code], how: per_teacher}"],
        "labels.ids = 'teachers'\n      is what topk labels of an ensemble become: write labels: topk",
    ),
    "weights of tokens by one of several teachers": (
        [
            "ensemble={teachers: [big, code], how: per_teacher}",
            "objective=[{loss: forward_kl, token_weights: [entropy]}]",
        ],
        "token_weights look at one teacher's labels, and per_teacher has several: write how: probability_mean, or",
    ),
    "a schedule for each teacher": (
        ["ensemble={teachers: [big, code], how: per_teacher}", "objective=[{loss: taid}]"],
        "taid follows the run by one schedule, and per_teacher makes a term of it for each",
    ),
    "several references": (
        ["labels=token", "objective=[{loss: dpo}]"],
        "dpo compares with one reference: write teacher: big instead of ensemble",
    ),
    "several authors": (
        ["answers=teacher"],
        "are written by one teacher, and an ensemble is several: write answers: dataset, or teacher: NAME",
    ),
    "a route too": (["route={column: d, map: {x: big}}"], "route is given too: keep one of route and ensemble"),
    "a teacher too": (
        ["tasks={a: {teacher: big, ensemble: {teachers: [big, code]}}}"],
        "tasks.a.ensemble\n      teacher is given too: keep one of teacher and ensemble",
    ),
}


@pytest.mark.parametrize(("overrides", "words"), WRONG_ENSEMBLES.values(), ids=WRONG_ENSEMBLES)
def test_an_ensemble_that_cannot_be_says_what_to_write(refused: Refused, overrides: list[str], words: str) -> None:
    assert words in refused(TOGETHER, *overrides)


def test_the_recipe_of_an_ensemble_is_a_run() -> None:
    (task,) = load_run(Path(__file__).parents[2] / "configs/recipes/ensemble.yaml").run.resolved_tasks().values()
    assert (task.ensemble.asked, task.ensemble.weights) == ("prose+code", {"prose": 3.0, "code": 1.0})

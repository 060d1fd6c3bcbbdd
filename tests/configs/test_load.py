"""Configurations: what is accepted, and that every mistake comes back at its line, with what to write."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.labels import TopK
from configs.load import LoadedRun, config_hash, differences, dump_run, load_run, run_folder
from configs.schema import Run

GOOD = """\
name: good
student:
  model: {path: models/student}
teacher:
  model: {path: models/teacher}
prompts:
  path: rows.jsonl
training:
  steps: 10
"""

HOMES = ("folder", "prompts.path", "teacher.chat_template", "teacher.model.path", "student.model.local_copy")

Load = Callable[..., LoadedRun]
Refused = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a text with overrides."""

    def load_text(text: str, *overrides: str) -> LoadedRun:
        file = tmp_path / "run.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_run(file, overrides)

    return load_text


@pytest.fixture
def refused(load: Load, tmp_path: Path) -> Refused:
    """The message of a text that must be refused, without the folder of the test."""

    def message(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(str(tmp_path) + "/", "")

    return message


def test_a_small_configuration_loads_with_every_default_filled_in(load: Load) -> None:
    run = load(GOOD).run
    assert run.training.steps == 10
    assert run.labels.flat() == {"kind": "topk", "k": 64, "temperature": 1.0, "control_ids": []}
    assert run.teacher.scorer.engine.kind == "vllm"
    assert run_folder(run) == Path("runs/good")


def test_five_mistakes_are_reported_together_each_at_its_line(refused: Refused) -> None:
    text = """\
    name: good
    student:
      model: {path: models/student}
      ranks: two
    teacher:
      model: {path: models/teacher}
    prompts: {path: rows.jsonl}
    data:
      on_too_long: dorp
    training:
      steps: 0
    optimizer:
      learnig_rate: 1e-3
    labels: {kind: topk, k: -3}
    """
    message = refused(textwrap.dedent(text))
    problems = dict(zip(message.splitlines()[1::2], message.splitlines()[2::2], strict=True))
    assert message.splitlines()[0] == "run.yaml: 5 problems"
    assert [(where.strip(), what.strip()) for where, what in problems.items()] == [
        ("run.yaml:4: student.ranks = 'two'", "must be a whole number"),
        ("run.yaml:9: data.on_too_long = 'dorp'", "must be 'error', 'drop' or 'truncate'; did you mean 'drop'?"),
        ("run.yaml:11: training.steps = 0", "must be greater than 0"),
        ("run.yaml:13: optimizer.learnig_rate = 0.001", "unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
        ("run.yaml:14: labels.k = -3", "must be greater than 0"),
    ]


CASES = {
    "a required section is missing": ("name: x\n", [], ["'student' is missing", "'prompts' is missing", "run.yaml:1"]),
    "a plug-in that does not exist": (GOOD + "labels: topkk\n", [], ["unknown kind 'topkk'; did you mean 'topk'?"]),
    "a kind that is no text": (GOOD + "labels: {kind: 3}\n", [], ["labels.kind = 3", "needs a kind", "topk"]),
    "a parameter the plug-in does not have": (GOOD + "labels: {kind: topk, kk: 3}\n", [], ["unknown key 'kk'"]),
    "a plug-in of the wrong type": (GOOD + "labels: [topk]\n", [], ["must be a kind, such as"]),
    "a module that is not there": (GOOD + "labels: my_house.labels\n", [], ["no module 'my_house'"]),
    "text for a number": (GOOD + "seed: '3'\n", [], ["seed = '3'", "must be a whole number (without quotes)"]),
    "a number for text": (GOOD.replace("good", "7"), [], ["name = 7", "must be text (in quotes: '7')"]),
    "a number for a switch": (GOOD + "data: {shuffle: 1}\n", [], ["must be true or false"]),
    "no is text in YAML 1.2": (GOOD + "data: {shuffle: no}\n", [], ["= 'no'", "must be true or false"]),
    "half a number": (GOOD + "optimizer: {learning_rate: 1e-4x}\n", [], ["'1e-4x'", "must be a number"]),
    "not finite": (GOOD + "optimizer: {learning_rate: .inf}\n", [], ["must be a finite number"]),
    "an engine for a scorer": (GOOD, ["teacher.scorer=hf"], ["here {engine: hf}"]),
    "a loss of the user's": (GOOD, ["objective=[my.loss]"], ["there is no module 'my'"]),
    "a path for a dataset": (GOOD, ["prompts=rows.jsonl"], ["here {path: rows.jsonl}"]),
    "a list that is too short": (GOOD + "optimizer: {betas: [0.9]}\n", [], ["item 1 of the list is missing"]),
    "an empty objective": (GOOD + "objective: []\n", [], ["objective = []", "must have at least 1 item"]),
    "a key of another section": (GOOD + "learning_rate: 1e-3\n", [], ["it belongs in optimizer.learning_rate"]),
    "a key given twice": (GOOD + "name: again\n", [], ["run.yaml:10: name", "given twice, first in run.yaml:1"]),
    "a name that leaves its folder": (GOOD.replace("good", "../x"), [], ["'../x'", "letters, digits, dots"]),
    "a tag that would run code": (
        GOOD + "seed: !!python/object/apply:os.system [ls]\n",
        [],
        ["run.yaml:10: seed", "python/object/apply:os.system are refused: write a plain value"],
    ),
    "a tag on text": (GOOD + "folder: !!python/name:os.system x\n", [], ["run.yaml:10: folder", "are refused"]),
    "steps and epochs": (GOOD + "  epochs: 2\n", [], ["training.epochs = 2", "keep one of steps and epochs"]),
    "neither steps nor epochs": (GOOD, ["training.steps=null"], ["give steps or epochs"]),
    "jsd without beta": (GOOD + "objective: [{loss: jsd}]\n", [], ["objective.0.beta", "beta: 0.5"]),
    "beta without jsd": (GOOD + "objective: [{loss: forward_kl, beta: 0.5}]\n", [], ["remove beta"]),
    "a term twice": (GOOD + "objective: [{loss: forward_kl}, {loss: forward_kl}]\n", [], ["is a term already"]),
    "a teacher without a generator": (
        GOOD + "answers: teacher\n",
        [],
        ["teacher.generator", "generator: {}"],
    ),
    "a generator that nobody asks": (GOOD, ["teacher.generator={}"], ["remove generator, or write answers: teacher"]),
    "several greedy answers": (
        GOOD + "answers: {kind: teacher, n: 4}\n",
        ["teacher.generator={}"],
        ["run.yaml:10: answers.n = 4", "are all the same: write a temperature above 0, or n: 1"],
    ),
    "a temperature that vLLM raises": (
        GOOD,
        ["teacher.generator={}", "answers={kind: teacher, temperature: 0.001}"],
        ["answers.temperature = 0.001", "vLLM draws at 0.01 or above: write that, or 0, which is greedy"],
    ),
    "a string that ends every answer": (
        GOOD,
        ["teacher.generator={}", "answers={kind: teacher, stop: ['']}"],
        ["answers.stop.0 = ''"],
    ),
    "prompts without anybody who answers": (GOOD, ["prompts.format=prompt"], ["needs rows with answers"]),
    "offload of parameters at stage 2": (GOOD, ["student.offload=optimizer_and_parameters"], ["zero_stage: 3"]),
    "a micro-batch that no sequence fits": (GOOD, ["training.micro_batch_tokens=64"], ["data.max_length: 2048"]),
    "all steps are warm-up": (GOOD, ["optimizer.warmup_steps=10"], ["write at most 9"]),
    "evaluation of nothing": (GOOD, ["training.evaluate_every=5"], ["add data.evaluation"]),
    "evaluation rows without answers": (GOOD, ["data.evaluation={path: a, format: prompt}"], ["held-out rows need"]),
    "in_process with processes": (GOOD, ["runtime=in_process", "student.ranks=2"], ["write ranks: 1"]),
    "in_process with vllm": (GOOD, ["runtime=in_process"], ["write engine: hf"]),
    "tensor parallel transformers": (
        GOOD,
        ["teacher.scorer={engine: hf, tensor_parallel_size: 2}"],
        ["teacher.scorer.tensor_parallel_size = 2", "or engine: vllm"],
    ),
    "more than a GPU's memory": (
        GOOD,
        ["teacher.scorer.engine.gpu_memory_utilization=1.5"],
        ["teacher.scorer.engine.gpu_memory_utilization = 1.5", "must be at most 1"],
    ),
    "a store without labels": (
        GOOD + "labels: none\nobjective: [cross_entropy]\n",
        ["store.path=x"],
        ["store", "no task takes labels from a teacher, so there is nothing to keep: remove store"],
    ),
    "answers of a teacher that is not started": (
        GOOD + "answers: teacher\n",
        ["teacher.generator={}", "store={path: x, mode: only}"],
        ["store.mode = 'only'", "starts no teacher, and answers: teacher lets one write: write mode: read_write"],
    ),
    "a store without a folder": (GOOD, ["store={path: ''}"], ["store.path = ''", "is empty: name a folder of its own"]),
    "an unknown mode of the store": (GOOD, ["store={path: x, mode: offline}"], ["store.mode = 'offline'", "only"]),
    "an override without value": (GOOD, ["training.steps"], ["--set training.steps", "--set path.to.key=value"]),
    "an override that is wrong": (GOOD, ["training.steps=0"], ["--set training.steps=0: training.steps = 0"]),
    "an override of an unknown key": (GOOD, ["training.stepps=3"], ["--set training.stepps=3", "did you mean 'steps'"]),
    "an override that is no YAML": (GOOD, ["training.steps=[1"], ["is not YAML"]),
    "an override into text": (GOOD, ["name.first=x"], ["name is 'good', which holds no 'first'"]),
    "an override of an item that is not there": (
        GOOD + "objective: [{loss: forward_kl}]\n",
        ["objective.3.weight=2"],
        ["objective is a list of 1", "0 to 0"],
    ),
    "an override of an item of a default": (GOOD, ["objective.0.weight=2"], ["set it whole"]),
    "an empty file": ("", [], ["the file is empty"]),
    "comments only": ("# nothing\n", [], ["the file is empty"]),
    "a list": ("- a\n- b\n", [], ["run.yaml:1: a configuration is a mapping"]),
    "broken YAML": ("name: x\ntraining: [1,\n", [], ["run.yaml:", "this is not YAML"]),
    "two documents": ("name: x\n---\nname: y\n", [], ["run.yaml:2", "not YAML"]),
    "a tab": ("training:\n\tsteps: 3\n", [], ["run.yaml:2", "not YAML"]),
    "control characters": ("name: \x00\n", [], ["not YAML"]),
    "a list that contains itself": ("name: &a [*a]\n", [], ["an alias that contains itself?"]),
    "deep nesting": ("[" * 2000, [], ["nested too deeply"]),
    "aliases that explode": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefg")),
        [],
        ["more than 20000 values"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_with_what_to_write(case: str, refused: Refused) -> None:
    text, overrides, parts = CASES[case]
    message = refused(text, *overrides)
    for part in parts:
        assert part in message
    for jargon in ("Input should", "Extra inputs", "pydantic", "Value error", "tuple[", "Traceback"):
        assert jargon not in message


WRITES = "teacher.generator={} answers.kind=teacher answers.temperature=1.0"
WORDS = {
    # what people write -> what the answer has them write, which is accepted
    "optimizer.lr=0.1": "optimizer.learning_rate=0.1",
    "training.lr=0.1": "optimizer.learning_rate=0.1",
    "training.batch_size=4": "training.sequences_per_step=4",
    "training.save_steps=4": "training.save_every=4",
    "training.seed=4": "seed=4",
    "student.lora.r=4": "student.lora.rank=4",
    "student.path=models/x": "student.model.path=models/x",
    "student.replicas=4": "student.ranks=4",
    "student.gradient_checkpointing=true": "student.activation_checkpointing=true",
    "teacher.tp=4": "teacher.scorer.tensor_parallel_size=4",
    "teacher.scorer.gpu_memory_utilization=0.5": "teacher.scorer.engine.gpu_memory_utilization=0.5",
    "teacher.model.license=mit": "teacher.model.licence=mit",
    "labels.top_k=4": "labels.k=4",
    "training.k=4": "labels.k=4",
    f"{WRITES} answers.max_tokens=4": f"{WRITES} answers.max_new_tokens=4",
    f"{WRITES} answers.num_return_sequences=4": f"{WRITES} answers.n=4",
    f"{WRITES} answers.num_samples=4": f"{WRITES} answers.n=4",
    f"{WRITES} answers.stop_strings=[x]": f"{WRITES} answers.stop=[x]",
    "report_to=wandb": "trackers=[wandb]",
    "mlflow=true": "trackers=[mlflow]",
    "prompts.format=text data.max_seq_length=64": "prompts.format=text data.max_length=64",
}


@pytest.mark.parametrize(("written", "meant"), WORDS.items())
def test_the_advice_on_an_unknown_key_is_accepted(written: str, meant: str, refused: Refused, load: Load) -> None:
    *_, wrong = written.split()
    *others, right = meant.split()
    message = refused(GOOD, *written.split())
    assert f"unknown key '{wrong.partition('=')[0].rpartition('.')[2]}'" in message
    key = right.partition("=")[0]
    assert f"did you mean '{key.rpartition('.')[2]}'?" in message or f"it belongs in {key}" in message
    load(GOOD, *others, right)


@pytest.mark.parametrize("key", ["optimizer.name", "optimizer.type", "training.gradient_accumulation_steps"])
def test_what_is_no_setting_here_is_to_be_removed(key: str, refused: Refused) -> None:
    message = refused(GOOD, f"{key}=1")
    assert f"unknown key '{key.rpartition('.')[2]}'; remove it: " in message
    assert "teacher.name" not in message


def test_a_key_that_every_section_has_is_not_sought_in_another_one(refused: Refused) -> None:
    assert "unknown key 'name' (known here: steps, epochs," in refused(GOOD, "training.name=x")
    assert "(of kind vllm)" in refused(GOOD, "teacher.scorer.engine=hf", "teacher.scorer.kv_cache_bytes=5")


def test_a_key_of_a_subsection_that_is_near_one_beside_it_names_both(refused: Refused) -> None:
    text = "unknown key 'rank'; it belongs in student.lora.rank; did you mean 'ranks'?"
    assert text in refused(GOOD, "student.rank=2")


def test_one_value_of_two_allowed_shapes_gives_one_problem(refused: Refused) -> None:
    message = refused(GOOD, "student.lora.target_modules=all")
    assert "1 problem\n" in message
    assert "must be a list or 'all-linear'" in message


def test_a_file_that_does_not_exist_suggests_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"demo\.yml: there is no such file; did you mean 'demo\.yaml'\?"):
        load_run(tmp_path / "demo.yml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_numbers_follow_yaml_1_2(load: Load) -> None:
    run = load(GOOD + "optimizer: {learning_rate: 1e-4, eps: 2E-9}\nseed: 0x1f\nfolder: 2024-01-02\n").run
    assert (run.optimizer.learning_rate, run.optimizer.eps, run.seed) == (1e-4, 2e-9, 31)
    assert run.folder == Path("2024-01-02")


def test_overrides_are_yaml_and_the_last_one_wins(load: Load) -> None:
    text = GOOD + "objective: [{loss: forward_kl}, {loss: cross_entropy}]\n"
    run = load(text, "objective.1.weight=0.25", "seed=3", "seed=4", "teacher.scorer.engine=hf", "student.lora={}").run
    assert run.objective[1].weight == 0.25
    assert run.seed == 4
    assert run.teacher.scorer.engine.kind == "hf"
    assert run.student.lora is not None


def test_an_override_adds_a_parameter_to_whatever_plugin_is_chosen(load: Load) -> None:
    assert load(GOOD, "labels.k=8").run.labels == TopK(k=8)
    assert load(GOOD + "labels: {temperature: 2}\n", "labels.k=8").run.labels == TopK(k=8, temperature=2.0)
    assert load(GOOD + "labels: dense\n", "labels.temperature=2").run.labels.flat()["kind"] == "dense"


def test_an_override_adds_a_parameter_to_a_bare_kind_of_a_list(load: Load) -> None:
    (term,) = load(GOOD + "objective: [forward_kl]\n", "objective.0.weight=2").run.objective
    assert (term.loss, term.weight) == ("forward_kl", 2.0)


def test_origins_name_the_line_or_the_override(load: Load, tmp_path: Path) -> None:
    origins = load(GOOD, "training.steps=4", "labels={kind: topk, k: 8}").origins
    assert origins["student", "model", "path"].text == f"{tmp_path}/run.yaml:3"
    assert origins["training", "steps"].text == "--set training.steps=4"
    assert origins["labels", "k"].text == "--set labels={kind: topk, k: 8}"
    assert ("seed",) not in origins


def test_a_message_gets_the_line_of_the_setting_that_begins_it(load: Load, tmp_path: Path) -> None:
    loaded = load(GOOD, "seed=3")
    lines = {
        "the run cannot start:": "",
        "  prompts: 1 of 2 rows": "  FILE:6: ",
        "    prompts.jsonl:2: content: is missing": "",
        "training.steps: too few": "FILE:9: ",
        "training.depth: a default, so the place of its section": "FILE:8: ",
        "seed: too small": "--set seed=3: ",
        "folder: a default at the top level": "",
    }
    located = loaded.located("\n".join(lines)).replace(f"{tmp_path}/run.yaml", "FILE").splitlines()
    assert located == [f"{place}{line.strip()}" if place else line for line, place in lines.items()]


def test_an_override_replaces_what_the_file_said_below_it(refused: Refused, load: Load) -> None:
    text = GOOD + "labels: {kind: topk, k: 8}\n"
    assert load(text, "labels=dense").run.labels.kind == "dense"
    assert "run.yaml:10: labels.k = 8" in refused(text, "labels.kind=dense")


def test_a_dumped_run_loads_back_to_the_same_run(load: Load) -> None:
    text = GOOD + "folder: 'no'\noptimizer: {eps: 1e-30}\n"
    run = load(text, "student.lora={target_modules: [q_proj, '1e5']}", "labels.k=3", "student.model.licence='null'").run
    assert load(dump_run(run)).run == run


def test_the_hash_changes_with_what_is_learnt_and_with_nothing_else(load: Load) -> None:
    base = config_hash(load(GOOD).run)
    longer, moved = (
        ("training.steps=11", "training.on_changed_inputs=note"),
        ("teacher.model.path=x", "student.dtype=auto"),
    )
    for same in (
        "folder=x",
        "training.depth=0",
        "training.keep_checkpoints=9",
        "faults.ping_timeout_s=5",
        "store.path=x",
        *longer,
        *moved,
    ):
        assert config_hash(load(GOOD, same).run) == base, same
    for other in ("prompts.max_rows=5", "labels.k=32", "optimizer.learning_rate=2e-4", "seed=1", "student.ranks=2"):
        assert config_hash(load(GOOD, other).run) != base, other


def _yaml_values() -> st.SearchStrategy[object]:
    keys = st.sampled_from([*Run.model_fields, "kind", "path", "steps", "model", "k"]) | st.text(max_size=4)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
    )


def _only_config_error(file: Path, content: bytes, overrides: list[str]) -> None:
    file.write_bytes(content)
    try:
        loaded = load_run(file, overrides)
    except ConfigError:
        return
    assert isinstance(loaded.run, Run)


JUNK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@JUNK
@given(text=st.text(max_size=80), override=st.text(max_size=20))
@example(text='name: "\\ud800"', override="a=\ud800")
@example(text="? [1, 2]\n: 3", override="a.0=1")
@example(text="<<: {name: x}", override="=")
@example(text="a: !<tag:yaml.org,2002:int> x", override="a=!!float x")
@example(text="seed: " + "9" * 5000, override="seed=" + "9" * 5000)
def test_random_text_gives_a_run_or_a_config_error(tmp_path: Path, text: str, override: str) -> None:
    _only_config_error(tmp_path / "run.yaml", text.encode("utf-8", errors="surrogatepass"), [override])


@JUNK
@given(values=st.dictionaries(st.sampled_from(list(Run.model_fields)), _yaml_values(), min_size=1))
def test_random_values_in_the_right_places_give_a_run_or_a_config_error(
    tmp_path: Path, values: dict[str, object]
) -> None:
    _only_config_error(tmp_path / "run.yaml", json.dumps(values).encode(), [])


def test_what_makes_another_run_is_named_and_what_may_change_is_not(load: Load) -> None:
    before = load(GOOD).run
    now = load(
        GOOD, "optimizer.eps=2e-8", "training.steps=20", "labels={kind: hidden}", "training.save_every=5", "faults={}"
    ).run
    assert differences(before, before) == []
    assert differences(before, load(GOOD, "training.save_every=5").run) == []
    assert differences(before, now) == [
        'labels.kind: "hidden", was "topk"',
        "labels.control_ids: null, was []",
        "labels.k: null, was 64",
        'labels.dtype: "auto", was null',
        "labels.layers: [], was null",
        "optimizer.eps: 2e-08, was 1e-08",
    ]


def test_a_path_may_begin_at_home_and_an_unknown_home_is_refused(load: Load, refused: Refused) -> None:
    assert load(GOOD, "folder=~/x").run.folder == Path.home() / "x"
    assert load(GOOD, "teacher.model.path=~/x").run.teacher.model.path == str(Path.home() / "x")
    for key in HOMES:
        assert "there is no user 'nosuchuser' here" in refused(GOOD, f"{key}=~nosuchuser/x")


OLD = {
    "elicitation=labeling": "it is now written answers, at the top level",
    "data.train={path: x}": "it is now written prompts, at the top level",
    "teacher.writer={}": "it is now written generator",
    "report.tensorboard=true": "it is now written trackers: [tensorboard], at the top level",
    "answers=labeling": "the kind labeling is now called teacher; write teacher",
    "answers.kind=feature": "the kind feature is now called dataset; write dataset",
}


@pytest.mark.parametrize("override", OLD)
def test_the_spelling_of_older_versions_is_refused_with_that_of_today(override: str, refused: Refused) -> None:
    message = refused(GOOD, override)
    assert f"--set {override}: {override.partition('=')[0]}" in message
    assert OLD[override] in message

"""`check`: everything that can be wrong with a run before an accelerator is asked for, all of it at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from architectures import architecture_folder, long_rope
from every_architecture import save_architecture
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.preflight.finding import Finding
from cluster.preflight.machine import writable
from configs.load import load_run
from configs.models import LoRA, ModelSource, Student
from configs.schema import Run
from launch.check.run import check, collect_problems, examine, raise_problems, unused
from launch.disk import DiskNeed
from launch.model_folder import find_model, licence_of, read_facts
from trainer.errors import ConfigError, DataError

Make = Callable[..., Path]

ROW = {"messages": [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "the quick fox"}]}


@pytest.fixture
def make(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> Make:
    """A good configuration in `tmp_path`, its dataset and run folder beside it; returns its path."""

    def write(*rows: object, teacher: Path = tiny_teacher, student: Path = tiny_student) -> Path:
        lines = "".join(json.dumps(row) + "\n" for row in rows or [ROW] * 3)
        (tmp_path / "rows.jsonl").write_text(lines)
        (tmp_path / "held.jsonl").write_text(lines.replace("who is it?", "what is it?"))
        config = {
            "name": "tiny",
            "folder": str(tmp_path / "out"),
            "student": {"model": {"path": str(student), "licence": "apache-2.0"}},
            "teacher": {"model": {"path": str(teacher), "licence": "mit"}, "scorer": {"engine": "hf"}},
            "prompts": {"path": str(tmp_path / "rows.jsonl")},
            "data": {
                "evaluation": {"path": str(tmp_path / "held.jsonl")},
                "max_length": 256,
            },
            "training": {"steps": 2, "keep_checkpoints": 1},
        }
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(config))
        return file

    return write


def test_a_teacher_that_nobody_asks_is_a_warning(make: Make) -> None:
    assert list(unused(loaded(make()))) == []
    (finding,) = unused(loaded(make(), "labels=none", "objective=[{loss: cross_entropy}]"))
    assert (finding.status, "no task asks teacher for labels or answers" in finding.text) == ("warning", True)


def test_rows_that_do_not_exist_are_told_at_the_place_that_names_them(make: Make, tmp_path: Path) -> None:
    file = make()
    missing = f"{tmp_path}/none.jsonl"
    for place, overrides in (
        ("prompts", [f"prompts.path={missing}"]),
        ("prompts", [f"prompts.path={missing}", "tasks={a: {}}"]),
        ("tasks.a.prompts", [f"tasks={{a: {{prompts: {{path: {missing}}}}}}}"]),
        ("data.evaluation", [f"data.evaluation.path={missing}"]),
    ):
        assert only_problem(file, *overrides).text.startswith(f"{place}: the dataset {missing} does not exist")


def test_a_share_of_which_nothing_is_trained_is_a_warning(make: Make) -> None:
    for share, status in ((0, "warning"), (1e-9, "warning"), (0.1, "ok")):
        found = examine(loaded(make(), f"tasks={{a: {{}}, b: {{share: {share}}}}}"))
        tasks = {one.subject: one.status for one in found if one.subject.startswith("task ")}
        assert tasks == {"task a": "ok", "task b": status}


def test_candidates_without_scores_or_longer_than_a_micro_batch_are_refused(make: Make, tmp_path: Path) -> None:
    row = {"prompt": "the quick", "candidates": [" fox", " dog", " brown fox jumps"]}
    (tmp_path / "listed.jsonl").write_text(json.dumps(row) + "\n")
    changes = [f"prompts={{path: {tmp_path}/listed.jsonl}}", "objective=[{loss: scored_listwise_kl}]", "labels=none"]
    (wrong,) = problems(make(), *changes)
    assert "listed.jsonl:1: scores: are missing, and the objective learns them; write loss: listwise_kl" in wrong.text
    changes[1:] = ["objective=[{loss: listwise_kl}]", "labels=token", "data.max_length=32"]
    row["candidates"] = [f" fox {word}" for word in ["by", "a", "the", "drop", "into", "over", "fox", "dog"]]
    (tmp_path / "listed.jsonl").write_text(json.dumps(row) + "\n")
    found = problems(make(), *changes, "training.micro_batch_tokens=64")
    (wrong,) = [finding for finding in found if finding.subject == "train rows"]
    assert "training.micro_batch_tokens = 64: the answers to one prompt of" in wrong.text
    assert "tokens together and are compared with each other in one micro-batch: write at least " in wrong.text


def test_layers_that_models_or_engines_do_not_have_are_refused(make: Make) -> None:
    labels = "labels={kind: hidden, layers: [1]}"
    term = "{{loss: features, student_layer: {}, teacher_layer: 1}}"
    (beyond,) = problems(make(), labels, f"objective=[{term.format(9)}]")
    assert "objective.0.student_layer: 9, and" in beyond.text
    assert "has layers 0 to 1: write one of these" in beyond.text
    found = examine(loaded(make(), labels, f"objective=[{term.format(1)}]"))
    assert [one.text for one in found if one.subject == "features"] == ["1 terms on states, whose layers are there"]


def test_what_the_held_out_rows_of_a_task_can_tell_is_said(make: Make, tmp_path: Path) -> None:
    pair = {"prompt": "the quick", "chosen": " fox", "rejected": " dog"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    pairs = f"prompts: {{path: {tmp_path}/pairs.jsonl}}"
    dpo = f"{{{pairs}, labels: token, objective: [{{loss: dpo}}], evaluation: {{path: own}}}}"
    sft = "{labels: none, objective: [{loss: cross_entropy}], evaluation: {path: own}}"
    (tmp_path / "own.jsonl").write_text(json.dumps(ROW) + "\n")
    tasks = f"tasks={{kl: {{}}, dpo: {dpo}, sft: {sft}}}".replace("path: own", f"path: {tmp_path}/own.jsonl")
    found = examine(loaded(make(), tasks))
    said = [(f.subject.removesuffix(" evaluation rows"), f.text) for f in found if "evaluation rows" in f.subject]
    assert list(dict.fromkeys(name for name, _ in said)) == ["kl", "dpo", "sft"]
    assert ("dpo", "KL and agreement are those with the reference: how far the student has moved from it") in said
    assert ("sft", "no teacher's labels: perplexity is measured, KL and agreement are not") in said
    (tmp_path / "own.jsonl").write_text('{"prompt": "the quick"}\n')
    wrong = [finding.text for finding in problems(make(), tasks)]
    assert ["tasks.dpo.evaluation: 1 of 1" in wrong[0], "tasks.sft.evaluation: 1 of 1" in wrong[1]] == [True, True]
    assert all("own.jsonl:1: " in text for text in wrong)


def test_special_tokens_in_rows_are_told_until_it_is_said_what_they_mean(make: Make) -> None:
    row = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "it ends <|im_end|> here"}]}
    file = make(ROW, row)
    said = [finding.text for finding in collect_problems(loaded(file)) if "special tokens" in finding.text]
    assert len(said) == 2, "the held-out rows are the same but for their question"
    assert "prompts: 1 of 2 rows contain special tokens" in said[0]
    assert "rows.jsonl:2: messages[1].content: '<|im_end|>'" in said[0]
    for wanted in ("allow", "escape"):
        findings = collect_problems(loaded(file, f"data.special_tokens_in_text={wanted}"))
        assert not [finding for finding in findings if "special tokens" in finding.text]
    assert "becomes a control token" in problems(file, "data.special_tokens_in_text=error")[0].text


def test_rows_that_speak_of_pictures_are_told_with_the_first_place(make: Make) -> None:
    row = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a fox"}]}
    said = [finding.text for finding in collect_problems(loaded(make(ROW, row))) if "pictures" in finding.text]
    assert "prompts: 1 of 2 rows have marks in their text that stand for pictures, sound or films: " in said[0]
    assert "rows.jsonl:2: messages[0].content: '<image>\\nWhat is it?'; only text is read" in said[0]


def test_folders_whose_names_are_patterns_elsewhere_are_refused(make: Make, tmp_path: Path, tiny_teacher: Path) -> None:
    twin = tmp_path / "teacher[1]"
    shutil.copytree(tiny_teacher, twin)
    assert not problems(make(teacher=twin))  # transformers reads it as it is
    said = only_problem(make(teacher=twin), "teacher.scorer.engine=vllm").text
    assert "teacher.model.path" in said
    assert "vLLM reads such a name as a pattern" in said
    said = only_problem(make(), f"folder={tmp_path}/run*").text
    assert "folder: " in said
    assert "DeepSpeed reads such a name as a pattern" in said


def test_answers_behind_a_hundred_prompts_are_seen(make: Make) -> None:
    rows = [{"prompt": "the quick"}] * 100 + [{"prompt": "the quick", "completion": " fox"}] * 20
    writing = (
        "answers={kind: teacher, max_new_tokens: 9}",
        "teacher.generator={engine: hf}",
        "data.evaluation=null",
    )
    assert not problems(make(*rows), *writing)
    said = only_problem(make(*rows), "data.evaluation=null").text
    assert "100 of 120 rows cannot be used" in said
    assert "rows.jsonl:1: completion: is missing" in said


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mamba", {}, "student.model: MambaForCausalLM does not let others compute its attention"),
        ("gpt_oss", {}, "student.model: gpt_oss uses s_aux; packed training covers causal attention"),
        (
            "phi3",
            long_rope(200),
            "data.max_length: 256 is over the 200 positions after which the student's rotary embedding (longrope)",
        ),
    ],
)
def test_a_student_whose_sequences_cannot_be_packed_is_refused(
    make: Make, tmp_path: Path, name: str, changes: dict, said: str
) -> None:
    student = architecture_folder(tmp_path / "student", name, **changes)
    assert said in "\n".join(finding.text for finding in problems(make(student=student)))


def test_a_teacher_that_vllm_would_rotate_otherwise_is_refused(make: Make, tmp_path: Path) -> None:
    file = make(teacher=architecture_folder(tmp_path / "teacher", "phi3", **long_rope(200)))
    assert not problems(file)
    said = only_problem(file, "teacher.scorer.engine=vllm").text
    assert "data.max_length: 256 is over the 200 positions after which the teacher's rotary embedding" in said
    assert not problems(file, "teacher.scorer.engine=vllm", "data.max_length=200")


def loaded(file: Path, *overrides: str) -> Run:
    return load_run(file, overrides).run


def problems(file: Path, *overrides: str) -> list[Finding]:
    return [finding for finding in collect_problems(loaded(file, *overrides)) if finding.fatal]


def only_problem(file: Path, *overrides: str) -> Finding:
    found = problems(file, *overrides)
    assert len(found) == 1, found
    return found[0]


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_a_run_that_may_start_is_ready_and_leaves_no_trace(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make()
    before = sorted(tmp_path.rglob("*"))
    assert check(file, []) == 0
    out = capsys.readouterr().out
    assert "ok           tokenizers: the same, 283 tokens (padded: teacher has 320 rows, student has 320 rows)" in out
    assert "3 rows, all checked, 3 good" in out
    assert f"ready: stillhouse train {file}\n" in out
    assert "problem" not in out
    assert "warning" not in out
    assert sorted(tmp_path.rglob("*")) == before
    assert collect_problems(loaded(file)) == raise_problems(load_run(file))[0] == []


def test_all_problems_are_reported_together(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blocked").write_text("a file")
    file = make({"messages": []})
    overrides = [f"folder={tmp_path}/blocked/out", "data.evaluation.path=gone.jsonl", "training.keep_checkpoints=2"]
    assert check(file, overrides) == 2
    out = capsys.readouterr().out
    assert f"{tmp_path}/rows.jsonl:1" in out
    assert "gone.jsonl does not exist" in out
    assert f"{tmp_path}/blocked is a file" in out
    assert "3 problems; nothing was started" in out


def test_a_warm_up_as_long_as_the_epochs_is_refused(make: Make) -> None:
    """How many steps epochs are is known when the rows are."""
    overrides = ["training.steps=null", "training.epochs=2", "training.sequences_per_step=1"]
    file = make()
    assert check(file, [*overrides, "optimizer.warmup_steps=5"]) == 0
    refused = only_problem(file, *overrides, "optimizer.warmup_steps=6").text
    assert "optimizer.warmup_steps: 6 leaves no step after the warm-up: the run has 6 (2 epochs of 3 rows" in refused


def test_how_many_steps_epochs_are_is_told_with_the_length_of_a_short_last_one(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["training.steps=null", "training.epochs=2", "training.sequences_per_step=4"]
    assert check(make(), overrides) == 0
    assert "steps: 2 epochs of 3 rows are 2 steps of 4, the last of 2\n" in capsys.readouterr().out


def test_a_model_below_the_home_folder_is_found_and_the_command_that_follows_is_the_whole_one(
    make: Make, tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(tiny_student, tmp_path / "student")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = make()
    capsys.readouterr()
    assert check(file, ["student.model.path=~/student", "labels={kind: hidden}"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert (
        command
        == f"ready: stillhouse train {file} --set 'student.model.path=~/student' --set 'labels={{kind: hidden}}'"
    )


def test_the_exit_code_is_3_where_only_rows_are_wrong(make: Make) -> None:
    file = make({"messages": [{"role": "user", "content": "nobody answers"}]})
    assert check(file, ["data.evaluation=null"]) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*assistant"):
        raise_problems(load_run(file))
    with pytest.raises(ConfigError, match=r"(?s)no folder /gone.*"):
        raise_problems(load_run(file, ["student.model.path=/gone"]))


def test_problems_with_models_leave_the_rest_to_be_checked(make: Make, tiny_teacher: Path) -> None:
    near = str(tiny_teacher)[:-1]
    found = {f.subject: f for f in examine(loaded(make(), f"teacher.model.path={near}"))}
    said = f"teacher.model.path: there is no folder {near} (looked for {near}); did you mean {tiny_teacher}?"
    assert said in found["teacher model"].text
    assert found["tokenizers"].status == found["train rows"].status == "not checked"
    assert found["student model"].status == found["run folder"].status == found["disk"].status == "ok"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "saved every 10 minutes: a crash costs at most what was trained in between"),
        (
            ["training.save_every=50"],
            "saved every 50 steps or 10 minutes, whichever comes first: a crash costs at most",
        ),
        (["training.save_every=50", "training.save_every_minutes=0"], "saved every 50 steps: a crash costs at most"),
        (["training.save_every_minutes=0"], "a crash costs everything trained until then"),
    ],
)
def test_what_a_crash_would_cost_is_said(make: Make, overrides: list[str], words: str) -> None:
    (said,) = [finding for finding in examine(loaded(make(), *overrides)) if finding.subject == "checkpoints"]
    assert words in said.text


def test_a_model_folder_without_what_a_model_needs_is_refused(make: Make, tmp_path: Path, tiny_student: Path) -> None:
    folder = copied(tiny_student, tmp_path / "student")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, words in (
        (whole[:-7], f"has {len(whole) - 7} bytes of {len(whole)}"),
        (whole[:1000], "bytes of"),
        (b"", "bytes of"),
        (whole[:8] + b"x" * (len(whole) - 8), "is no safetensors file"),
    ):
        weights.write_bytes(damaged)
        assert words in only_problem(make(student=folder)).text
    weights.write_bytes(whole)
    weights.rename(folder / "pytorch_model.bin")
    refused = only_problem(make(student=folder)).text
    assert "pytorch_model.bin is a pickle" in refused
    assert "save_pretrained" in refused
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "lacks 1 weight files of its index, first model-1.safetensors" in only_problem(make(student=folder)).text
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "names a file outside of its folder" in only_problem(make(student=folder)).text
    (folder / "config.json").unlink()
    assert "has no config.json" in only_problem(make(student=folder)).text


def test_a_hub_name_that_is_not_cached_says_so_when_offline(make: Make) -> None:
    assert "not in the cache, while HF_HUB_OFFLINE is set" in only_problem(make(), "student.model.path=some/model").text


def test_code_from_the_hub_needs_the_commit_that_was_read(make: Make) -> None:
    overrides = ["student.model={path: some/model, trust_remote_code: true}"]
    for revision in ("null", "main", "abc123"):
        with pytest.raises(ConfigError, match=r"student.model.revision.*\n.*name the commit that you have read"):
            loaded(make(), *overrides, f"student.model.revision={revision}")
    assert loaded(make(), *overrides, f"student.model.revision={'ab12' * 10}").student.model.trust_remote_code
    assert loaded(make(), "student.model={path: ./some/model, trust_remote_code: true}").student.model.revision is None


def test_code_in_a_repository_that_no_revision_pins_is_refused(make: Make, tmp_path: Path, tiny_student: Path) -> None:
    folder = copied(tiny_student, tmp_path / "student")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "somebody/else--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    found = only_problem(make(student=folder), "student.model.trust_remote_code=true")
    assert "another repository (somebody/else--modeling.Model), which revision does not pin" in found.text
    assert problems(make(student=folder)) == []  # without trust it is never asked for


def test_a_revision_of_a_local_folder_is_refused(make: Make) -> None:
    assert "local folder, which has no revision 'main'" in only_problem(make(), "student.model.revision=main").text


def test_more_tokens_than_a_model_has_positions_are_refused(make: Make) -> None:
    found = problems(make(), "data.max_length=513")
    assert [f.subject for f in found] == ["teacher model", "student model"]
    assert "513 is more than the 512 positions" in found[0].text


def test_different_tokenizers_are_refused(make: Make, tmp_path: Path, tiny_student: Path) -> None:
    folder = copied(tiny_student, tmp_path / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    assert "different tokenizers" in only_problem(make(student=folder)).text


def test_an_empty_dataset_and_one_of_bad_rows_are_refused(make: Make, tmp_path: Path) -> None:
    file = make()
    (tmp_path / "empty.jsonl").write_text("")
    assert "has no rows" in only_problem(file, f"prompts.path={tmp_path}/empty.jsonl").text
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({"messages": "hello"}) + "\n")
    bad = f"prompts.path={tmp_path}/bad.jsonl"
    assert f"{tmp_path}/bad.jsonl:2: messages" in only_problem(file, bad).text
    skipping = collect_problems(loaded(file, bad, "data.on_bad_row=skip"))
    assert [(f.status, "1 of 2 rows" in f.text) for f in skipping] == [("warning", True)]


def test_rows_that_are_too_long_are_a_problem_or_counted_as_configured(make: Make) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    file = make(ROW, long)
    overrides = ["data.max_length=64", "data.evaluation=null"]
    assert "too long" in only_problem(file, *overrides).text
    assert problems(file, *overrides, "data.on_too_long=drop") == []
    assert "raise data.max_length" in only_problem(make(long), *overrides, "data.on_too_long=drop").text


def test_a_class_of_the_users_that_lacks_a_member_is_a_problem(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short_engines").mkdir()
    (tmp_path / "short_engines/mine.py").write_text(
        "from configs.engines import Engine as Base\nclass Engine(Base): ..."
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = only_problem(make(), "teacher.scorer.engine=short_engines.mine")
    assert "its class Engine has no arguments, start_scorer, start_generator; cluster/engines/hf.py" in problem.text


def test_an_encoding_of_the_users_whose_layout_fails_is_a_problem(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_layouts").mkdir()
    start = "from trainer.labels.topk import Encoding as TopK\nclass Encoding(TopK):\n    kind: str = ''\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, body, said in (("raises", "raise RuntimeError('no rows')", "RuntimeError: no rows"), ("none", "...", "")):
        (tmp_path / f"odd_layouts/{name}.py").write_text(f"{start}    def layout(self, shape):\n        {body}\n")
        problem = only_problem(make(), f"labels=odd_layouts.{name}")
        assert f"labels: odd_layouts.{name}, the layout of a row: {said}" in problem.text


def test_more_kept_ids_than_the_vocabulary_has_are_refused(make: Make) -> None:
    own = only_problem(make(), "tasks={a: {}, b: {labels: {kind: topk, k: 100000}}}")
    assert own.text.startswith("tasks.b.labels: topk, the layout of a row: labels.k is 100000")
    problem = only_problem(make(), "labels={kind: topk, k: 100000}")
    assert "labels.k is 100000" in problem.text
    assert "write k:" in problem.text
    given = only_problem(make(), "labels={kind: given_ids, k: 100000, add_teacher_topk: 3}")
    assert "labels: given_ids, the layout of a row: labels keep 100004 ids of a row" in given.text
    assert problem.exit_code == ConfigError.exit_code
    compared = only_problem(make(), "labels=hidden", "objective=[{loss: lsm, k: 100000}]")
    assert "objective.0: lsm compares 100000 ids of each row, but the vocabulary has only V = " in compared.text
    controls = only_problem(make(), "labels={kind: topk, k: 8, control_ids: auto}", "objective=[{loss: lsm, k: 8}]")
    assert "of them control ids: write k: 7 or less here, or k: 9 there" in controls.text


def test_a_licence_is_taken_from_the_model_card_or_missed(make: Make, tmp_path: Path, tiny_student: Path) -> None:
    folder = copied(tiny_student, tmp_path / "student")
    source = ModelSource(path=str(folder))
    assert licence_of(source) is None
    found = collect_problems(loaded(make(student=folder), "student.model.licence=null"))
    assert [(f.subject, f.status) for f in found] == [("student licence", "warning")]
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    assert licence_of(source) == "apache-2.0"


def test_generation_settings_that_a_generator_does_not_apply_are_told(
    make: Make, tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    (teacher / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 40], "repetition_penalty": 1.05, "do_sample": True, "temperature": 0.6})
    )
    writing = ("teacher.generator={engine: hf}", "answers=teacher", "prompts.format=prompt")
    rows = [{"prompt": "who is it?", "completion": "the quick fox"}] * 3
    (warning,) = (
        f for f in examine(loaded(make(*rows, teacher=teacher), *writing)) if f.subject.endswith("generation")
    )
    assert warning.status == "warning"
    assert f"{teacher}/generation_config.json sets repetition_penalty: 1.05, which a generator does not" in warning.text
    silent = examine(loaded(make(*rows, teacher=tiny_teacher), *writing))
    assert not [f for f in silent if f.subject.endswith("generation")]
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    broken = problems(make(*rows, teacher=teacher), *writing)
    assert "eos_token_id" in broken[0].text


def test_a_teacher_that_vllm_has_no_model_for_is_refused_before_an_engine_starts(
    make: Make, tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]}))
    problem = only_problem(make(teacher=teacher), "teacher.scorer={engine: vllm}")
    assert (problem.subject, problem.exit_code) == ("teacher engine", 2)
    assert f"teacher.model.path: {teacher}: vLLM " in problem.text
    assert "engine: {kind: hf}" in problem.text
    assert problems(make(teacher=teacher)) == []  # engine: hf
    quantised = {"quantization_config": {"quant_method": "nope"}}
    (teacher / "config.json").write_text(json.dumps(config | quantised))
    found = collect_problems(loaded(make(teacher=teacher), "teacher.scorer={engine: vllm}"))
    assert [(f.status, "quantised by nope" in f.text) for f in found if f.subject == "teacher engine"] == [
        ("warning", True)
    ]


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(tmp_path: Path) -> None:
    need = DiskNeed(checkpoint_bytes=10**18, num_checkpoints=2, student_bytes=10**9)
    assert need.num_bytes == 3 * 10**18 + 10**9
    found = need.look(tmp_path / "not" / "yet")
    assert found.fatal
    assert re.search(r"GB free, the run needs 3000000001\.0 GB .*keep_checkpoints", found.message)
    assert DiskNeed(1, 1, 1).look(tmp_path / "not" / "yet").status == "ok"


def test_what_a_resumed_run_replaces_is_needed_once_and_nothing_else_in_its_folder_counts_as_free(
    tmp_path: Path,
) -> None:
    written = tmp_path / "checkpoints" / "step_000004"
    written.mkdir(parents=True)
    (written / "shard.bin").write_bytes(b"x" * 2**20)
    (written / "link.bin").symlink_to(written / "shard.bin")
    (tmp_path / "rows.jsonl").write_bytes(b"x" * 2**22)
    with (tmp_path / "checkpoints" / "step_000004" / "sparse.bin").open("wb") as file:
        file.truncate(2**40)
    need = DiskNeed(checkpoint_bytes=2**20, num_checkpoints=1, student_bytes=2**19)
    assert need.num_bytes == 2**21 + 2**19
    assert need.bytes_to_come(tmp_path) == 2**20 + 2**19
    assert need.bytes_to_come(tmp_path / "new") == need.num_bytes
    too_much = DiskNeed(checkpoint_bytes=10**18, num_checkpoints=1, student_bytes=10**9)
    said = too_much.look(tmp_path).text
    assert re.search(r"needs 2000000001\.0 GB at most, for 1 checkpoint, one .* more than is there", said)


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in writable("run folder", tmp_path / "file" / "run").text
    refused = writable("run folder", Path("/proc/run"))
    assert refused.fatal
    assert "cannot write in /proc" in refused.text
    assert writable("run folder", tmp_path / "run").status == "ok"
    assert not (tmp_path / "run").exists()


def test_the_size_of_a_70b_model_is_known_without_its_weights(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "llama-70b"
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    source = ModelSource(path=str(folder))
    assert read_facts(source, path_name="x").num_parameters == 70_553_706_496  # as the model's authors state: 70.6 B
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        find_model(source, path_name="teacher.model.path", needs_weights=True)
    engine = "teacher.scorer={engine: {kind: vllm, load_format: dummy}, tensor_parallel_size: 8}"
    text = {f.subject: f.text for f in examine(loaded(make(teacher=folder), engine))}
    assert text["teacher model"].endswith("LlamaForCausalLM, 70.6 B parameters")


def test_adapters_are_counted_as_peft_makes_them(tiny_student: Path) -> None:
    source = ModelSource(path=str(tiny_student))
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        lora = LoRA(rank=3, target_modules=targets)
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_student),
            peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"),
        )
        facts = read_facts(source, path_name="x", student=Student(model=source, lora=lora))
        assert facts.num_adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(
        ConfigError, match=r"student.lora.target_modules: no module of LlamaForCausalLM is named .qq.; .*q_proj"
    ):
        read_facts(source, path_name="x", student=Student(model=source, lora=LoRA(target_modules=["qq"])))


def test_check_refuses_a_target_that_matches_nothing_beside_one_that_matches(make: Make) -> None:
    refused = only_problem(make(), "student.lora={target_modules: [q_proj, nope]}")
    assert (
        "student.lora.target_modules: no module of LlamaForCausalLM is named 'nope'; there are down_proj"
        in refused.text
    )


def test_check_refuses_weights_that_lack_a_tensor_and_students_that_cannot_be_packed(
    make: Make, tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    for engine in ("hf", "vllm"):
        refused = only_problem(make(teacher=teacher), f"teacher.scorer.engine={engine}")
        assert "teacher.model.path: " in refused.text
        assert "lacks model.norm.weight of LlamaForCausalLM" in refused.text
    save_architecture(tmp_path / "mamba", "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    assert "does not let others compute" in only_problem(make(student=tmp_path / "mamba")).text
    assert problems(make(teacher=tmp_path / "mamba")) == []  # as a teacher it may do what it likes

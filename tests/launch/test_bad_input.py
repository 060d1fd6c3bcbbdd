"""What wrong tasks, teachers and terms get of `check`: one message with file and line, and nothing is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.preflight import software
from launch.check import overlap
from launch.check.run import check
from trainer.errors import ConfigError, DataError

ROW = {"messages": [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "the quick fox"}]}
RUN = """\
name: tiny
folder: HERE/out
student:
  model: {path: STUDENT, licence: mit}
teachers:
  prose: {model: {path: TEACHER, licence: mit}, scorer: {engine: hf}}
  code: {model: {path: TEACHER, licence: mit}, scorer: {engine: hf}}
data: {max_length: 256, evaluation: {path: HERE/held.jsonl}}
tasks:
  chat:
    prompts: {path: HERE/rows.jsonl}
    teacher: prose
    share: 3
  mixed:
    prompts: {path: HERE/mixed.jsonl}
    objective: [{loss: forward_kl}]
    route: {column: domain, map: {python: code, prose: prose}}
labels: {kind: topk, k: 8}
training: {steps: 2, sequences_per_step: 4}
"""
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """What `check` returns and prints, of `RUN` with parts replaced."""
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 3)
    domains = "".join(json.dumps({**ROW, "domain": domain}) + "\n" for domain in ("python", "prose", "prose"))
    (tmp_path / "mixed.jsonl").write_text(domains)
    (tmp_path / "held.jsonl").write_text(domains.replace("who is it?", "what is it?"))

    def look(*changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> tuple[int, str]:
        text = RUN
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        for word, path in {"HERE": tmp_path, "STUDENT": tiny_student, "TEACHER": tiny_teacher}.items():
            text = text.replace(word, str(path))
        file = tmp_path / "run.yaml"
        file.write_text(text)
        try:
            code, refused = check(file, overrides), ""
        except ConfigError as error:
            code, refused = error.exit_code, str(error)
        assert not (tmp_path / "out").exists(), "nothing is started"
        return code, (capsys.readouterr().out + refused).replace(f"{tmp_path}/", "")

    return look


def test_the_run_is_ready_as_it_is(said: Said) -> None:
    code, text = said()
    assert code == 0
    assert "warning" not in text
    assert "mixed: 25.0% of the sequences, weight 1, forward_kl, teacher: code, prose" in text


PLAIN = ("    route: {column: domain, map: {python: code, prose: prose}}\n", "    teacher: code\n")
REFUSED = {
    "a task without prompts": (
        [("    prompts: {path: HERE/rows.jsonl}\n", "")],
        "run.yaml:10: tasks.chat.prompts\n",
        "'prompts' is missing: give the task rows, prompts: {path: rows.jsonl}, here or at the top level",
    ),
    "shares that are all zero": (
        [("share: 3", "share: 0"), ("  mixed:\n", "  mixed:\n    share: 0\n")],
        "run.yaml:13: tasks.chat.share = 0\n",
        "every share is 0, so that nothing is trained; give at least one task a share above 0",
    ),
    "a teacher that does not exist": (
        [("teacher: prose", "teacher: prosa")],
        "run.yaml:12: tasks.chat.teacher = 'prosa'\n",
        "there is no teacher 'prosa'; did you mean 'prose'? (there are: prose, code)",
    ),
    "a route to a teacher that does not exist": (
        [("python: code", "python: coder")],
        "run.yaml:17: tasks.mixed.route.map.python = 'coder'\n",
        "there is no teacher 'coder'; did you mean 'code'? (there are: prose, code)",
    ),
    "an objective that needs labels, and none are made": (
        [("    objective:", "    labels: none\n    objective:"), PLAIN],
        "run.yaml:17: tasks.mixed.objective.0.loss = 'forward_kl'\n",
        "forward_kl needs labels of every token, and labels: none makes none: write labels: topk, or objective: "
        "[cross_entropy]",
    ),
    "an objective that compares answers, over rows with one": (
        [
            ("[{loss: forward_kl}]", "[{loss: dpo}]\n    labels: token"),
            ("mixed.jsonl}", "mixed.jsonl, format: messages}"),
        ],
        "run.yaml:15: tasks.mixed.prompts.format = 'messages'\n",
        "dpo compares two answers to each prompt, and rows of format: messages hold one at most: write format: "
        "preference",
    ),
    "an objective that needs log-probabilities, and labels that lack them": (
        [("loss: forward_kl", "loss: dpo")],
        "run.yaml:16: tasks.mixed.objective.0.loss = 'dpo'\n",
        "dpo needs a teacher's log-probability of each target id, and labels: topk does not hold that: write labels: "
        "token, or objective: [cross_entropy]",
    ),
    "a term that an encoding cannot give": (
        [("    objective:", "    labels: token\n    objective:")],
        "run.yaml:17: tasks.mixed.objective.0.loss = 'forward_kl'\n",
        "forward_kl cannot be computed from labels: token; write labels: topk (some ids of each row) or labels: "
        "hidden (exact)",
    ),
    "a teacher that writes answers without a generator": (
        [("    share: 3\n", "    answers: teacher\n")],
        "run.yaml:6: teachers.prose.generator\n",
        "answers: teacher lets the teacher write: add teachers.prose.generator, if only generator: {}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_be_is_one_message_at_its_line(case: str, said: Said) -> None:
    changes, place, text = REFUSED[case]
    code, message = said(*changes)
    assert code == ConfigError.exit_code
    assert place in message
    assert text in message
    assert message.count("\n") <= 2, "one message"


def test_a_teacher_that_nobody_uses_is_a_warning_at_its_line(said: Said) -> None:
    code, text = said(("{python: code, prose: prose}", "{python: prose, prose: prose}"))
    assert code == 0
    warning = "run.yaml:7: teachers.code: no task asks code for labels or answers; remove it, or name it in a task"
    assert f"warning      teachers: {warning}\n" in text


def test_a_model_that_nobody_asks_is_not_read(said: Said) -> None:
    elsewhere = ("code: {model: {path: TEACHER,", "code: {model: {path: HERE/nowhere,")
    assert said(elsewhere)[0] == ConfigError.exit_code
    code, text = said(elsewhere, ("{python: code, prose: prose}", "{python: prose, prose: prose}"))
    assert code == 0
    assert "no task asks code for labels or answers" in text


def test_a_teacher_may_write_for_two_tasks_in_two_ways_and_for_a_route(said: Said) -> None:
    code, text = said(
        ("prose: {model", "prose: {generator: {engine: hf}, model"),
        ("code: {model", "code: {generator: {engine: hf}, model"),
        ("    share: 3\n", "    answers: {kind: teacher, max_new_tokens: 8}\n"),
        ("    objective:", "    answers: {kind: teacher, n: 2, temperature: 1.0, max_new_tokens: 9}\n    objective:"),
    )
    assert code == 0, text
    assert "ready: " in text


SOURCES = {
    "a pattern that matches nothing": (
        "HERE/*.tsv",
        "run.yaml:11: tasks.chat.prompts: the pattern *.tsv matches no file (",
    ),
    "a file of a list that is not there": (
        "[HERE/rows.jsonl, HERE/rowz.jsonl]",
        "tasks.chat.prompts: the dataset rowz.jsonl does not exist",
    ),
    "a protocol whose package is missing": (
        "'s3://bucket/rows.jsonl'",
        "s3:// needs a package that is not installed: pip install s3fs",
    ),
    "a slice of nothing": (
        "HERE/rows.jsonl, split: 'train[90%:10%]'",
        "rows.jsonl: the split train[90%:10%] holds none of its 3 rows",
    ),
    "a slice that is none": (
        "HERE/rows.jsonl, split: 'train[90'",
        "run.yaml:11: tasks.chat.prompts.split = 'train[90'\n      is no split: write a name (train), rows of one",
    ),
    "a CSV whose record has a cell too many": (
        "HERE/x.csv",
        "x.csv:3: has 3 cells, and the header has 2 (prompt, completion)",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_rows_that_cannot_be_found_or_cut_are_one_message(case: str, said: Said, tmp_path: Path) -> None:
    path, text = SOURCES[case]
    (tmp_path / "x.csv").write_text("prompt,completion\na, b\nc,d,e\n")
    code, message = said(("prompts: {path: HERE/rows.jsonl}", f"prompts: {{path: {path}}}"))
    assert code in (ConfigError.exit_code, DataError.exit_code)
    assert text in message


def shared(*turns: tuple[str, str], **fields: object) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


ASKED = ("human", "who is it?")
TALK = shared(ASKED, ("gpt", "the quick fox"))
CALL = shared(ASKED, ("function_call", '{"name": "look", "arguments": {}}'))
ROWS = {
    "a column that no row has": (
        [{"question": "a", "answer": " b"}],
        ", columns: {prompt: questoin, completion: answer}",
        "run.yaml:11: tasks.chat.prompts.columns.prompt: no row of rows.jsonl has a field 'questoin'; did you mean "
        "'question'? (found: question, answer)",
    ),
    "a column for a field that is not read": (
        [ROW],
        ", columns: {promt: question}",
        "run.yaml:11: tasks.chat.prompts.columns.promt = 'question'\n      is no field that is read; did you mean "
        "'prompt'? (there are: messages, ",
    ),
    "a tool call without its tools": (
        [TALK, CALL],
        "",
        "rows.jsonl:2: conversations[1]: calls 'look', and the row has no tools; write those that could be called as",
    ),
    "a call of a tool that is not there": (
        [CALL | {"tools": [{"name": "listen"}]}],
        "",
        "rows.jsonl:1: conversations[1]: call 0 is of 'look', and the row's tools are others (listen)",
    ),
    "rows of two formats": (
        [TALK, ROW],
        "",
        "rows.jsonl:2: messages: the row is of another format than the first one, which is read by its conversations",
    ),
    "a row that may be read in two ways": (
        [ROW | TALK],
        "",
        "rows.jsonl:1: messages: the row has conversations too, and may be read as messages or as ShareGPT; write ",
    ),
    "a row of another format than the one named": (
        [TALK],
        ", format: messages",
        "rows.jsonl:1: messages: is missing; the fields are those of ShareGPT: write format: sharegpt",
    ),
    "a field of nothing": (
        [{"title": "a"}],
        "",
        "rows.jsonl:1: the fields fit no format; found: title; needed: messages, or prompt and completion",
    ),
    "an answer of a bad kind": (
        [TALK, ROW["messages"]],
        "",
        'rows.jsonl:2: must be a JSON object with named fields, not a list; write {"messages": [...]}',
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_say_nothing_clear_are_one_message(case: str, said: Said, tmp_path: Path) -> None:
    rows, options, text = ROWS[case]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, message = said(("HERE/rows.jsonl}", f"HERE/chat.jsonl{options}}}"))
    assert code in (ConfigError.exit_code, DataError.exit_code)
    assert text.replace("rows.jsonl", "chat.jsonl") in message


def test_check_says_as_what_rows_are_read(said: Said, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(TALK) + "\n")
    code, text = said(("HERE/rows.jsonl}", "HERE/chat.jsonl}"))
    assert code == 0
    assert "chat.jsonl: 1 rows, all checked, 1 good; " in text
    assert "; read as ShareGPT\n" in text
    (tmp_path / "chat.jsonl").write_text(json.dumps({"question": "the quick", "answer": " fox"}) + "\n")
    columns = ", columns: {prompt: question, completion: answer}"
    assert (
        "; read as prompt and completion, without the chat template\n"
        in said(("HERE/rows.jsonl}", f"HERE/chat.jsonl{columns}}}"))[1]
    )


STREAMS = {
    "a slice": (
        [("rows.jsonl}", "rows.jsonl, streaming: true, split: 'train[:9%]'}")],
        "run.yaml:11: tasks.chat.prompts.split = 'train[:9%]'\n      a stream has no known length to slice",
    ),
    "max_rows": (
        [("rows.jsonl}", "rows.jsonl, streaming: true, max_rows: 3}")],
        "run.yaml:11: tasks.chat.prompts.max_rows = 3\n      a stream is read as far as the run trains: remove",
    ),
    "a fraction": (
        [("rows.jsonl}", "rows.jsonl, streaming: true}"), ("{path: HERE/held.jsonl}", "{fraction: 0.5}")],
        "run.yaml:8: data.evaluation.fraction = 0.5\n      a fraction needs the number of rows, which a stream",
    ),
    "held-out rows": (
        [("held.jsonl}", "held.jsonl, streaming: true}")],
        "run.yaml:8: data.evaluation.streaming = True\n      held-out rows are read once and kept: remove streaming",
    ),
    "epochs": (
        [("rows.jsonl}", "rows.jsonl, streaming: true}"), ("training: {steps: 2", "training: {epochs: 2")],
        "training.epochs = 2\n      where a stream ends is known only there: write steps",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_what_a_stream_cannot_be_is_refused_with_what_to_write(case: str, said: Said) -> None:
    changes, text = STREAMS[case]
    code, message = said(*changes)
    assert code == ConfigError.exit_code
    assert text in message


def test_check_says_that_it_looked_at_the_first_rows_of_a_stream(said: Said) -> None:
    code, text = said(("rows.jsonl}", "rows.jsonl, streaming: true}"))
    assert code == 0
    assert "rows.jsonl: a stream, of the first 3 rows 3 checked, 3 good; the others as they are trained; " in text
    assert "warning" not in text


def test_a_file_that_two_paths_name_is_a_warning(said: Said) -> None:
    code, text = said(("path: HERE/rows.jsonl", "path: [HERE/ro*.jsonl, HERE/./rows.jsonl]"))
    assert code == 0
    assert "rows.jsonl is named more than once, and its rows are read as often" in text
    assert "more than once" not in said(("path: HERE/rows.jsonl", "path: HERE/ro*.jsonl"))[1]


def test_options_of_prompts_that_held_out_rows_lack_are_a_warning(said: Said) -> None:
    trained = ("HERE/rows.jsonl}", "HERE/rows.jsonl, loss_on: last}")
    code, text = said(trained)
    assert code == 0
    assert "evaluation: prompts has loss_on: last, and these rows have not: they are measured as other texts" in text
    assert "measured as other" not in said(trained, ("HERE/held.jsonl}", "HERE/held.jsonl, loss_on: last}"))[1]
    assert "measured as other" not in said(trained, FRACTION)[1]


def test_held_out_rows_that_are_trained_on_are_a_warning_with_both_places(said: Said, tmp_path: Path) -> None:
    again = {**ROW, "messages": [{"role": "user", "content": "WHO  is it?"}, ROW["messages"][1]], "domain": "prose"}
    with (tmp_path / "held.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    code, text = said()
    assert code == 0
    warning = "evaluation: 1 of 4 held-out rows ask what a training row asks (case and spaces aside)"
    assert warning in text
    assert "held.jsonl:4 and rows.jsonl:1; looked at all 6 training rows\n" in text


def asking(path: Path, *questions: str, **fields: object) -> None:
    rows = [{"prompt": question, "completion": "the quick fox", **fields} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FRACTION = ("evaluation: {path: HERE/held.jsonl}", "evaluation: {fraction: 0.25}")


def test_a_fraction_is_held_out_of_each_tasks_rows(said: Said, tmp_path: Path) -> None:
    asking(tmp_path / "rows.jsonl", *(f"who is number {number}?" for number in range(20)))
    asking(tmp_path / "mixed.jsonl", *(f"what is number {number}?" for number in range(8)), domain="prose")
    code, text = said(FRACTION)
    assert code == 0
    assert "warning" not in text
    assert "chat rows: " in text
    for part in ("rows.jsonl: 15 rows", "mixed.jsonl: 6 rows", "0.25 of rows.jsonl: 5", "0.25 of mixed.jsonl: 2"):
        assert part in text


def test_rows_of_a_fraction_that_another_task_trains_on_are_told_without_reading_them_again(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(tmp_path / "rows.jsonl", *(f"who is number {number}?" for number in range(20)))
    asking(tmp_path / "mixed.jsonl", *(f"WHO is  number {number}?" for number in range(20)), domain="prose")

    def refuse(*_: object) -> None:
        raise AssertionError("their keys are known")

    monkeypatch.setattr(overlap, "keys_of", refuse)
    assert "of 5 held-out rows ask what a training row asks" not in said(FRACTION)[1], "one prompt, one side"

    def told(first: int) -> bool:
        asking(tmp_path / "mixed.jsonl", *(f"who is number {first + i}?" for i in range(4)), domain="prose")
        return "1 of 1 held-out rows ask what a training row asks" in said(FRACTION)[1]

    assert any(map(told, range(0, 20, 4))), (
        "of 4 other rows 1 is held out, seldom one that the other task holds out too"
    )


@pytest.mark.parametrize(
    ("questions", "fraction", "text"),
    [
        (["a?", "b?", "c?"], 0.1, "holds out 0 rows (3 rows, of which 3 have answers, with 3 different prompts)"),
        (["a?", "b?", "c?"], 0.1, "write at least fraction: 0.17"),
        (["a?", "b?", "c?"], 0.9, "holds out 3 rows (3 rows, of which 3 have answers"),
        (["a?", "b?", "c?"], 0.9, "write at most fraction: 0.83"),
        (["a?", "a?", "b?", "b?", "b?"], 0.2, "write at least fraction: 0.31"),
        (["a?"] * 8, 0.5, "with 1 different prompts); rows with one prompt stay on one side: name held-out rows"),
    ],
)
def test_a_fraction_that_is_no_row_or_all_is_refused_with_the_numbers(
    said: Said, tmp_path: Path, questions: list[str], fraction: float, text: str
) -> None:
    asking(tmp_path / "rows.jsonl", *questions)
    asking(tmp_path / "mixed.jsonl", *map(str, range(100)), domain="prose")
    code, message = said((FRACTION[0], f"evaluation: {{fraction: {fraction}}}"))
    assert code == ConfigError.exit_code
    assert "run.yaml:8: data.evaluation: fraction: " in message
    assert text in message


@pytest.mark.parametrize(
    ("evaluation", "text"),
    [
        ("{fraction: 0}", "data.evaluation.fraction = 0"),
        ("{fraction: 1.0}", "data.evaluation.fraction = 1.0"),
        (
            "{fraction: 0.1, path: HERE/held.jsonl}",
            "as they are read there: remove path",
        ),
        ("{fraction: 0.1, max_rows: 3}", "as they are read there: remove max_rows"),
        ("{}", "'path' is missing: name the held-out rows, or write fraction: 0.05"),
    ],
)
def test_what_is_neither_rows_nor_a_fraction_is_refused_at_its_line(said: Said, evaluation: str, text: str) -> None:
    code, message = said((FRACTION[0], f"evaluation: {evaluation}"))
    assert code == ConfigError.exit_code
    assert "run.yaml:8: data.evaluation" in message
    assert text in message


def test_a_row_that_no_teacher_is_routed_to_is_named_with_its_line(said: Said) -> None:
    code, text = said(("{python: code, prose: prose}", "{python: code, verse: prose}"))
    assert code == 3
    assert "run.yaml:15: tasks.mixed.prompts: 2 of 3 rows cannot be used\n" in text
    assert "mixed.jsonl:2: domain: is 'prose', which is not in route.map (there are: python, verse)" in text
    assert "(there are: python, verse) (1 more: mixed.jsonl:3)" in text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("class Encoding:\n    k: int = 1\n", "is no parameter class: derive it from configs.labels.Labels"),
        ("from configs.labels import Labels\nclass Encoding(Labels):\n    k: int\n", "labels.k"),
    ],
)
def test_a_plug_in_that_is_no_parameter_class_is_refused_at_its_line(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str
) -> None:
    name = f"bad_plug_in_{len(source)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "labels.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, message = said(("{kind: topk, k: 8}", f"{{kind: {name}.labels}}"))
    assert code == ConfigError.exit_code
    assert "run.yaml:18: labels" in message
    assert text in message


def test_a_term_of_a_user_that_nothing_computes_is_a_problem(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from configs.losses import Divergence\nclass Term(Divergence):\n    part: float = 1.0\n"
    (tmp_path / "own_terms").mkdir()
    (tmp_path / "own_terms" / "gap.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, message = said(("[{loss: forward_kl}]", "[{loss: own_terms.gap, part: x}]"))
    assert code == ConfigError.exit_code
    assert "tasks.mixed.objective.0.part" in message
    own = ("[{loss: forward_kl}]", "[{loss: own_terms.gap}]")
    code, message = said(own)
    assert code == ConfigError.exit_code
    assert "loss: own_terms.gap: nothing computes it; write @computes(Term)" in message
    computed = "from trainer.losses.terms import computes\n@computes(Term)\ndef gap(pair, *, part): return pair\n"
    (tmp_path / "own_terms" / "right.py").write_text(source + computed)
    assert said(("[{loss: forward_kl}]", "[{loss: own_terms.right}]"))[0] == 0


END = "training: {steps: 2, sequences_per_step: 4}"
TRACKERS = {
    "wanbd": "run.yaml:21: trackers.0 = 'wanbd'\n      unknown kind 'wanbd'; did you mean 'wandb'?",
    "{kind: wandb, api_key: x}": "unknown key 'api_key'; remove it: keys stay out of a configuration; trackers take",
    "{kind: wandb, tracking_uri: x}": "unknown key 'tracking_uri': remove tracking_uri, only mlflow has it",
    "{kind: wandb, tags: [a]}, wandb": "trackers.1 = 'wandb'\n      goes to the same place as trackers.0; remove one",
    "{kind: trackio, space_id: a/b, server_url: 'http://c'}": "keep one of space_id and server_url",
    "fakes.nowhere": "there is no module 'fakes.nowhere' on the Python path",
}


@pytest.mark.parametrize(("written", "text"), TRACKERS.items())
def test_a_tracker_that_is_none_is_refused_at_its_place(written: str, text: str, said: Said) -> None:
    code, told = said(
        (END, f"{END}\ntrackers:\n- {written}" if "}, " not in written else f"{END}\ntrackers: [{written}]")
    )
    assert code == ConfigError.exit_code
    assert text in told


def test_a_tracker_whose_library_is_missing_is_refused_with_what_to_install(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = software.metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise software.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(software.metadata, "version", version)
    code, told = said((END, f"{END}\ntrackers:\n- {{kind: wandb, project: x}}"))
    assert code == ConfigError.exit_code
    assert "run.yaml:21: trackers.0: wandb is missing; pip install 'stillhouse[wandb]'" in told


def test_a_tracker_that_does_not_answer_is_a_warning(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    trackers = "trackers: [tensorboard, {kind: mlflow, tracking_uri: 'http://127.0.0.1:9'}, wandb]"
    code, told = said((END, f"{END}\n{trackers}"))
    assert code == 0
    assert "trackers.0: tensorboard is ready" in told
    assert (
        "trackers.1: mlflow: http://127.0.0.1:9/health cannot be reached: [Errno 111] Connection refused; a run" in told
    )
    assert (
        "wandb: no key for https://api.wandb.ai: run `wandb login`, set WANDB_API_KEY, or write mode: offline" in told
    )

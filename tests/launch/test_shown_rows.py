"""`check --rows`: what is shown as learnt is what transformers' own mask says; no text of a row acts on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import HERMES, QWEN3, REASONED
from tiny_models import tiny_tokenizer
from typer.testing import CliRunner

from configs.load import load_run
from launch.check import shown_rows
from launch.check.run import check
from launch.check.shown_rows import Paint, Text, Wanted, left_out, show_rows, texts_of, visible
from launch.cli import app
from trainer.loop.inputs import read_inputs
from trainer.loop.rows import open_reader
from trainer.types import Prompt

CHAT = [
    {"role": "system", "content": "speak of foxes"},
    {"role": "user", "content": "who is it?\nsay!"},
    {"role": "assistant", "content": "the quick fox\njumps"},
    {"role": "user", "content": "and who else?"},
    {"role": "assistant", "content": "a lazy dog é"},
]
Shown = Callable[..., str]


@pytest.fixture
def run_of(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> Callable[..., Path]:
    """A configuration over these rows."""

    def write(*rows: dict[str, Any], **changes: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "template.jinja").write_text(HERMES)
        config = {
            "name": "tiny",
            "folder": str(tmp_path / "out"),
            "student": {"model": {"path": str(tiny_student), "licence": "mit"}},
            "teacher": {
                "model": {"path": str(tiny_teacher), "licence": "mit"},
                "scorer": {"engine": "hf"},
                "generator": {"engine": "hf"},
                "chat_template": str(tmp_path / "template.jinja"),
            },
            "prompts": {"path": str(tmp_path / "rows.jsonl")},
            "data": {"max_length": 512},
            "training": {"steps": 2},
            **changes,
        }
        if "answers" not in changes:
            del config["teacher"]["generator"]
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(config))
        return file

    return write


def shown(file: Path, *, colour: bool = False, **wanted: Any) -> str:
    run = load_run(file).run
    return "\n".join(show_rows(run, read_inputs(run), Wanted(**{"rows": 3, **wanted}), colour=colour))


def by_transformers(messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids, and for each whether it is of an answer."""
    told = tiny_tokenizer().apply_chat_template(
        messages, chat_template=HERMES, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    return list(told["input_ids"]), [bool(one) for one in told["assistant_masks"]]


def test_the_tokens_shown_as_learnt_are_those_that_transformers_marks_as_answers(run_of: Callable[..., Path]) -> None:
    run = load_run(run_of({"messages": CHAT})).run
    prompt, _ = open_reader(run, read_inputs(run), run.resolved_tasks()["main"]).read(0, "0:0")
    (text,) = texts_of(prompt)
    ids, answers = by_transformers(CHAT)
    assert text.ids.tolist() == ids
    assert text.learnt.tolist() == answers
    assert prompt.loss_mask is not None
    assert prompt.loss_mask.tolist() != answers, "the mask itself is one row earlier"


def test_marks_stand_around_the_answers_with_their_end_and_around_nothing_else(run_of: Callable[..., Path]) -> None:
    text = shown(run_of({"messages": CHAT}))
    assert "train rows, row 1 of 1" in text
    assert "rows.jsonl:1\n" in text
    assert "{+the quick fox\\n+}\n    {+jumps<|im_end|>+}\n" in text
    assert "{+a lazy dog é<|im_end|>+}\n" in text
    ids, answers = by_transformers(CHAT)
    assert f"  {len(ids)} tokens, {sum(answers)} learnt\n" in text
    unmarked = re.sub(r"\{\+(.*?)(\\n)?\+\}", r"\1", text.split("learnt\n", 1)[1])
    rendered = tiny_tokenizer().apply_chat_template(CHAT, chat_template=HERMES, tokenize=False)
    assert unmarked.rstrip("\n").replace("\n    ", "\n").strip() == rendered.strip()


def test_colours_stand_where_the_marks_do(run_of: Callable[..., Path]) -> None:
    text = shown(run_of({"messages": CHAT}), colour=True)
    learnt = re.findall(r"\x1b\[[\d;]*42[\d;]*m\x1b?\[?[\d;]*m?(.*?)\x1b\[0m", text)
    assert [part for part in learnt if "fox" in part or "dog" in part] == ["the quick fox\\n", "a lazy dog é<|im_end|>"]
    assert "{+" not in text


def test_a_preference_shows_both_answers_and_rows_without_an_answer_where_the_teacher_begins(
    run_of: Callable[..., Path],
) -> None:
    pair = {"prompt": CHAT[1:2], "chosen": CHAT[2:3], "rejected": CHAT[4:5]}
    text = shown(run_of(pair, labels="token", objective=[{"loss": "dpo"}]))
    assert re.search(r"chosen: \d+ tokens.*the quick fox", text, re.DOTALL)
    assert re.search(r"rejected: \d+ tokens.*\{\+a lazy dog", text, re.DOTALL)
    several = {"prompt": CHAT[1:2], "candidates": [CHAT[2:3], CHAT[4:5]], "scores": [2, 0.5]}
    text = shown(run_of(several, labels="none", objective=[{"loss": "scored_listwise_kl"}]))
    assert re.search(r"candidate 1 of 2, score 2: \d+ tokens.*the quick fox", text, re.DOTALL)
    assert re.search(r"candidate 2 of 2, score 0.5: \d+ tokens.*\{\+a lazy dog", text, re.DOTALL)
    text = shown(run_of({"prompt": CHAT[1:2]}, answers={"kind": "teacher", "max_new_tokens": 8}))
    assert "tokens, behind which the teacher writes the answer\n" in text
    assert text.endswith("<|im_start|>assistant\n    {+the teacher's answer+}")


def test_a_conversation_of_several_sequences_shows_each_as_a_generator_would_have_written_it(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    file = run_of({"messages": REASONED})
    (tmp_path / "template.jinja").write_text(QWEN3)
    run = load_run(file).run
    prompt, _ = open_reader(run, read_inputs(run), run.resolved_tasks()["main"]).read(0, "0:0")
    told = texts_of(prompt)
    assert len(told) > 1
    assert [text.title for text in told] == [f"sequence {n} of {len(told)}: " for n in range(1, len(told) + 1)]
    tokenizer = tiny_tokenizer()
    answers = [turn for turn in REASONED if turn["role"] == "assistant"]
    for text, answer in zip(told, answers, strict=True):
        learnt = tokenizer.decode(text.ids[text.learnt])
        assert answer["content"].split("</think>")[-1].strip() in learnt
        assert learnt.endswith("<|im_end|>")
    assert f"sequence {len(told)} of {len(told)}: " in shown(file)


def test_the_rows_that_are_asked_for_are_shown_and_bad_ones_say_why(run_of: Callable[..., Path]) -> None:
    rows = [{"messages": [CHAT[1], {"role": "assistant", "content": f"number {n}"}]} for n in range(1, 6)]
    rows[2] = {"messages": [CHAT[1], {"role": "assistant", "content": 3}]}
    file = run_of(*rows)
    text = shown(file, rows=2, first=2)
    assert "row 2 of 5" in text
    assert "row 3 of 5\n  cannot be used: " in text
    assert "row 1 of 5" not in text
    assert "row 4 of 5" not in text
    assert "train rows: there is no row 9, the last one is 5" in shown(file, first=9)


def test_the_table_of_tokens_has_id_text_and_whether_it_is_learnt(run_of: Callable[..., Path]) -> None:
    text = shown(run_of({"messages": CHAT}), tokens=True)
    lines = text.split(" token ")[-1].splitlines()[1:]
    ids, answers = by_transformers(CHAT)
    assert [int(line.split()[1]) for line in lines] == ids
    assert [line.split()[2] == "yes" for line in lines] == answers
    assert all("\n" not in line and line for line in lines)


def test_long_rows_are_cut_in_the_middle_and_say_how_much_of_them_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_rows, "MOST_TOKENS", 10)
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("the quick brown fox jumps over the lazy dog and once more").input_ids)
    learnt = np.arange(len(ids)) >= 4
    text = Text("", ids, learnt, np.ones(len(ids)), is_prompt=False)
    lines = "\n".join(Paint(tokenizer, colour=False).lines(text))
    assert left_out(len(ids)) == range(5, len(ids) - 5)
    assert f"... {len(ids) - 10} tokens are left out here, {len(ids) - 10} of them learnt ..." in lines
    assert tokenizer.decode(ids[:4]) in lines
    assert tokenizer.decode(ids[-5:]) in lines


def test_weights_of_answers_are_told_where_they_are_not_one() -> None:
    ids = np.arange(6, dtype=np.int32) + 3
    mask = np.array([False, True, True, True, False, False])
    weights = np.array([1, 0.5, 0.5, 1, 1, 1], np.float32)
    (text,) = texts_of(Prompt("0:0", token_ids=ids, loss_mask=mask, origin="a:1", row_weights=weights))
    assert text.learnt.tolist() == [False, False, True, True, True, False]
    assert text.weights.tolist() == [1, 1, 0.5, 0.5, 1, 1]


def test_a_character_of_several_tokens_is_shown_whole_and_one_that_is_cut_hurts_nothing() -> None:
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("a é 👩‍🚀 b").input_ids)
    for border in range(len(ids) + 1):
        text = Text("", ids, np.arange(len(ids)) >= border, np.ones(len(ids)), is_prompt=False)
        plain = "".join(Paint(tokenizer, colour=False).lines(text)).replace("{+", "").replace("+}", "")
        whole = tokenizer.decode(ids)
        assert plain == whole or "\N{REPLACEMENT CHARACTER}" in plain
    assert plain == whole


EVIL = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r \u202e \ufeff \x00 \t"


def test_no_control_character_of_a_row_reaches_the_terminal(run_of: Callable[..., Path]) -> None:
    assert visible(EVIL).isprintable()
    evil = [{"role": "user", "content": EVIL.replace("\x00", "")}, {"role": "assistant", "content": "\x1b[31mred\x07"}]
    text = shown(run_of({"messages": evil}), tokens=True)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"{+\x1b[31mred\x07<|im_end|>+}" in text


@pytest.mark.parametrize(
    ("options", "there"),
    [
        (("--rows", "1"), ["row 1 of 2"]),
        (("--rows", "2"), ["row 1 of 2", "row 2 of 2"]),
        (("--rows", "2", "--from", "2"), ["row 2 of 2"]),
        (("--tokens",), ["row 1 of 2", " token "]),
        ((), []),
    ],
)
def test_the_command_check_prints_the_rows_before_its_verdict(
    run_of: Callable[..., Path], options: tuple[str, ...], there: list[str]
) -> None:
    """As `stillhouse check my-run.yaml --rows 3` is typed."""
    file = run_of({"messages": CHAT}, {"messages": CHAT[1:3]})
    said = CliRunner().invoke(app, ["check", str(file), *options])
    assert said.exit_code == 0
    told = said.stdout
    assert [part for part in ("row 1 of 2", "row 2 of 2", " token ") if part in told] == there
    if there:
        assert told.index("train rows: ") < told.index("{+the quick fox") < told.index("ready: ")


def test_rows_that_need_a_tokenizer_that_is_not_there_are_said_not_to_be_shown(
    run_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(run_of({"messages": CHAT}), ("teacher.model.path=/nowhere",), wanted=Wanted(1)) == 2
    assert "rows are not shown: they need the tokenizer" in capsys.readouterr().out

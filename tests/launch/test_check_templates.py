"""What `check` says about chat templates, tool calls and how much of a conversation is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_templates as shapes
import pytest
from chat_templates import BESIDE, ONE_CALL, REASONED, TOOL, assistant, user

from launch.check.run import check
from trainer.errors import ConfigError, DataError

RUN = """\
name: tiny
folder: HERE/out
student:
  model: {path: STUDENT, licence: mit}
teacher:
  model: {path: TEACHER, licence: mit}
  scorer: {engine: hf}
  chat_template: HERE/chat.jinja
  template_arguments: ARGUMENTS
prompts:
  path: HERE/rows.jsonl
  loss_on: ON
  system_prompt: SYSTEM
data: {max_length: 512}
labels: {kind: topk, k: 8}
training: {steps: 2, sequences_per_step: 4}
"""
TALK = [user("hi"), assistant("one"), user("more"), assistant("two")]
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    def look(*rows: dict[str, Any], shape: str, arguments: str = "{}", on: str = "all", system: str = "null") -> Any:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = getattr(shapes, shape)
        for special in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"):
            text = text.replace(special, "<|im_end|>")  # the tokenizer has no others
        (tmp_path / "chat.jinja").write_text(text)
        words = {"HERE": tmp_path, "STUDENT": tiny_student, "TEACHER": tiny_teacher, "ARGUMENTS": arguments}
        content = RUN
        for word, value in (words | {"ON": on, "SYSTEM": system}).items():
            content = content.replace(word, str(value))
        (tmp_path / "run.yaml").write_text(content)
        try:
            code, refused = check(tmp_path / "run.yaml", ()), ""
        except ConfigError as error:
            code, refused = error.exit_code, str(error)
        assert not (tmp_path / "out").exists(), "nothing is started"
        return code, (capsys.readouterr().out + refused).replace(f"{tmp_path}/", "")

    return look


def test_conversations_of_several_sequences_are_told(said: Said) -> None:
    code, text = said({"messages": REASONED}, {"messages": TALK}, {"messages": TALK[:2]}, shape="QWEN3")
    assert code == 0, text
    told = "run.yaml:10: prompts: 2 conversations became 4 sequences: the template rewrites earlier turns"
    assert told in text
    code, text = said({"messages": REASONED}, shape="QWEN3", on="last", system="be brief")
    assert code == 0, text
    assert "became" not in text
    assert "learnt: the last answer of each conversation; system_prompt before those without a system turn" in text


def test_rows_with_tool_calls_are_good_rows(said: Said) -> None:
    rows = [{"messages": talk, "tools": [TOOL]} for talk in (ONE_CALL, BESIDE)]
    code, text = said(*rows, shape="HERMES")
    assert code == 0, text
    assert "2 rows, all checked, 2 good" in text


WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, str], type[Exception], str]] = {
    "a name that is nearly right": (
        [{"messages": TALK}],
        {"shape": "QWEN3", "arguments": "{enable_thinkin: false}"},
        ConfigError,
        "run.yaml:9: teacher.template_arguments.enable_thinkin: the chat template never reads this variable; did you "
        "mean 'enable_thinking'? (it reads enable_thinking)",
    ),
    "a name that is taken": (
        [{"messages": TALK}],
        {"shape": "QWEN3", "arguments": "{add_generation_prompt: true}"},
        ConfigError,
        "run.yaml:9: teacher.template_arguments.add_generation_prompt: cannot be given, since it is decided at each "
        "rendering",
    ),
    "an argument of a row that is not read": (
        [{"messages": TALK, "chat_template_kwargs": {"thinking": True}}],
        {"shape": "QWEN3"},
        DataError,
        "rows.jsonl:1: chat_template_kwargs.thinking: the chat template never reads this variable; did you mean "
        "'enable_thinking'?",
    ),
    "tools for a template without": (
        [{"messages": ONE_CALL, "tools": [TOOL]}],
        {"shape": "DEEPSEEK_R1"},
        DataError,
        "rows.jsonl:1: tools: the chat template does not read them, and calls of them would refer to nothing; name a "
        "template that fits with teacher.chat_template",
    ),
    "content beside a call that is lost": (
        [{"messages": BESIDE, "tools": [TOOL]}],
        {"shape": "LLAMA"},
        DataError,
        "rows.jsonl:1: messages[1].content: the chat template leaves it out of this answer beside tool calls",
    ),
    "reasoning that is begun and never closed": (
        [{"messages": TALK[:2]}],
        {"shape": "DEEPSEEK_R1"},
        DataError,
        "rows.jsonl:1: messages[1]: the prompt of this turn ends with '<think>', which the answer does not close",
    ),
    "reasoning where none is asked for": (
        [{"messages": REASONED}],
        {"shape": "QWEN3", "arguments": "{enable_thinking: false}"},
        DataError,
        "rows.jsonl:1: messages[1]: the prompt of this turn ends with an empty <think>, but the answer reasons",
    ),
    "a system prompt before plain text": (
        [{"text": "plain"}],
        {"shape": "HERMES", "system": "be brief"},
        ConfigError,
        "run.yaml:10: prompts: rows.jsonl:1: system_prompt: is put before conversations, and this row is plain text",
    ),
    "the last answer of plain text": (
        [{"text": "plain"}],
        {"shape": "HERMES", "on": "last"},
        ConfigError,
        "run.yaml:10: prompts: rows.jsonl:1: loss_on: last learns the last answer of conversations, and this row is "
        "plain text",
    ),
    "a word that loss_on does not know": (
        [{"messages": TALK}],
        {"shape": "HERMES", "on": "lats"},
        ConfigError,
        "run.yaml:12: prompts.loss_on = 'lats'",
    ),
    "a last answer that is not learnt": (
        [{"messages": [*TALK[:3], {**TALK[3], "weight": 0}]}],
        {"shape": "HERMES", "on": "last"},
        DataError,
        "rows.jsonl:1: messages[3]: is the only answer that loss_on: last learns, and is marked as not to be learnt",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_student_should_learn_is_one_message_with_its_line(case: str, said: Said) -> None:
    rows, given, error, message = WRONG[case]
    code, text = said(*rows, **given)
    assert code == error.exit_code, text
    assert message in text
    assert text.count("problem ") <= 1, "one message"

"""A better and a worse answer, in each of the ways in which other trainers write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from given_rows import problem_of, row_of, rows_of

from trainer.data.row import ChatRow, PreferenceRow

USER = {"role": "user", "content": "What drips?"}
GOOD = {"role": "assistant", "content": "The still."}
BAD = {"role": "assistant", "content": "Nothing."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = PreferenceRow(ChatRow((USER, GOOD), 1), ChatRow((USER, BAD), 1))
SHARED = {"conversations": [{"from": "human", "value": "What drips?"}]}

SAME = {
    "TRL, explicit": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations beside their prompt": {
        "prompt": "What drips?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "LLaMA-Factory, ShareGPT": {
        **SHARED,
        "chosen": {"from": "gpt", "value": "The still."},
        "rejected": {"from": "gpt", "value": "Nothing."},
    },
    "LLaMA-Factory, messages": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, Alpaca": {"instruction": "What", "input": "drips?", "chosen": "The still.", "rejected": "Nothing."},
    "LLaMA-Factory, its own": {
        "chosen_messages": [{**USER, "loss_weight": 0.0}, {**GOOD, "loss_weight": 1.0}],
        "rejected_messages": [USER, BAD],
    },
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "explicit, as JSON text": {
        "prompt": json.dumps([USER]),
        "chosen": json.dumps([GOOD]),
        "rejected": json.dumps([BAD]),
    },
    "implicit, as JSON text": {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
    "a question with messages as JSON text": {
        "question": "What drips?",
        "chosen": json.dumps([GOOD]),
        "rejected": json.dumps([BAD]),
    },
    "a question with two answers": {"question": "What drips?", "chosen": "The still.", "rejected": "Nothing."},
}


@pytest.mark.parametrize("name", SAME)
def test_one_preference_is_the_same_in_every_notation(name: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, SAME[name])
    expected = PAIR
    if name == "LLaMA-Factory, Alpaca":
        user = {**USER, "content": "What\ndrips?"}
        expected = PreferenceRow(ChatRow((user, GOOD), 1), ChatRow((user, BAD), 1))
    assert (rows.format, rows.read(0, needs_answer=True)) == ("preference", expected)


def test_whole_conversations_answer_where_they_part(tmp_path: Path) -> None:
    before = [SYSTEM, USER, {**GOOD, "weight": 1}, USER]
    row = row_of(tmp_path, {"chosen": [*before, GOOD, USER, GOOD], "rejected": [*before, BAD]})
    given = (SYSTEM, USER, GOOD, USER)
    assert row == PreferenceRow(ChatRow((*given, GOOD, USER, GOOD), 4), ChatRow((*given, BAD), 4))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen: the other answer begins with all of it"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            "chosen: the other answer begins with all of it",
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]},
            "chosen[0]: chosen and rejected part here, and only answers",
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, {**USER, "content": "x"}, BAD]},
            "chosen[2]: chosen and rejected part",
        ),
        (
            {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt: is not what chosen and rejected begin with",
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt: is not what chosen and rejected",
        ),
        (
            {"chosen": "Human: a", "rejected": "Human: b"},
            "prompt: is missing, which chosen is an answer to",
        ),
        (
            {**SHARED, "chosen": {"from": "human", "value": "a"}, "rejected": BAD},
            "chosen.from: the turn after 'human' must be assistant",
        ),
        ({**SHARED, "chosen": 3, "rejected": BAD}, "chosen: must be an answer, as text or as messages, not a number"),
        (
            {"messages": [USER, GOOD], "chosen": GOOD, "rejected": BAD},
            "messages[1].role: a prompt must end with a user turn",
        ),
        ({"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "rejected: belongs to a pair"),
        (
            {"input": {"messages": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "input.messages: is empty",
        ),
    ],
)
def test_what_is_no_preference_is_named_by_its_field(tmp_path: Path, row: dict, message: str) -> None:
    assert problem_of(tmp_path, row).startswith(message)


def test_of_a_conversation_beside_whole_ones_the_configuration_says_which_is_meant(tmp_path: Path) -> None:
    row = {"messages": [USER, GOOD], "prompt": "What drips?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert row_of(tmp_path, row, format="preference") == PAIR


def test_answers_may_call_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    row = {"input": {"messages": [USER], "tools": tools}, "preferred_output": [call], "non_preferred_output": [BAD]}
    read = row_of(tmp_path, row)
    assert read.chosen.tools == read.rejected.tools == tuple(tools)
    assert read.chosen.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_messages_written_as_json_do_not_answer_a_text(tmp_path: Path) -> None:
    row = {"prompt": "What drips?", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}
    assert problem_of(tmp_path, row).startswith("chosen: is a list of messages but prompt is text")


def test_whole_conversations_beside_a_text_are_rendered_with_the_template(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "What drips?", "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert rows.title == "preference pairs"

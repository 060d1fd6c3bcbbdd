"""Conversations as OpenAI, ShareGPT and their descendants write them: all become the same row."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from given_rows import problem_of, row_of, rows_of

from configs.prompts import Dataset
from trainer.data.row import ChatRow
from trainer.data.rows import Rows
from trainer.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What drips?"}
ANSWER = {"role": "assistant", "content": "The still."}
TALK = (SYSTEM, USER, ANSWER)


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


SAME = {
    "ShareGPT": {"conversations": shared(("system", "Be brief."), ("human", "What drips?"), ("gpt", "The still."))},
    "its system beside": {
        "system": "Be brief.",
        "conversations": shared(("user", "What drips?"), ("chatgpt", "The still.")),
    },
    "capital letters": {
        "conversations": shared(("System", "Be brief."), ("Human", "What drips?"), ("BARD", "The still."))
    },
    "roles under conversations": {"conversations": list(TALK)},
    "ShareGPT's names under messages": {
        "messages": shared(("system", "Be brief."), ("human", "What drips?"), ("gpt", "The still."))
    },
    "exchanges": {"system": "Be brief.", "conversation": [{"human": "What drips?", "assistant": "The still."}]},
    "system beside messages": {"system": "Be brief.", "messages": [USER, ANSWER]},
    "JSON text": {"messages": json.dumps(TALK)},
    "JSON text of ShareGPT": {
        "conversations": json.dumps(shared(("human", "What drips?"), ("gpt", "The still."))),
        "system": "Be brief.",
    },
    "parts": {
        "messages": [
            {
                **turn,
                "content": [
                    {"type": "text", "text": turn["content"][:3]},
                    {"type": "text", "text": turn["content"][3:]},
                ],
            }
            for turn in TALK
        ]
    },
    "parts of LLaMA-Factory": {
        "messages": [{**turn, "content": [{"type": "text", "value": turn["content"]}]} for turn in TALK]
    },
    "nothing else": {"messages": TALK, "tools": [], "parallel_tool_calls": False, "conversations": None},
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_is_the_same_row_in_every_notation(name: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, SAME[name])
    assert rows.read(0, needs_answer=True) == ChatRow(TALK, 0)
    assert rows.format == (
        "sharegpt"
        if {"conversations", "conversation"} & rows.raw.raw(0).keys() and name != "nothing else"
        else "messages"
    )


def test_a_developer_stays_one_for_the_template_to_decide(tmp_path: Path) -> None:
    turns = ({"role": "developer", "content": "Be brief."}, USER, ANSWER)
    assert row_of(tmp_path, {"messages": turns}) == ChatRow(turns, 0)


def test_reasoning_in_parts_is_the_field_that_templates_read(tmp_path: Path) -> None:
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "The still."}]
    row = row_of(tmp_path, {"messages": [USER, {"role": "assistant", "content": parts}]})
    assert row.messages[1] == {**ANSWER, "reasoning_content": "Hm."}


def test_marks_of_turns_and_options_of_rows_are_carried(tmp_path: Path) -> None:
    turns = [*shared(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e"), ("gpt", "f"))]
    turns[1]["weight"], turns[3]["weight"] = 0, 0.25
    row = row_of(tmp_path, {"conversations": turns, "weight": 2, "chat_template_kwargs": {"enable_thinking": False}})
    assert (row.turn_weights, row.context, row.weight) == ({1: 0.0, 3: 0.25}, {1}, 2.0)
    assert row.template_arguments == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": shared(("gpt", "a"))},
            "conversations[0].from: the first turn must be system or user, not 'gpt'",
        ),
        (
            {"conversations": shared(("human", "a"), ("human", "b"))},
            "conversations[1].from: the turn after 'human' must be assistant, not 'human'",
        ),
        ({"conversations": shared(("human", "a"), ("gpt", " "))}, "conversations[1].value: is empty"),
        (
            {"conversations": shared(("human", "a"), ("clown", "b"))},
            "conversations[1].from: unknown role 'clown'; write system, human, gpt",
        ),
        ({"conversations": [{"from": "human"}]}, "conversations[0].content: is missing"),
        ({"conversations": [{"value": "a"}]}, "conversations[0].role: is missing"),
        ({"conversations": "hello"}, "conversations: must be a list of {from, value} turns, and this text is no JSON"),
        (
            {"conversations": str(shared(("human", "a")))},
            "conversations: must be a list of {from, value} turns, and this text is no JSON: Expecting",
        ),
        ({"conversations": []}, "conversations: is empty"),
        (
            {"conversation": [{"human": "a", "assistant": "b", "tool": "c"}]},
            "conversation[0].tool: is not read; a turn of this kind has human and assistant",
        ),
        ({"conversation": [{"human": "a", "assistant": " "}]}, "conversation[0].assistant: is empty"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
            "messages[0].content[0]: is of type 'image_url', and only text is read",
        ),
        (
            {"messages": [{**USER, "content": ["a"]}, ANSWER]},
            "messages[0].content[0]: must be {type: text, text: ...}, not a string",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]},
            "messages[0].content[0].text: must be text, not null",
        ),
        (
            {"messages": "[{'role': 'user', 'content': 'a'}]"},
            "messages: must be a list of {role, content} messages, and this text is no JSON",
        ),
        (
            {"messages": [SYSTEM, USER, ANSWER, {"role": "developer", "content": "x"}]},
            "messages[3].role: the turn after 'assistant' must be user, not 'developer'",
        ),
        ({"conversations": shared(("human", "a"), ("gpt", "b")), "images": ["x"]}, "images: only text is supported"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_row(tmp_path: Path, row: dict, message: str) -> None:
    assert problem_of(tmp_path, row).startswith(message)


def test_two_conversations_in_one_row_are_one_too_many(tmp_path: Path) -> None:
    row = {"messages": [USER, ANSWER], "conversations": shared(("human", "a"), ("gpt", "b"))}
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, row)
    assert (
        "rows.jsonl:1: messages: the row has conversations too, and may be read as messages or as ShareGPT; write "
        in str(caught.value)
    )
    assert "format: messages or format: sharegpt" in str(caught.value)
    assert row_of(tmp_path, row, format="sharegpt").messages[0]["content"] == "a"
    assert row_of(tmp_path, row, format="messages").messages == (USER, ANSWER)


def test_a_row_of_another_kind_of_conversation_is_a_bad_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"conversations": shared(("human", "a"), ("gpt", "b"))}, {"messages": [USER, ANSWER]})
    with pytest.raises(
        DataError, match="messages: the row is of another format than the first one, which is read by its conv"
    ):
        rows.read(1, needs_answer=True)


def test_a_table_gives_the_same_conversation(tmp_path: Path) -> None:
    turns = shared(("human", "What drips?"), ("gpt", "The still."))
    datasets.Dataset.from_list(
        [{"conversations": turns, "system": None}, {"conversations": turns, "system": "Be brief."}]
    ).to_parquet(tmp_path / "a.parquet")
    rows = Rows.open(Dataset(path=str(tmp_path / "a.parquet")))
    assert [rows.read(row, needs_answer=True).messages for row in range(2)] == [(USER, ANSWER), TALK]

"""Tools and their calls: what they become for the template, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from given_rows import problem_of, row_of

from configs.prompts import Dataset
from trainer.data.rows import Rows

FUNCTION = {
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "In Rome?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "content": "sunny"}
ANSWER = {"role": "assistant", "content": "Sunny."}


def calling(*calls: object, **fields: object) -> dict:
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def talk(*turns: dict, tools: object = (TOOL,)) -> dict:
    return {"messages": [USER, *turns], "tools": tools}


SAME = {
    "OpenAI": talk(
        calling({**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}, content=None),
        RESULT,
        ANSWER,
    ),
    "arguments as an object": talk(calling(CALL, content=""), RESULT, ANSWER),
    "no outer object": talk(calling(CALL["function"]), RESULT, ANSWER, tools=[FUNCTION]),
    "tools as JSON text": talk(calling(CALL), RESULT, ANSWER, tools=json.dumps([TOOL])),
    "calls as JSON text": talk({"role": "assistant", "tool_calls": json.dumps([CALL])}, RESULT, ANSWER),
    "OpenAI's older names": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {**RESULT, "role": "function"},
            ANSWER,
        ],
        "functions": [FUNCTION],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "In Rome?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": json.dumps([FUNCTION]),
    },
    "ms-swift": talk(
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {**RESULT, "role": "tool_response"},
        ANSWER,
    ),
    "parts of LLaMA-Factory": talk(
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL["function"])}]}, RESULT, ANSWER
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_call_and_its_result_are_the_same_in_every_notation(name: str, tmp_path: Path) -> None:
    row = row_of(tmp_path, SAME[name])
    assert row.tools == (TOOL,)
    assert row.messages == (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWER)
    assert (row.loss_from, row.turn_weights) == (0, {})


def test_a_call_may_be_the_last_turn_and_several_may_be_answered_by_their_ids(tmp_path: Path) -> None:
    assert row_of(tmp_path, talk(calling(CALL))).answered
    first, second = ({**CALL, "id": name} for name in ("a", "b"))
    results = [{**RESULT, "tool_call_id": "b", "name": "weather"}, {**RESULT, "tool_call_id": "a"}]
    row = row_of(tmp_path, talk(calling(first, second, content="Let me look."), *results, ANSWER))
    assert row.messages[1] == calling(first, second, content="Let me look.")
    assert row.messages[2:4] == tuple(results)


def test_a_prompt_may_end_with_a_result(tmp_path: Path) -> None:
    row = row_of(tmp_path, {"prompt": [USER, calling(CALL), RESULT], "completion": [ANSWER], "tools": [TOOL]})
    assert row.loss_from == 3
    assert not row_of(tmp_path, {"prompt": [USER, calling(CALL), RESULT], "tools": [TOOL]}, needs_answer=False).answered


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            talk(calling(CALL), RESULT, ANSWER, tools=None),
            "messages[1]: calls 'weather', and the row has no tools; write those that could be called as tools",
        ),
        (
            talk(calling({"name": "rain"}), RESULT, ANSWER),
            "messages[1]: call 0 is of 'rain', and the row's tools are others (weather)",
        ),
        (
            talk(ANSWER, RESULT, ANSWER),
            "messages[2].role: the result of a call, and the assistant turn before it has none; write the calls as",
        ),
        (talk(RESULT, ANSWER), "messages[1].role: the turn after 'user' must be assistant, not 'tool'"),
        (
            talk(calling(CALL), ANSWER),
            "messages[2].role: the turn after one that calls tools must be tool, not 'assistant'",
        ),
        (
            talk(calling(CALL), RESULT, USER),
            "messages[3].role: the turn after 'tool' must be tool or assistant, not 'user'",
        ),
        (talk(calling(CALL), RESULT, RESULT, ANSWER), "messages[3]: a further result, and messages[1] has 1 calls"),
        (
            talk(calling({**CALL, "id": "a"}), {**RESULT, "tool_call_id": "b"}, ANSWER),
            "messages[2].tool_call_id: 'b' is no call of messages[1]",
        ),
        (
            talk(calling(CALL), {**RESULT, "weight": 1}, ANSWER),
            "messages[2]: is marked as learnt, and only answers are",
        ),
        (
            talk(calling({"name": "weather", "arguments": "Rome"})),
            "messages[1].tool_calls[0].arguments: must be an object, and this text is no JSON",
        ),
        (
            talk(calling({"name": "weather", "arguments": "{'city': 'Rome'}"})),
            "messages[1].tool_calls[0].arguments: must be an object, and this text is no JSON",
        ),
        (
            talk(calling({"name": "weather", "arguments": "[1]"})),
            "messages[1].tool_calls[0].arguments: must be an object or JSON text of one, not a list",
        ),
        (talk(calling({"arguments": {}})), "messages[1].tool_calls[0].name: is missing"),
        (
            talk(calling({"type": "code", "function": {}})),
            "messages[1].tool_calls[0].type: only calls of type function are read",
        ),
        (
            talk(calling(CALL, function_call={"name": "weather"})),
            "messages[1].tool_calls: messages[1].function_call has calls too",
        ),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER], "tools": [TOOL]},
            "messages[0]: calls tools, and only assistant turns do; its role is 'user'",
        ),
        (talk({"role": "assistant", "content": None}), "messages[1].content: must be text, not null"),
        (
            talk(ANSWER, tools=[{"type": "retrieval", "function": FUNCTION}]),
            "tools[0].type: must be function, not 'retrieval'",
        ),
        (talk(ANSWER, tools=[{"name": 3}]), "tools[0].name: must be text, not a number"),
        (
            talk(ANSWER, tools=[{"name": "f", "parameters": "x"}]),
            "tools[0].parameters: must be a JSON schema, an object, not a string",
        ),
        (talk(ANSWER, tools="weather"), "tools: must be a list of tools"),
        (
            {"prompt": "a", "completion": " b", "tools": [TOOL]},
            "tools: belongs to a conversation, and prompt is text; write it as a list",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Rome)"}],
                "tools": [TOOL],
            },
            "conversations[1].value: must be a list of calls",
        ),
    ],
)
def test_a_call_that_cannot_be_rendered_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    assert problem_of(tmp_path, row).startswith(message)


def test_a_table_adds_no_arguments_to_a_call(tmp_path: Path) -> None:
    """A column of objects has the fields of all of them, null where one lacks it: these are none of the row's."""
    other = {"type": "function", "function": {"name": "weather", "arguments": {"day": 3}}}
    datasets.Dataset.from_list([talk(calling(CALL)), talk(calling(other))]).to_parquet(tmp_path / "a.parquet")
    rows = Rows.open(Dataset(path=str(tmp_path / "a.parquet")))
    called = [rows.read(row, needs_answer=True).messages[1]["tool_calls"] for row in range(2)]
    assert called == [[CALL], [other]]
    assert rows.read(0, needs_answer=True).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}

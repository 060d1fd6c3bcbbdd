"""Turns put together to a conversation: their order, whose calls are answered, and which of them are learnt.

system or developer?  user  assistant  user  assistant ...            the plain order
                      user  assistant+calls  tool...  assistant ...   a turn with calls is followed by their results
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

from trainer.data.formats.tools import Tools, names_of, tools_of
from trainer.data.formats.turn import Turn, plain_turn
from trainer.data.formats.values import RowProblem, is_absent, kind_of, text_of
from trainer.data.row import ChatRow

_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with calls": ("tool",),
    "tool": ("tool", "assistant"),
}
_GIVEN = ("system", "developer", "user")


def conversation(
    turns: AbstractSequence[Turn], row: Mapping[str, Any], *, needs_answer: bool, num_given: int = 0, name: str
) -> ChatRow:
    """The conversation of a row with these turns, and with what other fields of the row say of it: system, tools,
    chat_template_kwargs. The first `num_given` turns are no answers; `name` is the field that has the answers.

    Raises `RowProblem` for turns out of order, calls of tools that the row does not have, results of no call, and where
    an answer is needed and there is none to learn.
    """
    turns, num_given = _with_system(turns, row, num_given)
    tools = tools_of(row)
    _check_order(turns)
    _check_calls(turns, tools)
    weights, num_answers = {}, 0
    for index, turn in enumerate(turns):
        is_answer = index >= num_given and turn.role == "assistant"
        num_answers += is_answer
        if turn.mark and not is_answer:
            raise RowProblem(
                f"{turn.place}: is marked as learnt, and only answers are: assistant turns of messages or completion; "
                "remove the mark"
            )
        if is_answer and turn.mark not in (None, 1.0):
            weights[index] = turn.mark
    if needs_answer and not num_answers:
        raise RowProblem(f"{name}: no assistant turn, so nothing to learn from")
    if needs_answer and num_answers == list(weights.values()).count(0.0):
        raise RowProblem(f"{name}: every assistant turn is marked as not to be learnt; leave such rows out")
    if turns[-1].role in ("system", "developer"):
        raise RowProblem(f"{name}: only a system turn; a user turn must follow")
    messages = tuple(turn.message for turn in turns)
    return ChatRow(
        messages, loss_from=num_given, turn_weights=weights, tools=tools, template_arguments=_template_arguments(row)
    )


def _with_system(
    turns: AbstractSequence[Turn], row: Mapping[str, Any], num_given: int
) -> tuple[AbstractSequence[Turn], int]:
    """With the text of a field `system` before them."""
    if is_absent(row.get("system")):
        return turns, num_given
    text = text_of("system", row["system"])
    if turns[0].role in ("system", "developer"):
        raise RowProblem(f"system: {turns[0].place} is a system turn too; keep one of them")
    return [plain_turn("system", "system", text), *turns], num_given + 1 if num_given else 0


def _template_arguments(row: Mapping[str, Any]) -> Mapping[str, Any]:
    value = row.get("chat_template_kwargs")
    if is_absent(value):
        return {}
    if not isinstance(value, dict):
        raise RowProblem(f"chat_template_kwargs: must be an object of variables, not {kind_of(value)}")
    return value


def _check_order(turns: AbstractSequence[Turn]) -> None:
    before = ""
    for index, turn in enumerate(turns):
        expected = _FOLLOWERS[before]
        if ("system" if turn.role == "developer" and not index else turn.role) not in expected:
            raise RowProblem(_out_of_order(turns, index, expected))
        if turn.role == "assistant" and turn.calls:
            before = "assistant with calls"
            continue
        text_of(turn.content_place, turn.content, may_be_empty=turn.role in ("system", "developer", "tool"))
        before = turn.role


def _out_of_order(turns: AbstractSequence[Turn], index: int, expected: tuple[str, ...]) -> str:
    turn = turns[index]
    if turn.role == "tool" and index and turns[index - 1].role == "assistant":
        return (
            f"{turn.role_place}: the result of a call, and the assistant turn before it has none; write the calls as "
            "tool_calls (calls that stand in the text of an answer are not read)"
        )
    if index == 0:
        after = "the first turn"
    elif turns[index - 1].calls:
        after = "the turn after one that calls tools"
    else:
        after = f"the turn after {turns[index - 1].said!r}"
    return f"{turn.role_place}: {after} must be {' or '.join(expected)}, not {turn.said!r}"


def _check_calls(turns: AbstractSequence[Turn], tools: Tools | None) -> None:
    """Raises `RowProblem` for calls of tools that the row does not name, and for results that belong to no call."""
    known = names_of(tools or ())
    for index, turn in enumerate(turns):
        if turn.calls and turn.role != "assistant":
            raise RowProblem(f"{turn.place}: calls tools, and only assistant turns do; its role is {turn.said!r}")
        for number, call in enumerate(turn.calls):
            name = call["function"]["name"]
            if tools is None:
                raise RowProblem(
                    f"{turn.place}: calls {ascii(name)[:60]}, and the row has no tools; write those that could be "
                    "called as tools: [{type: function, function: {name, description, parameters}}]"
                )
            if name not in known:
                shown = ", ".join(ascii(one)[1:-1] for one in known[:8])
                raise RowProblem(
                    f"{turn.place}: call {number} is of {ascii(name)[:60]}, and the row's tools are others ({shown})"
                )
        if turn.calls and index + 1 < len(turns):
            _check_results(turn, turns[index + 1 :])


def _check_results(asking: Turn, after: AbstractSequence[Turn]) -> None:
    """The results behind a turn with calls: by their ids where they have any, else no more than calls."""
    open_ids = [call["id"] for call in asking.calls if "id" in call]
    left = len(asking.calls)
    for turn in after:
        if turn.role != "tool":
            break
        left -= 1
        called = turn.fields.get("tool_call_id")
        if called is not None and open_ids:
            if called not in open_ids:
                raise RowProblem(
                    f"{turn.place}.tool_call_id: {ascii(called)[:60]} is no call of {asking.place} that waits for a "
                    "result"
                )
            open_ids.remove(called)
        elif left < 0:
            raise RowProblem(f"{turn.place}: a further result, and {asking.place} has {len(asking.calls)} calls")

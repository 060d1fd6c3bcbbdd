"""Turns of a conversation, read from the messages of OpenAI's and of ShareGPT's kind.

Both name the same things, `{role, content}` and `{from, value}`, and are read alike under either field. A turn keeps
the names that its row has for it, for messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.data.formats.tools import calls_of
from trainer.data.formats.turn import Turn
from trainer.data.formats.values import RowProblem, is_absent, json_of, kind_of, refuse_surrogates
from trainer.data.row_fields import LOSS_FLAGS, loss_mark, refuse_turn_fields

MAX_TURNS = 100_000
"""Of a conversation: more are a file in the wrong format."""

_ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"),
    "tool": ("tool", "function", "observation", "observations", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
"""What a turn is, by how datasets name it: OpenAI's roles, those of ShareGPT and its descendants (FastChat,
LLaMA-Factory, ms-swift), Gemini's `model`, Llama's `ipython`."""
_BY_NAME = {name: role for role, names in _ROLES.items() for name in names}

_LIST = "a list of {role, content} messages"
_TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
_SPEAKER = re.compile(r"""["'](role|from)["']\s*:\s*["'](\w+)["']""")


def turns_of(name: str, value: Any) -> list[Turn]:
    """The turns of a field, a list of messages or JSON text of one. Raises `RowProblem`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_of(name, value, what=_LIST)
    if not isinstance(value, list):
        raise RowProblem(f"{name}: must be {_LIST}, not {kind_of(value)}")
    if not value:
        raise RowProblem(f"{name}: is empty")
    if len(value) > MAX_TURNS:
        raise RowProblem(f"{name}: has {len(value)} turns, the limit is {MAX_TURNS}; split the conversation")
    return [turn_of(f"{name}[{index}]", message) for index, message in enumerate(value)]


def talk_of(name: str, value: Any) -> Any:
    """The turns that JSON text says, as a column of a CSV file has them; everything else as it is. Raises `RowProblem`
    for turns in Python's notation."""
    return json_of(name, value, what=_LIST) if is_talk(value) else value


def is_talk(value: Any) -> bool:
    """Whether a value is text that is a list of turns written out."""
    return isinstance(value, str) and _TALK.match(value) is not None and _SPEAKER.search(value) is not None


def written_answer(place: str, value: Any) -> Any:
    """An answer as it is, which may be a conversation written out where that is what was asked for. Raises `RowProblem`
    for one that is messages of an assistant alone: their JSON would be learnt."""
    if is_talk(value) and all(
        role_named(found[2]) in ("assistant", "tool", "call") for found in _SPEAKER.finditer(value)
    ):
        raise RowProblem(
            f"{place}: is messages as JSON text, and what they answer is text; write both as messages, or both as text"
        )
    return value


def role_named(said: str) -> str | None:
    """What a role of a dataset is: system, developer, user, assistant, tool, or call, a turn that is one."""
    return _BY_NAME.get(said.lower())


def turn_of(place: str, message: Any) -> Turn:
    """One message. Raises `RowProblem`."""
    if not isinstance(message, dict):
        raise RowProblem(f"{place}: must be an object with role and content, not {kind_of(message)}")
    refuse_surrogates(place, message)
    role_name = "from" if "from" in message and "role" not in message else "role"
    content_name = "value" if "value" in message and "content" not in message else "content"
    said = _said(f"{place}.{role_name}", message, role_name)
    role = role_named(said)
    if role is None:
        known = "system, user, assistant or tool" if role_name == "role" else "system, human, gpt, function_call or "
        known += "" if role_name == "role" else "observation"
        raise RowProblem(f"{place}.{role_name}: unknown role {ascii(said)[:40]}; write {known}")
    rest = {k: v for k, v in message.items() if k not in (role_name, content_name) and v is not None}
    refuse_turn_fields(rest, place=place)
    mark = loss_mark(rest, place=place)
    fields = {k: v for k, v in rest.items() if k not in (*LOSS_FLAGS, "tool_calls", "function_call")}
    content_place = f"{place}.{content_name}"
    content, found = _content(content_place, message, content_name, calls=role == "call")
    for key, text in found.items():
        if not is_absent(fields.get(key)):
            raise RowProblem(f"{content_place}: has {key} too, which {place}.{key} gives; keep one of them")
        fields[key] = text
    if calls := _calls(place, rest, fields.pop("tool_calls", None), content if role == "call" else None, content_place):
        fields["tool_calls"] = calls
    if role == "call":
        role, content = "assistant", ""
    if content is None:
        if not calls:
            missing = "must be text, not null" if content_name in message else "is missing"
            raise RowProblem(f"{content_place}: {missing}")
        content = ""
    return Turn(place, role, content, fields, mark, f"{place}.{role_name}", content_place, said)


def _said(place: str, message: Mapping[str, Any], name: str) -> str:
    if name not in message:
        raise RowProblem(f"{place}: is missing")
    if not isinstance(message[name], str):
        raise RowProblem(f"{place}: must be text, not {kind_of(message[name])}")
    return message[name]


def _calls(place: str, rest: Mapping[str, Any], parts: Any, text: str | None, text_place: str) -> list[dict[str, Any]]:
    """The calls of a turn, which stand in one of four places: tool_calls, OpenAI's older function_call, parts of the
    content, and the text of a turn that is a call as a whole."""
    sources = [
        (f"{place}.tool_calls", rest.get("tool_calls")),
        (f"{place}.function_call", rest.get("function_call")),
        (text_place, parts),
        (text_place, text),
    ]
    given = [(where, value) for where, value in sources if not is_absent(value)]
    if len(given) > 1:
        raise RowProblem(f"{given[0][0]}: {given[1][0]} has calls too; keep one of them")
    return calls_of(*given[0]) if given else []


_PARTS = {
    "text": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "tool_call": "tool_calls",
}
"""What the parts of a content become, by their type: OpenAI's text, and those of LLaMA-Factory's own format."""


def _content(place: str, message: Mapping[str, Any], name: str, *, calls: bool) -> tuple[str | None, dict[str, Any]]:
    """The text of a message, None where there is none, and the fields that other parts of it become."""
    value = message.get(name)
    if value is None:
        return None, {}
    if calls and isinstance(value, (dict, list)):  # of a turn that is a call
        return None, {"tool_calls": value}
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, list):
        raise RowProblem(f"{place}: must be text, not {kind_of(value)}")
    found: dict[str, Any] = {}
    for index, part in enumerate(value):
        kind, text = _part(f"{place}[{index}]", part)
        if kind == "tool_calls":
            found.setdefault(kind, []).append(text)
        else:
            found[kind] = found.get(kind, "") + text
    return found.pop("content", "" if not found.get("tool_calls") else None), found


def _part(place: str, part: Any) -> tuple[str, str]:
    """What a part becomes, and its text."""
    if not isinstance(part, dict):
        raise RowProblem(f"{place}: must be {{type: text, text: ...}}, not {kind_of(part)}")
    kind = part.get("type")
    if kind not in _PARTS:
        raise RowProblem(f"{place}: is of type {ascii(kind)[:40]}, and only text is read; leave such rows out")
    name = "value" if part.get("text") is None and "value" in part else "text"
    if not isinstance(part.get(name), str):
        raise RowProblem(f"{place}.{name}: must be text, not {kind_of(part.get(name))}")
    return _PARTS[kind], part[name]

"""Whether a rendered answer says what its message does: content, reasoning, and each tool call with its arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.data.rendering import HINT
from trainer.data.row_fields import REASONING
from trainer.errors import DataError

_ESCAPE = f"; {HINT}, or leave such rows out"


def check_said(answer: str, message: Mapping[str, Any], name: str) -> None:
    """`answer` is the rendered text of `message`, `name` stands for it in errors.

    Raises `DataError` for a field of the message that is not in the answer and would be lost. Name and arguments of a
    call must be behind those of the calls before it; how they are written is the template's choice.
    """
    for field in ("content", *REASONING):
        value = message.get(field)
        if isinstance(value, str) and value.strip() and _squeezed(value) not in _squeezed(answer):
            beside = " beside tool calls" if message.get("tool_calls") and field == "content" else ""
            raise DataError(
                f"{name}.{field}: the chat template leaves it out of this answer{beside}, which becomes "
                f"{_short(answer)}{_ESCAPE}"
            )
    position = 0
    for index, call in enumerate(message.get("tool_calls") or ()):
        place = f"{name}.tool_calls[{index}]"
        position = _after_call(answer, call.get("function", call), position, place)


def check_tools(text: str, without: str, tools: Iterable[Mapping[str, Any]]) -> None:
    """`text` is a rendered conversation or prompt, `without` the same without tools. Raises `DataError` where a tool is
    not in it: calls of it would refer to nothing."""
    for tool in tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and text.count(name) <= without.count(name):
            raise DataError(f"tools: the chat template does not render the tool {name!r}{_ESCAPE}")


def check_context(text: str, messages: Iterable[Mapping[str, Any]]) -> None:
    """`text` is a rendered conversation or prompt. Raises `DataError` where a system turn, a user turn, a call or the
    result of one is not in it, or only a part: what follows would refer to nothing."""
    position, asked, squeezed = 0, 0, _squeezed(text)
    for index, message in enumerate(messages):
        if message["role"] in ("system", "developer") and _end_in(squeezed, message["content"]) is None:
            raise DataError(f"messages[{index}]: the chat template leaves out the {message['role']} turn{_ESCAPE}")
        if message["role"] == "user":
            end = _end_in(squeezed, message["content"], asked)
            if end is None:
                what = f"leaves out the user turn, or a part of it: {_short(message['content'])}"
                raise DataError(f"messages[{index}]: the chat template {what}{_ESCAPE}")
            asked = end
        if message["role"] == "tool" and not any(writing in text for writing in _writings(message["content"].strip())):
            raise DataError(f"messages[{index}]: the chat template does not render this result of a tool{_ESCAPE}")
        for number, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function", call)
            position = _after_call(text, function, position, f"messages[{index}].tool_calls[{number}]")


def _after_call(answer: str, function: Mapping[str, Any], start: int, place: str) -> int:
    """The end of this call in the answer, looked for from `start` on."""
    ends = [start]
    for what, writings in _pieces(function):
        found = [(answer.find(text, start), len(text)) for text in writings]
        hits = [at + length for at, length in found if at >= 0]
        if not hits:
            raise DataError(
                f"{place}: the chat template does not render {what}; the text becomes {_short(answer)}{_ESCAPE}"
            )
        ends.append(min(hits))
    return max(ends)


def _pieces(function: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(what it is, the ways to write it) of everything a call says."""
    yield f"the name {function['name']!r}", [function["name"]]
    yield from _leaves(function.get("arguments") or {}, "arguments")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"the name of {place}.{key}", _writings(key)
            yield from _leaves(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")
    else:
        yield f"{place}: {value!r}", _writings(value)


def _writings(value: Any) -> list[str]:
    """As it stands, as JSON writes it or a string of JSON inside JSON, or as Python does."""
    if isinstance(value, str):
        escaped = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
        return [value, *escaped, *(json.dumps(text, ensure_ascii=False)[1:-1] for text in escaped)]
    return [json.dumps(value), str(value)]


def _end_in(squeezed: str, content: str, start: int = 0) -> int | None:
    """Where the content ends in a squeezed text, first behind `start`, in one of its writings; None where it is not."""
    for writing in map(_squeezed, _writings(content)):
        at = squeezed.find(writing, start)
        if at >= 0:
            return at + len(writing)
    return None


def _squeezed(text: str) -> str:
    """White space is the template's choice: many trim, and put their own around reasoning."""
    return "".join(text.split())


def _short(answer: str) -> str:
    return repr(answer if len(answer) <= 160 else f"{answer[:80]} ... {answer[-80:]}")

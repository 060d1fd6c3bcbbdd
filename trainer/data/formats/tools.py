"""Tools of a row and calls of them, in the shape that chat templates take (transformers, "Tool use").

tools       [{type: function, function: {name, description, parameters}}]   OpenAI's, also without the outer object
tool_calls  [{type: function, id, function: {name, arguments}}]             arguments as an object or as JSON text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.data.formats.values import RowProblem, is_absent, json_of, kind_of, refuse_surrogates

Tools = tuple[Mapping[str, Any], ...]

_LIST = "a list of tools, {type: function, function: {name, description, parameters}}"
_CALLS = "a list of calls, {type: function, function: {name, arguments}}"


def tools_of(row: Mapping[str, Any]) -> Tools | None:
    """The tools of a row, None where it has none. Raises `RowProblem`."""
    given = [name for name in ("tools", "functions") if not is_absent(row.get(name))]
    if not given:
        return None
    name = given[0]
    value = json_of(name, row[name], what=_LIST)
    if is_absent(value):
        return None
    if not isinstance(value, list):
        raise RowProblem(f"{name}: must be {_LIST}, not {kind_of(value)}")
    refuse_surrogates(name, value)
    return tuple(_tool(f"{name}[{index}]", tool) for index, tool in enumerate(value))


def _tool(place: str, tool: Any) -> Mapping[str, Any]:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        if tool.get("type", "function") != "function":
            raise RowProblem(f"{place}.type: must be function, not {ascii(tool['type'])[:40]}")
        inner, place, tool = tool["function"], f"{place}.function", {"type": "function", **tool}
    else:
        inner, tool = tool, {"type": "function", "function": tool}
    _named(place, inner)
    if not isinstance(inner.get("parameters", {}), dict | None):
        raise RowProblem(f"{place}.parameters: must be a JSON schema, an object, not {kind_of(inner['parameters'])}")
    return tool


def calls_of(place: str, value: Any) -> list[dict[str, Any]]:
    """The calls of an assistant turn: a list of calls or a single one, each also as JSON text or without its outer
    object. Raises `RowProblem`."""
    calls = json_of(place, value, what=_CALLS)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise RowProblem(f"{place}: must be {_CALLS}, not {kind_of(calls) if calls != [] else 'an empty list'}")
    return [_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def _call(place: str, value: Any) -> dict[str, Any]:
    call = json_of(place, value, what="a call, {name, arguments}")
    outer: Mapping[str, Any] = {}
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        if (call.get("type") or "function") != "function":
            raise RowProblem(f"{place}.type: only calls of type function are read, not {ascii(call['type'])[:40]}")
        outer, call, place = call, call["function"], f"{place}.function"
    _named(place, call)
    arguments = call.get("arguments")
    arguments = {} if arguments in (None, "") else json_of(f"{place}.arguments", arguments, what="an object")
    if not isinstance(arguments, dict):
        raise RowProblem(f"{place}.arguments: must be an object or JSON text of one, not {kind_of(arguments)}")
    refuse_surrogates(f"{place}.arguments", arguments)
    called = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    identity = outer.get("id") or call.get("id")
    return called if identity is None else {**called, "id": identity}


def _named(place: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise RowProblem(f"{place}: must be an object with a name, not {kind_of(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        found = "is missing" if "name" not in value else f"must be text, not {kind_of(name) if name != '' else 'empty'}"
        raise RowProblem(f"{place}.name: {found}")
    refuse_surrogates(f"{place}.name", name)


def names_of(tools: Iterable[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]

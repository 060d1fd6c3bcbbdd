"""The process in which chat templates are rendered: one JSON request a line on stdin, one JSON answer a line on stdout.

A chat template is untrusted code. Jinja's sandbox denies it files and modules, but does not bound time and memory
(`10**(10**8)`, nested loops, a string times a million), and Python cannot interrupt such a computation. So it runs in
this process, under limits of the operating system, which end this process alone.

Started as a file by `trainer/data/rendering.py`, with the limits as arguments; imports nothing of ours.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

DATE = datetime.datetime(2024, 7, 26)
"""What templates that print today's date are given, so that a run resumed tomorrow renders the same tokens."""


def main(cpu_s: float, memory_bytes: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # they are for the run, which ends this by closing stdin
    from transformers.utils import chat_template_utils

    _limit_memory(memory_bytes)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        # By the default action of the signal: also inside one long multiplication, where Python runs no handler.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        print(json.dumps(_answer(json.loads(line), state, chat_template_utils)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _answer(request: dict[str, Any], state: dict[str, Any], transformers: Any) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError

    state |= request  # what a request does not name is as in the one before
    try:
        if state["do"] == "list variables":
            return {"names": _variables(state["template"], transformers)}
        (text,), _ = transformers.render_jinja_template(
            conversations=[state["messages"][: state["num_messages"]]],
            tools=state["tools"],
            chat_template=state["template"],
            add_generation_prompt=state["generation_prompt"],
            strftime_now=DATE.strftime,
            **state["variables"],
        )
    except TemplateSyntaxError as error:
        return {"problem": "syntax", "reason": f"line {error.lineno}: {error.message}"[:1000]}
    except MemoryError:
        return {"problem": "memory"}
    except Exception as error:  # noqa: BLE001 -- whatever code of others raises is its refusal
        return {"problem": "refused", "reason": f"{type(error).__name__}: {str(error)[:1000]}"}
    return {"text": text}


def _variables(template: str, transformers: Any) -> list[str]:
    """The variables that may be read before the template itself gives them a value. (jinja2's own list of undeclared
    variables has every name that is set in a branch.)"""
    from jinja2 import nodes

    environment = transformers._compile_jinja_template(template).environment
    tree = environment.parse(template)
    read: set[str] = set()
    _follow(tree, set(environment.globals), read)
    return sorted(read - {macro.name for macro in tree.find_all(nodes.Macro)})  # which call each other in any order


def _follow(node: Any, given: set[str], read: set[str]) -> None:
    """Goes through the node as it is evaluated: `given` are the names that surely have a value, `read` the others."""
    from jinja2 import nodes

    def inside(*parts: Any, also: tuple[str, ...] = ()) -> set[str]:
        own = given | set(also)
        for part in parts:
            _follow(part, own, read)
        return own

    match node:
        case nodes.Name(ctx="load"):
            read |= {node.name} - given
        case nodes.Name():
            given.add(node.name)
        case nodes.Assign():
            _follow(node.node, given, read)
            _follow(node.target, given, read)
        case nodes.AssignBlock():
            inside(*node.body)
            _follow(node.target, given, read)
        case nodes.If():
            _follow(node.test, given, read)
            branches = [inside(*node.body), inside(*node.else_)]
            branches += [inside(branch.test, *branch.body) for branch in node.elif_]
            given |= set.intersection(*branches)
        case nodes.For():
            _follow(node.iter, given, read)
            inside(node.target, *([node.test] if node.test else []), *node.body, also=("loop",))
            inside(*node.else_)
        case nodes.Macro():
            given.add(node.name)
            inside(*node.args, *node.defaults, *node.body, also=("caller", "varargs", "kwargs"))
        case nodes.CallBlock() | nodes.FilterBlock() | nodes.With() | nodes.Scope():
            inside(*node.iter_child_nodes())
        case _:
            for child in node.iter_child_nodes():
                _follow(child, given, read)


def _limit_memory(num_bytes: int) -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: its start needs less than this
        used = 2**30
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + num_bytes if hard == resource.RLIM_INFINITY else min(used + num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))

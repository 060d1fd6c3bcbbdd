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
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory_bytes)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        # By the default action of the signal: also inside one long multiplication, where Python runs no handler.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        print(json.dumps(_answer(json.loads(line), state, render_jinja_template)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _answer(request: dict[str, Any], state: dict[str, Any], render: Any) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError

    state |= request  # what a request does not name is as in the one before
    try:
        (text,), _ = render(
            conversations=[state["messages"][: state["num_messages"]]],
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

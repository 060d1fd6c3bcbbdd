"""Rendering of chat templates with bounded time and memory, in the child process `trainer/data/render_process.py`.

    Template (chat.py) -> RENDERER --- pipe ---> render_process.py: transformers' own rendering, under limits

Each process has one such child, which is started on first use and ends with its parent.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from pathlib import Path
from typing import Any

from trainer.data import render_process
from trainer.errors import ConfigError, DataError, foreign_errors

Messages = AbstractSequence[Mapping[str, Any]]

HINT = "name a template that fits with teacher.chat_template"


class Renderer:
    """A `render_process.py`, started on first use. Safe to use from several threads."""

    def __init__(self, *, cpu_s: float = 20.0, memory_bytes: int = 2**30) -> None:
        """`cpu_s`: processor time of one rendering, for which real templates need milliseconds; `memory_bytes`: address
        space beyond what the process has at its start."""
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._command = [
            sys.executable,
            "-P",
            str(Path(render_process.__file__).resolve()),
            f"{cpu_s}",
            f"{memory_bytes}",
        ]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: dict[str, Any] = {}

    def render(
        self,
        template: str,
        messages: tuple[Mapping[str, Any], ...],
        *,
        variables: Mapping[str, Any],
        num_messages: int,
        generation_prompt: bool,
        tools: AbstractSequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The first `num_messages` rendered as `apply_chat_template` does, given `tools` and further `variables`.

        Raises `ConfigError` for a template that is none or that needs more time or memory than there is, `DataError`
        where it refuses the conversation. What is the same object as in the call before is not sent again.
        """
        request = {
            "do": "render",
            "template": template,
            "variables": variables,
            "messages": messages,
            "num_messages": num_messages,
            "generation_prompt": generation_prompt,
            "tools": tools,
        }
        return self._ask(request)["text"]

    def variables_of(self, template: str) -> frozenset[str]:
        """The names of all variables that a template reads, those that transformers defines for it left out. Raises
        `ConfigError` as `render` does."""
        return frozenset(self._ask({"do": "list variables", "template": template})["names"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            answer = self._attempt(request)
            if answer is None:
                self._refuse_if_limited()
                answer = self._attempt(request)  # ended from outside, as by a system short of memory: once more
            if answer is None:
                self._refuse_if_limited()
                code = self._process.returncode if self._process is not None else None
                raise ConfigError(f"the process that renders the chat template ended with code {code} instead; {HINT}")
        match answer.get("problem"):
            case None:
                return answer
            case "syntax":
                raise ConfigError(f"the chat template is no jinja template: {answer['reason']}; {HINT}")
            case "memory":
                raise self._limited(f"{self._memory_bytes // 2**20} MiB of memory")
        raise DataError(f"the chat template refuses the conversation: {' '.join(answer['reason'].split())}")

    def close(self) -> None:
        """End the process; a later call starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _attempt(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process ended instead."""
        process = self._running()
        changed = {key: value for key, value in request.items() if self._sent.get(key, self) is not value}
        self._sent = dict(request)
        try:
            process.stdin.write(json.dumps(changed, default=str).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            return json.loads(line)
        process.wait()
        return None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._sent = {}
            with foreign_errors("cannot start the process that renders chat templates"):
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the run, which goes on rendering until it has saved
                )
        return self._process

    def _refuse_if_limited(self) -> None:
        if self._process is not None and self._process.returncode == -signal.SIGPROF:
            raise self._limited(f"{self._cpu_s:g} s of processor time")

    def _limited(self, what: str) -> ConfigError:
        return ConfigError(f"the chat template needs more than {what} for one conversation and was ended; {HINT}")


RENDERER = Renderer()
atexit.register(RENDERER.close)

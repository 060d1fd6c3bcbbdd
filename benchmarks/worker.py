"""A process that answers questions one after the other, so that measurements of different programs can take turns.

parent: Worker.start(module, setup) -> ask(question) -> answer ... -> close       frames of pickle over two pipes
child:  module.prepare(setup) -> handler; handler(question) -> answer

Both ends are this program on this machine; a worker's environment is set before it starts, which allocators need.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import DeadlineExceeded, InfrastructureError

ROOT = Path(__file__).resolve().parents[1]
_LENGTH = struct.Struct("<Q")
CLOSE_TIMEOUT_S = 20.0


class Worker:
    """The parent's end."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls, module: str, setup: Any, *, environment: Mapping[str, str], log: Path, timeout_s: float = 600
    ) -> Worker:
        """Returns when the child is prepared. `environment` is laid over this process's own."""
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.worker",
                module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, **environment},
            )
        worker = cls(process, log)
        try:
            await worker.ask(setup, timeout_s=timeout_s)
        except BaseException:
            await worker.close()
            raise
        return worker

    async def ask(self, question: Any, *, timeout_s: float = 1800) -> Any:
        """Raises `InfrastructureError` where the child died, `DeadlineExceeded` where it does not answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        body = pickle.dumps(question)
        try:
            async with asyncio.timeout(timeout_s):
                stdin.write(_LENGTH.pack(len(body)) + body)
                await stdin.drain()
                (length,) = _LENGTH.unpack(await stdout.readexactly(_LENGTH.size))
                return pickle.loads(await stdout.readexactly(length))
        except TimeoutError:
            raise DeadlineExceeded(f"no answer after {timeout_s:.0f} s; its log is {self._log}") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            tail = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise InfrastructureError(f"a worker of the benchmark died: {' '.join(tail)} (log: {self._log})") from None

    async def close(self) -> None:
        """Ends the child: it leaves by itself when its input ends, and is killed where it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def serve(prepare: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The child's end; returns when the parent closes the pipe. What libraries print goes to the log."""
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    handler: Callable[[Any], Any] | None = None
    while (question := _read(questions)) is not None:
        if handler is None:
            handler = prepare(question[0])
            answer = None
        else:
            answer = handler(question[0])
        body = pickle.dumps(answer)
        answers.write(_LENGTH.pack(len(body)) + body)
        answers.flush()


def _read(stream: BinaryIO) -> tuple[Any] | None:
    """One frame in a tuple, since it may be None itself; None at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    return (pickle.loads(stream.read(length)),)


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).prepare)

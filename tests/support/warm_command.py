"""The command `stillhouse` in a process that is forked from one which has imported it: most of a tiny run is imports.

    test  -- folder, arguments, files for its output -->  server  -- fork -->  waits for the command, tells its code
                                                                                  |-- fork -->  the command

The server imports, opens no thread and runs nothing. The command begins where `python -m launch` does, and ends with
the interpreter. As a process reads its environment while it imports, one with other variables than the server's is for
`subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OF_THE_TEST = "PYTEST_CURRENT_TEST"  # which nothing reads


def variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != OF_THE_TEST}


VARIABLES = variables()
"""Those of the session, which no test has changed: the server's."""


class Server:
    """Started with the first command; ends with this process."""

    def __init__(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # a name in no file system
        listener.listen()
        self._address = listener.getsockname()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            env=VARIABLES,
        )
        listener.close()
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def run(self, arguments: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with captured text; at the deadline the command is killed."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(self._address)
                request = json.dumps({"folder": os.getcwd(), "arguments": arguments}).encode()
                socket.send_fds(server, [len(request).to_bytes(8, "big")], [output.fileno(), errors.fileno()])
                server.sendall(request)
                told = server.makefile("r")
                command = int(told.readline())
                server.settimeout(timeout_s)
                try:
                    code = int(told.readline())
                except TimeoutError:
                    os.kill(command, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(list(arguments), timeout_s) from None
            said = []
            for file in (output, errors):
                file.seek(0)
                said.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), code, *said)


@functools.cache
def _server() -> Server:
    return Server()


def run_warm(arguments: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str] | None:
    """None where this process has other variables than its session."""
    return _server().run(arguments, timeout_s=timeout_s) if variables() == VARIABLES else None


def serve(listener: socket.socket) -> None:
    """Returns in a process that has become a command, once for each that is asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        test, _ = listener.accept()
        if os.fork():
            test.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, descriptors = received(test)
        command = os.fork()
        if not command:
            test.close()
            listener.close()
            become(request, descriptors)
            return
        test.sendall(f"{command}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        test.sendall(f"{code}\n".encode())
        os._exit(0)
    os._exit(0)


def received(test: socket.socket) -> tuple[dict, list[int]]:
    size, descriptors, _, _ = socket.recv_fds(test, 8, 2)
    with test.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big"))), descriptors


def become(request: dict, descriptors: Sequence[int]) -> None:
    """The process as `python -m launch` has it."""
    os.chdir(request["folder"])
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.path[0] = request["folder"]
    sys.argv = [str(ROOT / "launch" / "__main__.py"), *request["arguments"]]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from trainer.imports import uncollected

    with uncollected():
        import cluster.engines.hf  # noqa: F401
        import launch.cli
        import launch.label
        import launch.train

    serve(socket.socket(fileno=int(sys.argv[1])))
    launch.cli.main()

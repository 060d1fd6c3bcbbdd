"""A real HTTP server on this machine that takes notes of what is posted to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hook(ThreadingHTTPServer):
    """`answers` is the status of each answer; 0 leaves the asker without one. `posted` is what came, in order."""

    daemon_threads = True

    def __init__(self, answers: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.posted: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.gets = 0
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/T000/secret-path"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append(json.loads(body))
        self.server.paths.append(self.path)
        if not self.server.answers:
            self.server.over.wait(60)
            return
        self.send_response(self.server.answers)
        if self.server.answers == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_GET(self) -> None:
        self.server.gets += 1
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def web_hook(answers: int = 200) -> Iterator[Hook]:
    with Hook(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()

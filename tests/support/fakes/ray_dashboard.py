"""An HTTP server that speaks as much of a Ray dashboard as a client asks before and around a submission."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeDashboard:
    """Answers, and remembers what was asked. `changes`: every request that would start, upload or end something."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.wrong_token_status = 403
        self.ray = importlib.metadata.version("ray")
        self.python = platform.python_version()
        self.jobs: list[dict[str, Any]] = []
        self.logs: dict[str, bytes] = {}
        self.changes: list[str] = []
        self.address = ""
        self.dropped: set[int] = set()  # requests, counted from 1, that get no answer
        self.requests = 0

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes]:
        if self.token is not None and authorization is None:
            return 401, b"Unauthorized: Missing authentication token"
        if self.token is not None and authorization != f"Bearer {self.token}":
            return self.wrong_token_status, b"Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.ray}).encode()
        if path == "/api/v0/cluster_metadata":
            return 200, json.dumps({"data": {"rayVersion": self.ray, "pythonVersion": self.python}}).encode()
        if path == "/api/jobs/":
            return 200, json.dumps(self.jobs).encode()
        if path.startswith("/api/jobs/"):
            found = [job for job in self.jobs if job["submission_id"] == path.rsplit("/", 1)[1]]
            return (200, json.dumps(found[0]).encode()) if found else (404, b"does not exist")
        for name, content in self.logs.items():
            if path.startswith("/api/v0/logs/file") and urllib.parse.quote_plus(name) in path:
                return 200, content
        return 404, b"not found"


@contextlib.contextmanager
def fake_dashboard(certificate: Path | None = None) -> Iterator[FakeDashboard]:
    """On a free port of the loopback; with a certificate (and its key, in one file) behind https."""
    fake = FakeDashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            fake.changes.append(f"POST {self.path}")
            self._reply()

        def do_PUT(self) -> None:
            fake.changes.append(f"PUT {self.path}")
            self._reply()

        def _reply(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.requests += 1
            if fake.requests in fake.dropped:
                self.close_connection = True
                return
            status, content = fake.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.address = f"http://127.0.0.1:{server.server_address[1]}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        fake.address = fake.address.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Servers that are away, broken or silent: the user hears of it in a line, and the run neither ends nor waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from trackers_of import followed, step, wait_for

from launch.report.metrics import MetricsLog
from launch.trackers import reaching, trackers


class Broken(BaseHTTPRequestHandler):
    """Answers 500, or nothing where its server is `silent`."""

    def do_GET(self) -> None:
        if self.server.silent.wait(60):  # type: ignore[attr-defined]
            self.send_response(500)
            self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[ThreadingHTTPServer]:
    """`away` was closed before anybody asked."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    found.daemon_threads = True
    found.silent = threading.Event()  # type: ignore[attr-defined]
    if request.param != "silent":
        found.silent.set()  # type: ignore[attr-defined]
    if request.param == "away":
        found.server_close()
        yield found
        return
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.silent.set()  # type: ignore[attr-defined]
    found.shutdown()
    found.server_close()


def tracker_at(kind: str, url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "write-token-123")
    parameters = {"wandb": {"mode": "online"}, "mlflow": {"tracking_uri": url}, "trackio": {"server_url": url}}
    return {"kind": kind, **parameters[kind]}


@pytest.mark.parametrize(
    ("kind", "server", "said"),
    [
        ("wandb", "away", "cannot be reached: "),
        ("mlflow", "away", "cannot be reached: "),
        ("trackio", "away", "cannot be reached: "),
        ("mlflow", "broken", " answers 500 Internal Server Error"),
        ("wandb", "silent", "cannot be reached: no answer within 5 s"),
    ],
    indirect=["server"],
)
def test_the_run_hears_of_it_once_and_goes_on(
    kind: str, server: ThreadingHTTPServer, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(kind)
    url = f"http://127.0.0.1:{server.server_port}"
    told: list[str] = []
    with followed(tmp_path, tracker_at(kind, url, monkeypatch), told) as (followers, folder):
        log = MetricsLog(folder, rewound=followers.rewound)
        began = time.monotonic()
        log.step(step(1))
        assert time.monotonic() - began < 1
        wait_for(lambda: told)
        log.step(step(2))
        log.close()
        ended = time.monotonic()
    assert time.monotonic() - ended < trackers.CLOSE_S + 2
    first, last = told
    assert first.startswith(f"{kind}: {url}")
    assert said in first
    assert first.endswith("; the run goes on, and what is missing there is sent when that succeeds")
    assert last.endswith("; this run is not there, and is in metrics.jsonl")


def test_a_server_that_asks_who_is_there_is_reached() -> None:
    class Guarded(Broken):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reaching.answers(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()

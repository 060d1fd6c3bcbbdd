"""A run that gets no further: what is written down, what may still be saved, and that its process ends in any case."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Faults
from launch.stall import StallWatch, stall_timeout_s
from launch.stopping import StopRequest
from trainer.errors import DataError, InfrastructureError, Preempted

PATIENCE_S = 1.0


class Watch:
    """What a stall looks at and a stop request speaks to."""

    def __init__(self) -> None:
        self.work = 0
        self.last = {"scorer-0": ("score unit 7/0/0", time.time())}
        self.texts: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.texts.append(fields["text"])


def run(
    file: Path, work: Callable[[Watch, StopRequest], Coroutine[Any, Any, None]], *, can_wait: bool = False
) -> list[tuple[int, str]]:
    """`work` as the main task of a watched run; how its process would have been noted to end."""
    ended: list[tuple[int, str]] = []

    watch = Watch()
    stall = StallWatch(
        watch,
        timeout_s=PATIENCE_S,
        save_s=20.0,
        file=file,
        ended=lambda code, why: ended.append((code, why)),
        tell=lambda code, why: None,
    )

    async def main() -> None:
        stop = StopRequest(watch)
        with stop.on_signals(can_wait=lambda: can_wait), stall.over(stop):
            try:
                await work(watch, stop)
            except asyncio.CancelledError:
                stop.explain()
                raise

    with stall:
        asyncio.run(asyncio.wait_for(main(), 60))
    return ended


async def nobody_comes() -> None:
    await asyncio.get_running_loop().create_future()


def test_a_run_that_waits_for_ever_ends_with_where_everything_waited(tmp_path: Path) -> None:
    async def work(watch: Watch, stop: StopRequest) -> None:
        unit = asyncio.create_task(nobody_comes(), name="unit 7/0/1")
        await unit

    with pytest.raises(InfrastructureError, match=r"nothing was scored.*for 1 s.*stall\.txt") as raised:
        run(tmp_path / "stall.txt", work)
    assert raised.value.exit_code == 4
    text = (tmp_path / "stall.txt").read_text()
    assert "scorer-0: score unit 7/0/0" in text
    assert "unit 7/0/1" in text
    assert "nobody_comes" in text
    assert "threads:\n" in text
    assert "test_stall.py" in text


def test_what_was_trained_is_saved_before_a_stalled_run_ends(tmp_path: Path) -> None:
    async def work(watch: Watch, stop: StopRequest) -> None:
        await stop.requested.wait()
        raise Preempted("stopped after step 12; run the same command again to go on")

    with pytest.raises(InfrastructureError, match="stopped after step 12"):
        run(tmp_path / "stall.txt", work, can_wait=True)


def test_a_run_that_gets_on_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    async def work(watch: Watch, stop: StopRequest) -> None:
        for _ in range(30):
            await asyncio.sleep(PATIENCE_S / 10)
            watch.work += 1

    run(tmp_path / "stall.txt", work)
    assert not (tmp_path / "stall.txt").exists()


def test_another_error_is_told_as_itself(tmp_path: Path) -> None:
    async def work(watch: Watch, stop: StopRequest) -> None:
        raise DataError("train.jsonl:13: no answer")

    with pytest.raises(DataError, match="no answer"):
        run(tmp_path / "stall.txt", work)


def test_a_disk_that_does_not_take_the_dump_does_not_hinder_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(watch: Watch, stop: StopRequest) -> None:
        await nobody_comes()

    with pytest.raises(InfrastructureError):
        run(tmp_path / "gone" / "stall.txt", work)
    assert "nobody_comes" in capsys.readouterr().err


BLOCKED = """
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from launch import stall
from test_stall import Watch
from launch.stopping import StopRequest

stall.TAKEN_UP_S = stall.CLOSE_S = 1.0
folder = Path(sys.argv[2])

def blocks_the_loop():
    time.sleep(600)

async def does_not_end():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

async def gets_on(watch):
    for _ in range(60):
        await asyncio.sleep(0.1)
        watch.work += 1

watch = Watch()
ended = lambda code, why: (folder / "ended.txt").write_text(f"{code} {why}")
tell = lambda code, why: (folder / "told.txt").write_text(f"{code} {why}")
watched = stall.StallWatch(watch, timeout_s=3.0, save_s=1.0, file=folder / "stall.txt", ended=ended, tell=tell)

async def main():
    stop = StopRequest(watch)
    with stop.on_signals(can_wait=lambda: True), watched.over(stop):
        print("ready", flush=True)
        if sys.argv[3] == "blocked":
            blocks_the_loop()
        elif sys.argv[3] == "deaf":
            await does_not_end()
        elif sys.argv[3] == "leaves a thread":
            asyncio.get_running_loop().run_in_executor(None, blocks_the_loop)
        else:
            await gets_on(watch)

with watched:
    asyncio.run(main())
"""


def started(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BLOCKED, str(Path(__file__).parent), str(folder), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("how", "where"), [("blocked", "blocks_the_loop"), ("deaf", "does_not_end")])
def test_the_process_ends_with_4_also_where_its_own_loop_does_not_come_back(
    tmp_path: Path, how: str, where: str
) -> None:
    process = started(tmp_path, how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert "nothing was scored, trained or saved for 3 s" in said
    assert where in (tmp_path / "stall.txt").read_text()
    assert (tmp_path / "ended.txt").read_text().startswith("4 nothing was scored")
    assert (tmp_path / "told.txt").read_text() == (tmp_path / "ended.txt").read_text()


def test_a_thread_that_is_left_behind_does_not_keep_the_process(tmp_path: Path) -> None:
    process = started(tmp_path, "leaves a thread")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert (tmp_path / "ended.txt").read_text().startswith("4 the run was over, and threads")


def test_a_process_that_was_stopped_for_longer_did_not_stall(tmp_path: Path) -> None:
    process = started(tmp_path, "gets on")
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert not (tmp_path / "stall.txt").exists()


def test_by_default_every_other_deadline_comes_first() -> None:
    assert stall_timeout_s(Faults(), start_timeout_s=700) == 600 + 700 + 1800 + 5 * 300
    assert stall_timeout_s(Faults(stall_timeout_s=20), start_timeout_s=700) == 20

"""What `benchmarks memory` sees of processes: whose they are, how much they have, and the most of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.memory import RAY, Peaks, look, pss

HOLD = "import sys; held = b'x' * 40_000_000; print('up', file=sys.stderr, flush=True); sys.stdin.read()"


def test_a_process_is_known_by_the_log_that_it_writes_to(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    files = [tmp_path / "logs" / "student-1.log", tmp_path / "logs" / "code.scorer-0.log", tmp_path / "other.txt"]
    streams = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen([sys.executable, "-c", HOLD], stdout=file.open("w"), **streams) for file in files]
    for child in children:
        assert child.stderr.readline() == b"up\n"
    seen = look(os.getpid())
    found = {role: size for (role, pid), size in seen.items() if pid in {child.pid for child in children}}
    for child in children:
        child.communicate()
    assert found.keys() == {"student", "code.scorer", RAY}
    assert all(40e6 < size < 80e6 for size in found.values())
    assert seen["controller", os.getpid()] == max(seen.values())


def test_the_proportional_size_is_at_most_what_is_resident() -> None:
    assert 0 < pss(os.getpid()) <= 1.05 * psutil.Process().memory_info().rss


def test_peaks_are_of_processes_of_ray_as_a_whole_and_of_one_moment() -> None:
    peaks = Peaks()
    peaks.add({("student", 1): 10, ("student", 2): 30, (RAY, 3): 5, (RAY, 4): 5})
    peaks.add({("student", 1): 20, (RAY, 3): 8})
    assert (peaks.of("student"), peaks.of(RAY), peaks.of("scorer")) == (30, 10, None)
    assert peaks.together == 50

"""The heap of a process that never shrinks by itself gives pages back now and then."""

import subprocess
import sys

PROGRAM = """
import os, time
import numpy as np
from trainer.heap import Trimmer

def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

trimmer = Trimmer(every_s={every_s})
pieces = [np.ones(2**17) for _ in range(200)]  # 1 MiB each
last = np.ones(2**17)  # lies above them, so that the heap cannot shrink from its top
full = resident_mb()
del pieces
time.sleep(0.02)
trimmer.look()
print(full - resident_mb())
"""
NEVER_SHRINKS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def given_back_mb(*, every_s: float, environment: dict[str, str]) -> float:
    program = PROGRAM.format(every_s=every_s)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_holes_of_a_heap_that_never_shrinks_are_given_back_when_it_is_time() -> None:
    assert given_back_mb(every_s=0.01, environment=NEVER_SHRINKS) > 180


def test_and_not_before() -> None:
    assert given_back_mb(every_s=60.0, environment=NEVER_SHRINKS) < 20


def test_a_heap_that_shrinks_by_itself_is_left_alone() -> None:
    assert given_back_mb(every_s=0.01, environment={"MALLOC_MMAP_MAX_": "0"}) < 20

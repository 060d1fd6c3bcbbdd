"""Real student ranks for tests: one process per rank over gloo, running the cases of a module one after another.

Starting a process costs more than most cases, so a test file starts its ranks once, in a fixture, and each of its tests
looks at the result of one case.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from trainer.imports import absent, uncollected

SUPPORT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Place:
    """What a case is told: its rank, and a folder that all ranks share."""

    rank: int
    world: int
    folder: Path


def run_cases(cases: str, *, world: int, folder: Path, timeout_s: float = 240.0) -> list[dict[str, Any]]:
    """Per rank, what each function `case_*(place)` of the module `cases` returned. Ends all ranks when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_start(cases, rank, world, port, folder) for rank in range(world)]
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    bad = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    if bad:
        logs = "\n".join(f"--- rank {rank}\n{(folder / f'rank-{rank}.log').read_text()[-4000:]}" for rank in bad)
        raise AssertionError(f"ranks {bad} of {world} failed in {cases}:\n{logs}")
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(world)]


def _start(cases: str, rank: int, world: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed tensors go back to the system, so that memory can be measured
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.log", "wb") as log:
        command = [sys.executable, __file__, cases, str(rank), str(world), str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _main(cases: str, rank: int, world: int, folder: Path) -> None:
    # A process joins one group in its life; the ranks that cases build one after another find it joined.
    distributed.init_process_group("gloo")
    with absent("mlflow"), uncollected():  # as in a rank of a run
        module = importlib.import_module(cases)
    place = Place(rank, world, folder)
    results = {}
    for name, case in list(vars(module).items()):
        if name.startswith("case_"):
            started = time.monotonic()
            results[name.removeprefix("case_")] = case(place)
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # a case may have broken the process group, and leaving it in order would then hang


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

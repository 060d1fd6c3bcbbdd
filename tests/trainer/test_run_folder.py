"""The run folder: who holds it, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.report.environment import _processor, manifest_environment
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder, append_lines, read_json, read_lines, write_json


def test_a_new_run_folder_belongs_to_its_user_alone(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "one")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert RunFolder.create(folder.path) == folder


def test_a_path_that_cannot_be_a_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        RunFolder.create(tmp_path / "file" / "run")


def test_a_second_run_on_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    second = (
        "import sys; from pathlib import Path\n"
        "from trainer.run_folder import RunFolder; from trainer.errors import ConfigError\n"
        "try:\n"
        f"    with RunFolder(Path({str(folder.path)!r})).lock(): print('locked')\n"
        "except ConfigError as error: print(error)\n"
    )

    def attempt() -> str:
        done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    with folder.lock():
        said = attempt()
        assert f"in use by pid {os.getpid()} on host {socket.gethostname()} since " in said
    assert attempt().strip() == "locked"


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    killed = (
        "import os, signal; from pathlib import Path; from trainer.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(folder.path)!r})).lock(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], timeout=60, check=False)
    assert done.returncode < 0
    with folder.lock():
        pass


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_json_holds_numpy_paths_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"n": np.float32(0.5), "rows": np.arange(2), "p": Path("a/b"), "bad": float("nan"), 3: (1, 2)})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"n": 0.5, "rows": [0, 1], "p": "a/b", "bad": None, "3": [1, 2]}


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(read_lines(path)) == [{"a": 1}, {"a": 2}]
    with append_lines(path) as file:
        file.write('{"a": 3}\n')
    assert list(read_lines(path)) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_broken_line_in_the_middle_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    told: list[str] = []
    assert list(read_lines(path, tell=told.append)) == [{"a": 1}, {"a": 2}]
    assert [problem.split(" ")[0] for problem in told] == [f"{path}:2:"]


def test_the_environment_names_versions_and_processor(tmp_path: Path) -> None:
    found = manifest_environment()
    assert found["versions"]["torch"].startswith("2.")
    assert found["hardware"]["memory_bytes"] > 0
    json.dumps(found)
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Fast 9000\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    assert _processor(info) == ("Fast 9000", ["amx_bf16", "avx512f", "avx2"])

"""The command and the system it runs on: whatever the streams and the disk are, one message, and no traceback but for a
defect."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import app, run_app
from launch.process import DEFECT, DISK_ERRORS, PATH_ERRORS, system_errors
from trainer.errors import ConfigError, InfrastructureError

LONG = "x" * 300


def shell(script: str, *, cwd: Path, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`stillhouse` in a shell script, as $STILLHOUSE."""
    command = f"{sys.executable} -m launch"
    root = str(Path(__file__).resolve().parents[2])
    given = {**os.environ, "STILLHOUSE": command, "PYTHONPATH": root, **environment}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, timeout=timeout_s, env=given, cwd=cwd, check=False
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    given = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"report {LONG}", "File name too long"),
        (f"status {LONG}", "too long; a name has at most 255 bytes"),
        ("status '~nosuchuser/x'", "there is no user 'nosuchuser' here"),
        (f"config show {LONG}.yaml", "File name too long"),
        ("config show run.yaml/x", "Not a directory"),
        ("config show /dev/zero", "more than 128 KiB"),
        ("list --to local --target-file /dev/zero", "more than 128 KiB"),
        (f"list --to local --target-file {LONG}", "File name too long"),
        (f"export run {LONG}", ""),
        (f"fetch x --into {LONG}", "no job was submitted"),
        ("report /dev/zero", "is no run folder"),
    ],
    ids=lambda value: value[:24],
)
def test_a_path_that_cannot_be_used_is_one_message(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: x\n")
    monkeypatch.setattr(sys, "argv", ["stillhouse", *shlex.split(command)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith("error: ")
    assert said in errors
    assert len(errors) < 2000


def test_a_reader_that_leaves_ends_the_output_quietly(tmp_path: Path) -> None:
    done = shell("set -o pipefail; $STILLHOUSE config schema | head -1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"{\n"
    assert done.stderr == b""
    later = "import sys; sys.argv[1:] = ['--version']; from launch.cli import main\nimport os; os.close(1)\nmain()"
    assert python(later).stderr == ""


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(closed: str, tmp_path: Path) -> None:
    commands = ("--version", "config show gone.yaml")
    done = shell("; ".join(f"$STILLHOUSE {command} {closed}; echo $?" for command in commands), cwd=tmp_path)
    assert [line for line in done.stdout.split() if line.isdigit()] == [b"0", b"2"]
    assert b"Traceback" not in done.stderr


def test_a_full_disk_behind_the_output_is_told(tmp_path: Path) -> None:
    done = shell("$STILLHOUSE config schema > /dev/full", cwd=tmp_path)
    assert done.returncode == InfrastructureError.exit_code
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_gets_its_number(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: é漢\n", encoding="utf-8")
    script = "$STILLHOUSE config show run.yaml; $STILLHOUSE config show é漢.yaml"
    done = shell(script, cwd=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C")
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"error: ") == 2
    expected = b"\\u6f22" if encoding == "latin-1" else "\u6f22".encode()  # typer writes UTF-8 where ASCII is said
    assert expected in done.stderr


def test_an_error_that_nobody_foresaw_shows_its_traceback_without_secrets_and_whose_turn_it_is() -> None:
    code = (
        "import sys, typer; from launch.cli import run_app\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def fail(): raise KeyError('planted-token-01')\n"
        "sys.argv = ['x']; run_app(app)\n"
    )
    done = python(code, SERVICE_TOKEN="planted-token-01")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == DEFECT
    assert "planted-token-01" not in done.stderr
    assert "KeyError: '***'" in done.stderr


BUSY_THREAD = """
import sys, threading, time, torch
{before}
def work():
    rows = torch.ones(64, 64)
    while True: torch.cat([rows, rows], dim=-2)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("said")
{end}
"""


def test_a_thread_that_is_inside_native_code_does_not_change_the_exit_code() -> None:
    for code in (0, 5):
        mended = BUSY_THREAD.format(
            before="from launch.process import ProcessEnd\nend = ProcessEnd()",
            end=f"with end.noted(): sys.exit({code})",
        )
        for _ in range(3):
            done = python(mended)
            assert (done.returncode, done.stdout) == (code, "said\n"), done.stderr


def test_without_a_code_python_ends_the_process_and_exit_handlers_run_before() -> None:
    before = (
        "import atexit, sys\nfrom launch.process import ProcessEnd\nend = ProcessEnd()\natexit.register(print, 'bye')\n"
    )
    assert [python(before + f"with end.noted(): {last}").returncode for last in ("sys.exit('x')", "1 / 0")] == [1, 1]
    done = python(before + "with end.noted(): sys.exit()")
    assert (done.returncode, done.stdout) == (0, "bye\n")
    full = python(before + "sys.stdout = open('/dev/full', 'w')\nprint('lost')\nwith end.noted(): sys.exit(0)")
    assert (full.returncode, "No space left" in full.stderr) == (120, True), full.stderr


def test_what_the_system_says_about_a_file_has_an_exit_code_and_the_rest_passes() -> None:
    for number, kind in [*((n, InfrastructureError) for n in DISK_ERRORS), *((n, ConfigError) for n in PATH_ERRORS)]:
        with pytest.raises(kind, match="/some/place"), system_errors():
            raise OSError(number, os.strerror(number), "/some/place")
    for error in (OSError(errno.ECONNREFUSED, "refused"), OSError("of a library"), ValueError("x"), ConfigError("y")):
        with pytest.raises(type(error)) as raised, system_errors():
            raise error
        assert raised.value is error

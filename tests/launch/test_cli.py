"""The command as a person meets it: help without waiting, errors without tracebacks, exit codes that mean something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from launch import cli, log_level
from launch.cli import app
from trainer import build
from trainer.errors import ConfigError, DataError, Diverged, InfrastructureError, Preempted, StillhouseError

HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "deepspeed", "numpy", "pandas", "matplotlib")


def run(*arguments: str, python: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `python` runs before it and sees nothing of it, `after` runs after it."""
    code = f"import sys\n{python}\nfrom launch.cli import main\nsys.argv[1:] = {list(arguments)!r}\n"
    code += f"try: main()\nfinally: {after or 'pass'}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def _all_helps() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("--version",), ("--help",)]
    for name, command in get_command(app).commands.items():
        found.append((name, "--help"))
        found += [(name, inner, "--help") for inner in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("arguments", _all_helps(), ids=" ".join)
def test_help_and_version_answer_without_importing_anything_heavy(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, after=f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert len(result.stdout.splitlines()) > 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "CONFIG"),
        (["train", "x.yaml", "--sett", "a=b"], "--set"),
        (["prune", "a", "b"], "--keep-layers"),
    ],
)
def test_a_mistyped_command_line_is_answered_with_exit_code_2(arguments: list[str], part: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "check", "config show"])
def test_a_wrong_configuration_is_one_message_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: x\nseed: no\n")
    after = f"print([m for m in {HEAVY!r} if m in sys.modules])"
    result = run(*command.split(), str(file), "--set", "training.steps=0", after=after, NO_COLOR="1")
    assert result.returncode == 2
    assert result.stdout == "[]\n"
    assert result.stderr.startswith(f"error: {file}: 5 problems\n")
    assert f"{file}:2: seed = 'no'" in result.stderr
    assert "--set training.steps=0: training.steps = 0" in result.stderr
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_the_traceback_is_there_for_who_asks() -> None:
    assert "Traceback" in run("config", "show", "missing.yaml", STILLHOUSE_TRACEBACK="1").stderr


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, 2), (DataError, 3), (InfrastructureError, 4), (Diverged, 5), (Preempted, 75)]
)
def test_an_error_meant_for_a_person_gives_its_text_and_exit_code(
    kind: type[StillhouseError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        raise kind("the teacher left")

    monkeypatch.setattr(sys, "argv", ["stillhouse"])
    with pytest.raises(SystemExit) as ended:
        cli.run_app(failing)
    assert ended.value.code == code
    heading = "" if kind is Preempted else "error: "  # who asked for a stop, and got it, made no mistake
    assert capsys.readouterr().err == f"{heading}the teacher left\n"


def test_an_error_that_repeats_a_secret_of_the_environment_is_shown_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        raise ConfigError("GET https://me:hunter2@example.org refused 'Bearer planted-token-01'")

    monkeypatch.setattr(sys, "argv", ["stillhouse"])
    monkeypatch.setenv("SERVICE_TOKEN", "planted-token-01")
    with pytest.raises(SystemExit):
        cli.run_app(failing)
    assert capsys.readouterr().err == "error: GET https://***@example.org refused 'Bearer ***'\n"


def test_control_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "never.yaml"
    os.mkfifo(pipe)
    code = f"import sys; from launch.cli import main; sys.argv[1:] = ['config', 'show', {str(pipe)!r}]; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with pipe.open("w"):  # opens once the command reads, and gives it nothing
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_the_shown_configuration_loads_back(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: x\nstudent: {model: {path: a}}\nteacher: {model: {path: b}}\nprompts: {path: c}\n"
        "labels: topk\ntraining: {steps: 3}\n"
    )
    shown = run("config", "show", str(file), "--set", "training.steps=4")
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "again.yaml").write_text(shown.stdout)
    assert run("config", "show", str(tmp_path / "again.yaml")).stdout == shown.stdout

    lines = run("config", "show", str(file), "--set", "labels.k=4", "--origins").stdout.splitlines()
    assert f'labels.kind = "topk"    # {file}:5' in lines
    assert "labels.k = 4    # --set labels.k=4" in lines
    assert "labels.temperature = 1.0    # default" in lines
    assert f"training.steps = 3    # {file}:6" in lines


def test_the_schema_is_json() -> None:
    assert "training" in json.loads(run("config", "schema").stdout)["properties"]


@pytest.mark.parametrize("name", ["configs", "trainer", "cluster"])
@pytest.mark.parametrize("init", [True, False])
def test_somebody_elses_package_of_our_name_is_refused(name: str, init: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thing.py").write_text("")
    if init:
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    result = run("--version", python=f"sys.path.insert(0, {str(tmp_path)!r})")
    if init:
        assert result.returncode == 2
        assert f"another package named '{name}': {tmp_path / name} comes before" in result.stderr
        assert "PYTHONPATH" in result.stderr
        assert "Traceback" not in result.stderr
    else:  # a folder without __init__.py never wins over a package
        assert result.returncode == 0, result.stderr


def test_commands_and_roles_mean_the_same_variable() -> None:
    assert log_level.LOG_LEVEL == build.LOG_LEVEL


def test_a_log_level_that_is_none_is_refused_with_those_that_are() -> None:
    result = run("check", "run.yaml", STILLHOUSE_LOG_LEVEL="loud")
    assert result.returncode == 2
    assert "'loud' is not one of 'debug', 'info', 'warning', 'error'" in result.stderr

"""`python -m benchmarks`: every command can be called, and says what it does not know."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from benchmarks.__main__ import app


def test_every_command_has_its_help() -> None:
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert {"distil", "memory", "losses"} <= {*names}
    for name in names:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, f"{name}: {result.output}{result.exception}"


def test_labels_that_the_pipeline_has_not_are_refused_with_those_it_has(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["distil", "--teacher", str(tmp_path), "--labels", "topk", "--labels", "dense"])
    assert result.exit_code == 2
    assert "'dense' is none of topk, hidden, given_ids" in " ".join(result.output.split())

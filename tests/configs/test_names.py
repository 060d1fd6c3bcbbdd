"""No value that becomes part of a path can lead out of the folder it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run, run_folder

ESCAPES = [
    "../other",
    "..",
    "/etc",
    "a/b",
    "a/../../b",
    ".hidden",
    "-rf",
    "a\\nb",
    "a b",
    "a\\0b",
    "x" * 81,
    "",
    "~",
    "a\\\\b",
]


def written(folder: Path, **names: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(
        f'name: "{names.get("run", "x")}"\nstudent: {{model: {{path: a}}}}\nprompts: {{path: c}}\n'
        f'teacher: {{name: "{names.get("teacher", "t")}", model: {{path: b}}}}\ntraining: {{steps: 3}}\n'
    )
    return file


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("of", ["run", "teacher"])
def test_a_name_that_would_leave_its_folder_is_refused(tmp_path: Path, of: str, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        load_run(written(tmp_path, **{of: name}))


@pytest.mark.parametrize("name", ["a", "demo-2", "v1.0_final", "0", "a..b"])
def test_a_plain_name_gives_a_folder_below_runs(tmp_path: Path, name: str) -> None:
    folder = run_folder(load_run(written(tmp_path, run=name)).run)
    assert folder.resolve().parent == Path("runs").resolve()

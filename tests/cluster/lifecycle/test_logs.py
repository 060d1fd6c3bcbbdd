"""A node must see the run folder that the controller sees; a role's output goes there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.lifecycle.logs import MARK, START, SharedFolder, last_words
from trainer.errors import ConfigError


def test_the_same_folder_passes_and_keeps_nothing_but_the_mark(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    folder.check()
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_a_node_without_the_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    elsewhere = SharedFolder(tmp_path / "not-mounted", folder.mark)
    with pytest.raises(ConfigError, match=r"cannot read the run folder .*not-mounted.*share"):
        elsewhere.check()


def test_another_folder_at_the_same_path_is_refused(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    SharedFolder.of(tmp_path)
    with pytest.raises(ConfigError, match="another folder"):
        folder.check()


def test_output_of_the_process_and_of_its_children_is_appended_to_the_log(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from cluster.lifecycle.logs import SharedFolder, redirect_output;"
        f"redirect_output(SharedFolder(Path({str(tmp_path)!r}), {folder.mark!r}), 'scorer-0');"
        "print('from python', flush=True); os.system('echo from a child 1>&2')"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True)
    lines = (tmp_path / "logs" / "scorer-0.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith(START)] == ["from python", "from a child"] * 2
    assert len(lines) == 6


def test_the_first_error_of_the_newest_process_is_its_last_word(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    assert last_words(folder, "scorer-0").after("no answer") == "no answer"
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "scorer-0.log"
    older = f"{START} yesterday\nValueError: an older mistake\n"
    newer = [
        f"{START} today",
        "loading",
        "ERROR Traceback (most recent call last):",
        "ERROR torch.OutOfMemoryError: tried to allocate 20 GiB",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    log.write_text(older + "\n".join(newer) + "\n")
    text = last_words(folder, "scorer-0").after("no answer after 600 s")
    assert text.startswith("torch.OutOfMemoryError: tried to allocate 20 GiB\n  (no answer after 600 s)\n")
    assert str(log) in text
    assert text.endswith(newer[-1])
    assert "older" not in text


def test_a_silent_process_leaves_its_last_lines(tmp_path: Path) -> None:
    folder = SharedFolder.of(tmp_path)
    (tmp_path / "logs").mkdir()
    lines = [f"line {i}" for i in range(50)]
    (tmp_path / "logs" / "scorer-0.log").write_text("\n".join([f"{START} today", *lines]))
    text = last_words(folder, "scorer-0").after("no answer")
    assert text.startswith("no answer\n  last lines of ")
    assert text.endswith("line 48\n    line 49")
    assert "line 10" not in text

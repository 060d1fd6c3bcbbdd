"""What a target that starts nodes of its own asks of a run before it sends anything."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Run
from trainer.errors import ConfigError


def refuse_in_process(run: Run, kind: str) -> None:
    """Raises `ConfigError` for a run that is one process and could use no node."""
    if run.runtime == "in_process":
        raise ConfigError(
            f"runtime: in_process is one process, and --to {kind} starts nodes for it: write runtime: ray"
        )


def paths_outside(run: Run, mount: str) -> list[str]:
    """Absolute model paths that are not below `mount`. Raises `ConfigError` where the run folder is not."""
    root = Path(mount)
    assert run.folder is not None
    if not run.folder.is_relative_to(root):
        raise ConfigError(
            f"folder: the run folder {run.folder} is not on what the nodes share, which they have at {mount}: write "
            f"--set folder={root / 'runs' / run.name}"
        )
    paths = [run.teacher.model.path, run.student.model.path]
    return [path for path in paths if path.startswith("/") and not Path(path).is_relative_to(root)]

"""Where the output of a role's process goes: one file per role under the run folder, engine output included."""

from __future__ import annotations

import os
from pathlib import Path

MAX_BYTES = 64 * 2**20


def redirect_output(log: Path) -> None:
    """Append standard output and error of this process, C libraries and children included, to `log`.

    A log over MAX_BYTES is first moved to `<log>.1`, so a run that restarts often keeps two files per role.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_BYTES:
        os.replace(log, log.with_name(log.name + ".1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)

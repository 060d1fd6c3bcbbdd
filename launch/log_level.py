"""`--log-level`: how much of a run its terminal shows, and how much the logs of its roles hold of their libraries."""

from __future__ import annotations

import os
from enum import StrEnum

LOG_LEVEL = "STILLHOUSE_LOG_LEVEL"
"""As `trainer/build.py` says it to the processes of a run: the command has this before it imports anything."""


class LogLevel(StrEnum):
    """From all to little."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"

    def shows(self, level: LogLevel) -> bool:
        """Whether what is of `level` is printed."""
        order = list(LogLevel)
        return order.index(self) <= order.index(level)


def set_log_level(level: LogLevel | None) -> None:
    """For this process and those that it starts. None, and nothing in the environment: as if it were `info`."""
    if level is not None:
        os.environ[LOG_LEVEL] = level.value


def log_level() -> LogLevel:
    """As the command line or the environment says."""
    known = {level.value: level for level in LogLevel}
    return known.get(os.environ.get(LOG_LEVEL, "").lower(), LogLevel.info)

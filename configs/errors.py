"""The root of all errors meant for a person, and the one that configuration raises. A file here because `configs` is
the lowest layer; `trainer/errors.py` offers these two together with all others."""

from __future__ import annotations


class StillhouseError(Exception):
    """An error meant for a person: its text is shown without a traceback. `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(StillhouseError):
    """The configuration, a model folder or the machine does not allow the run; nothing was started."""

    exit_code = 2

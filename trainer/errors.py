"""The errors that cross station borders. Each says what is wrong, the value, and what to do; none carries a cause
that another process cannot unpickle."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from configs.errors import ConfigError as ConfigError
from configs.errors import StillhouseError as StillhouseError
from configs.errors import foreign_errors as foreign_errors
from configs.errors import reason_of as reason_of
from configs.errors import without_controls as without_controls


class Defect(StillhouseError):
    """Code of ours or of a plug-in is wrong; the message holds the traceback of the process that it broke."""

    exit_code = 1


class WrongKey(ConfigError):
    """A value inside a section of the configuration: the message begins with its key, dotted, below that section."""


class DataError(StillhouseError):
    """A dataset row is wrong, or too many rows were rejected."""

    exit_code = 3


class BadRow(DataError):
    """One row that cannot be used: `origin` is "file:line" or "dataset[row N]", `reason` names the field."""

    def __init__(self, origin: str, reason: str, preview: str = "") -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason
        self.preview = preview

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return (type(self), (self.origin, self.reason, self.preview))


class TooLong(BadRow):
    """A row that `data.on_too_long` decides about; `reason` says the length, the limit and the choices."""


class InfrastructureError(StillhouseError):
    """Something the run needs died, hangs or does not become ready, and the retry budget is used up."""

    exit_code = 4


class SelfTestError(InfrastructureError):
    """A start-up self-test failed on this machine; the message holds its numbers."""


class SyncError(InfrastructureError):
    """An engine that writes does not compute what the student does; the message holds both numbers."""


class Diverged(StillhouseError):
    """Too many steps with a non-finite loss or gradient; the last good checkpoint is kept."""

    exit_code = 5


class Preempted(StillhouseError):
    """The run was asked to stop and saved a checkpoint first: run the same command again."""

    exit_code = 75


class UnitRejected(DataError):
    """No replica can score a unit or answer a prompt (too long, bad token id, non-finite labels)."""


class DeadlineExceeded(InfrastructureError):
    """A call did not finish in its time."""


class EngineDead(InfrastructureError):
    """The engine of one replica broke; every later call to it fails too. Restart its process."""


class InsufficientResources(InfrastructureError):
    """No node has the resources for what has to be placed, and the time to wait for one is over."""


class TeachersLost(InfrastructureError):
    """No teacher replica is left, or units failed too often."""


class StudentsLost(InfrastructureError):
    """A student rank died or hangs: the whole group has to be restarted."""


class LabelsLost(InfrastructureError):
    """Blocks of labels can no longer be read (their node is gone): score these units again."""

    def __init__(self, unit_ids: AbstractSequence[str]) -> None:
        super().__init__(f"the labels of {len(unit_ids)} unit(s) are lost: {', '.join(unit_ids)}")
        self.unit_ids = tuple(unit_ids)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return (LabelsLost, (self.unit_ids,))

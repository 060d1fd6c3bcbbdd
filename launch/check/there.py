"""Where a run will be: on this machine, or on nodes of which this machine sees little."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.placement.memory.verdict import Offer
from configs.models import ModelSource

UNSEEN = "not checked"
"""The status of what only the nodes can tell; a run asks them at its start."""


@dataclass(frozen=True, slots=True)
class There:
    """`elsewhere`: on other machines, whose packages, disks and folders are not those of this one."""

    elsewhere: bool = False
    offer: Offer | None = None  # what the run may use there, as far as it is known

    def sees(self, source: ModelSource) -> bool:
        """Whether the files of a model can be looked at from here; of the hub everybody can."""
        path = Path(source.path).expanduser()
        return not self.elsewhere or path.exists() or not path.is_absolute()


HERE = There()

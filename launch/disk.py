"""The disk space that a run needs, and whether it is free. Leaves nothing on the disk."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from cluster.preflight.finding import Finding
from cluster.preflight.machine import disk, size_text
from configs.schema import Run
from launch.model_folder import ModelFacts
from trainer.run_folder import RunFolder

CHECKPOINT_BYTES_PER_PARAMETER = 16
"""Of a trained parameter: itself, its float32 copy and two moments of Adam, rounded up to float32 throughout."""


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """An upper bound of what lies in a run folder at once: kept checkpoints, the one being written, the student."""

    checkpoint_bytes: int
    num_checkpoints: int
    student_bytes: int

    @classmethod
    def of(cls, run: Run, student: ModelFacts) -> DiskNeed:
        whole = student.num_parameters + student.num_adapter_parameters
        return cls(student.num_trained * CHECKPOINT_BYTES_PER_PARAMETER, run.training.keep_checkpoints, 4 * whole)

    @property
    def num_bytes(self) -> int:
        return self.checkpoint_bytes * (self.num_checkpoints + 1) + self.student_bytes

    def bytes_to_come(self, folder: Path) -> int:
        """Without what lies there already: the checkpoints and the student of an earlier start are replaced."""
        return max(0, self.num_bytes - replaced_bytes(folder))

    def look(self, folder: Path) -> Finding:
        """Whether the disk of the folder is large enough."""
        to_come = self.bytes_to_come(folder)
        there = f", {size_text(to_come)} more than is there" if to_come < self.num_bytes else ""
        return disk("disk", folder, to_come, f"{self}{there}")

    def __str__(self) -> str:
        kept = f"{self.num_checkpoints} checkpoint{'s' if self.num_checkpoints > 1 else ''}"
        return f"{size_text(self.num_bytes)} at most, for {kept}, one being written and the exported student"


def replaced_bytes(folder: Path) -> int:
    """On the disk, of what an earlier start of the run wrote and this one writes anew. Logs and whatever else lies in
    the folder stay, and links are no files of the run."""
    written = RunFolder(folder)
    places = [*written.checkpoints.glob("step_*"), written.student]
    files = [file for place in places if not place.is_symlink() for file in place.rglob("*")]
    return sum(found.st_blocks * 512 for file in files if stat.S_ISREG((found := file.lstat()).st_mode))

"""The disk space that a run needs, and whether it is free. Leaves nothing on the disk."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Run
from launch.model_folder import ModelFacts
from trainer.errors import ConfigError
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
        trained = student.num_adapter_parameters or student.num_parameters
        whole = student.num_parameters + student.num_adapter_parameters
        return cls(trained * CHECKPOINT_BYTES_PER_PARAMETER, run.training.keep_checkpoints, 4 * whole)

    @property
    def num_bytes(self) -> int:
        return self.checkpoint_bytes * (self.num_checkpoints + 1) + self.student_bytes

    def bytes_to_come(self, folder: Path) -> int:
        """Without what lies there already: the checkpoints and the student of an earlier start are replaced."""
        return max(0, self.num_bytes - replaced_bytes(folder))

    def check(self, folder: Path) -> None:
        """Raises `ConfigError` where the disk of the folder is too small."""
        free, to_come = free_bytes(folder), self.bytes_to_come(folder)
        if free < to_come:
            there = f", {size_text(to_come)} more than is there" if to_come < self.num_bytes else ""
            raise ConfigError(
                f"folder: {existing(folder)} has {size_text(free)} free, the run needs {self}{there}; free some, name "
                "another folder, or lower training.keep_checkpoints"
            )

    def __str__(self) -> str:
        kept = f"{self.num_checkpoints} checkpoint{'s' if self.num_checkpoints > 1 else ''}"
        return f"{size_text(self.num_bytes)} at most, for {kept}, one being written and the exported student"


def free_bytes(folder: Path) -> int:
    """Free on the disk of a run folder."""
    return shutil.disk_usage(existing(folder)).free


def replaced_bytes(folder: Path) -> int:
    """On the disk, of what an earlier start of the run wrote and this one writes anew. Logs and whatever else lies in
    the folder stay, and links are no files of the run."""
    written = RunFolder(folder)
    places = [*written.checkpoints.glob("step_*"), written.student]
    files = [file for place in places if not place.is_symlink() for file in place.rglob("*")]
    return sum(found.st_blocks * 512 for file in files if stat.S_ISREG((found := file.lstat()).st_mode))


def check_writable(folder: Path) -> None:
    """Raises `ConfigError` where the folder cannot be written or made. Makes nothing: a refused run leaves no trace."""
    place = existing(folder)
    if not place.is_dir():
        raise ConfigError(f"folder: {place} is a file, so {folder} cannot be a folder; name another one")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"folder: cannot write in {place}: {error.strerror or error}; name another folder") from None


def existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    absolute = folder.absolute()
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))


def size_text(num_bytes: int) -> str:
    """`1.5 GB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"

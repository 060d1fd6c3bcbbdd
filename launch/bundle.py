"""The bundle: everything of a run that has to travel to where it will be executed, in one folder.

    <folder>/  run.yaml              the resolved run, its paths as they are valid there
               code/                 this installation of Stillhouse: four packages and their dist-info
               stillhouse-*.whl      the same as a wheel, for images that install it
               prompts/              rows and templates that are files here

A job starts in that folder with PYTHONPATH=<folder>/code and needs neither pip nor a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.schema import Run

COMMAND = ("-m", "launch", "train", "run.yaml")
"""What a job executes with its Python, in the bundle's folder."""


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of the bundle; `path` is relative to its folder, with slashes."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A made bundle."""

    folder: Path
    run: Run  # as it will be there
    build: str  # `trainer.build.build_hash()` of the code
    files: tuple[BundleFile, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the whole upload."""
        return sum(file.num_bytes for file in self.files)

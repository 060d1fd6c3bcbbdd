"""The label store: a folder where labels are kept for the next epoch, the next run and the next start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from configs.paths import expand_home
from configs.section import Bytes, Section


class Store(Section):
    """Labels that were made once are read from there, whichever run made them (docs/label-store.md)."""

    path: Path = Field(description="A folder of its own; several runs may share it, and on a shared disk hosts.")
    max_bytes: Bytes = Field(64 * 2**30, description="Of all files in it: what is made beyond that is not kept.")
    mode: Literal["read_write", "read_only", "only"] = Field(
        "read_write",
        description="read_write: labels that are not there are made and kept; read_only: made and not kept; only: no "
        "teacher is started, and all labels must be there (stillhouse label).",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _says_a_folder(cls, path: object) -> object:
        if isinstance(path, str) and not path.strip():
            raise ValueError("is empty: name a folder of its own, such as labels")
        return path

    @field_validator("path")
    @classmethod
    def _home_is_a_folder(cls, path: Path) -> Path:
        return expand_home(path)

"""Prompts: where the input comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from configs.section import Positive, Section, with_known_home


class Dataset(Section):
    """One source of rows, read by `datasets`."""

    path: str = Field(min_length=1, description="jsonl, json, parquet or arrow file, a folder of them, or a hub name.")
    revision: str | None = None
    split: str = "train"
    format: Literal["auto", "messages", "prompt_completion", "prompt", "preference", "text"] = Field(
        "auto",
        description="auto: told by each row's own fields, and the same for all rows. prompt: answers are not read. "
        "preference: prompt, chosen and rejected, for terms that compare answers.",
    )
    max_rows: Positive | None = Field(None, description="Read only the first rows.")

    @field_validator("path")
    @classmethod
    def _path_has_a_home(cls, path: str) -> str:
        return with_known_home(path)

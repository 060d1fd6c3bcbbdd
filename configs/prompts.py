"""Prompts: where the input comes from, and how rows become token sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from configs.paths import with_known_home
from configs.refusal import refusal
from configs.section import Positive, Section


class Dataset(Section):
    """One source of rows, read by `datasets`."""

    path: str = Field(min_length=1, description="jsonl, json, parquet or arrow file, a folder of them, or a hub name.")
    revision: str | None = Field(None, description="Of a dataset on the hub: branch, tag or commit.")
    split: str = Field("train", description="Which part of a dataset that has several.")
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


def with_answers(held_out: Dataset | None) -> Dataset | None:
    """Raises the refusal of held-out rows whose format leaves answers unread."""
    if held_out is not None and held_out.format == "prompt":
        raise refusal(("format",), "prompt", "held-out rows need answers: name another format")
    return held_out


class Data(Section):
    """Rows and how they become token sequences."""

    evaluation: Dataset | None = Field(None, description="Held-out rows with answers; scored once, at start.")
    max_length: Positive = Field(2048, description="Tokens of prompt and answer together.")
    on_too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="drop: left out and counted; truncate: the beginning is kept."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip: counted and listed in rejected.jsonl.")
    special_tokens_in_text: Literal["warn", "allow", "escape", "error"] = Field(
        "warn",
        description="Strings such as </s> in a row's text. warn, allow: they become control tokens, and check tells or "
        "does not; escape: they are read as plain text; error: the row is bad.",
    )
    shuffle: bool = Field(True, description="Another order in each epoch, from the seed; false: as the rows lie.")

    @field_validator("evaluation")
    @classmethod
    def _evaluation_has_answers(cls, rows: Dataset | None) -> Dataset | None:
        return with_answers(rows)

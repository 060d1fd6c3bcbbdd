"""Prompts: where the input comes from, and how rows become token sequences."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from configs.paths import is_url, with_known_home
from configs.refusal import did_you_mean, refusal
from configs.section import Positive, Section

_BORDER = r"-?(?:\d{1,15}|\d{1,2}%|100%)"
_PART = re.compile(rf"([\w.-]+)(\[(?:{_BORDER})?:(?:{_BORDER})?\])?")
_SHOWN_PATHS = 3

Place = Annotated[str, Field(min_length=1)]

RowFormat = Literal[
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "dolly",
    "query_response",
    "question_answer",
    "prompt",
    "preference",
    "candidates",
    "text",
]

COLUMNS = (
    *(
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "candidates",
        "scores",
        "text",
        "system",
        "tools",
        "history",
    ),
    *("instruction", "input", "output", "context", "query", "response", "question", "answer"),
    *("weight", "chat_template_kwargs"),
)
"""The fields of a row that are read."""


class Dataset(Section):
    """One source of rows."""

    path: Place | Annotated[tuple[Place, ...], Field(min_length=1)] = Field(
        description="File (jsonl, json, csv, tsv, parquet, arrow), folder, pattern (data/*.jsonl), URL or hub name, "
        "or a list of these."
    )
    revision: str | None = Field(None, description="Of a dataset on the hub: branch, tag or commit.")
    split: str = Field(
        "train",
        description="A split of a dataset that has several, a slice of one (train[:90%]), or a sum of them.",
    )
    streaming: bool = Field(
        False, description="Read while the run trains, for what does not fit a disk: jsonl, csv, tsv and parquet."
    )
    format: Literal["auto"] | RowFormat = Field(
        "auto",
        description="auto: told by each row's own fields, and the same for all rows. prompt: answers are not read. "
        "preference: two answers to compare; candidates: several. docs/data.md shows a row of each.",
    )
    columns: dict[str, str] = Field(
        {},
        description="A field that is read: the name that it has in the rows, {prompt: question, completion: answer}; "
        "data.question is the field question inside data.",
    )
    max_rows: Positive | None = Field(None, description="Read only the first rows.")
    loss_on: Literal["all", "last"] = Field(
        "all", description="Which assistant turns of a conversation are learnt; last: its last one alone."
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="Put before each conversation that has no system turn of its own."
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """As they are written, `~` included; of `file://` the path."""
        paths = (self.path,) if isinstance(self.path, str) else self.path or ()
        return tuple(path.removeprefix("file://") for path in paths)

    @property
    def name(self) -> str:
        """All paths, for messages; a long list is cut."""
        more = f" and {len(self.paths) - _SHOWN_PATHS} more" if len(self.paths) > _SHOWN_PATHS else ""
        return ", ".join(self.paths[:_SHOWN_PATHS]) + more

    @property
    def split_parts(self) -> tuple[tuple[str, str], ...]:
        """(name, slice in brackets or nothing) of each part that is added up."""
        return tuple((name, part or "") for name, part in _PART.findall(self.split))

    @field_validator("path")
    @classmethod
    def _paths_can_be_looked_for(cls, path: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for one in (path,) if isinstance(path, str) else path or ():
            if not is_url(one):
                with_known_home(one)
        return path

    @field_validator("split")
    @classmethod
    def _split_is_readable(cls, split: str) -> str:
        if not all(_PART.fullmatch(part) for part in split.split("+")):
            raise ValueError(
                "is no split: write a name (train), rows of one (train[:1000], train[200:300]), percent of one "
                "(train[:90%], train[-5%:]), or several joined by + (train[:80%]+train[90%:])"
            )
        return split

    @model_validator(mode="after")
    def _stream_is_whole(self) -> Dataset:
        """A stream has no length before its end."""
        if self.streaming and "[" in self.split:
            raise refusal(("split",), self.split, "a stream has no known length to slice: name a whole split")
        if self.streaming and self.max_rows is not None:
            raise refusal(("max_rows",), self.max_rows, "a stream is read as far as the run trains: remove max_rows")
        return self

    @field_validator("columns")
    @classmethod
    def _columns_are_read(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours, theirs in columns.items():
            if ours not in COLUMNS:
                text = f"is no field that is read{did_you_mean(ours, COLUMNS)} (there are: {', '.join(COLUMNS)})"
                raise refusal((ours,), theirs, text)
            if not theirs.strip():
                raise refusal((ours,), theirs, "name the field of the rows that it is read from")
        return columns


class HeldOutRows(Dataset):
    """Rows with answers to measure the student on: a dataset of their own, or a fraction of those of `prompts`."""

    path: Place | Annotated[tuple[Place, ...], Field(min_length=1)] | None = Field(
        None, description="As in prompts; None: a fraction of those is held out."
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of the rows of prompts, drawn by the seed and left out of training."
    )

    @property
    def name(self) -> str:
        """All paths, or the fraction, for messages."""
        return super().name if self.fraction is None else f"{self.fraction:g} of the training rows"

    @model_validator(mode="after")
    def _is_a_dataset_or_a_fraction(self) -> HeldOutRows:
        if self.path is None and self.fraction is None:
            text = "'path' is missing: name the held-out rows, or write fraction: 0.05 to hold out some of prompts"
            raise refusal(("path",), None, text)
        fields = type(self).model_fields.items()
        given = [name for name, field in fields if name != "fraction" and getattr(self, name) != field.default]
        if self.streaming:
            raise refusal(("streaming",), True, "held-out rows are read once and kept: remove streaming")
        if self.fraction is not None and given:
            text = f"a fraction takes rows of prompts, as they are read there: remove {given[0]}, or fraction"
            raise refusal((given[0],), getattr(self, given[0]), text)
        if self.format == "prompt":
            raise refusal(("format",), "prompt", "held-out rows need answers: name another format")
        return self


class Data(Section):
    """Rows and how they become token sequences."""

    evaluation: HeldOutRows | None = Field(None, description="Held-out rows with answers; scored once, at start.")
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

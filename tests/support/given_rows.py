"""Rows written to a file and read as a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.prompts import Dataset
from trainer.data.row import Row
from trainer.data.rows import Rows
from trainer.errors import BadRow


def rows_of(folder: Path, *rows: object, **options: object) -> Rows:
    """These rows as a dataset: a line each of folder/rows.jsonl."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Rows.open(Dataset(path=str(path), **options))


def row_of(folder: Path, row: object, *, needs_answer: bool = True, **options: object) -> Row:
    return rows_of(folder, row, **options).read(0, needs_answer=needs_answer)


def problem_of(folder: Path, row: object, *, needs_answer: bool = True, **options: object) -> str:
    """What is wrong with a row, without its place in the file."""
    with pytest.raises(BadRow) as caught:
        row_of(folder, row, needs_answer=needs_answer, **options)
    return caught.value.reason

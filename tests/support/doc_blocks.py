"""The fenced blocks of a document, with the convention of `tests/test_docs.py` for what is not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = re.compile(r"<!-- not run here: \S.{9,} -->")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    not_run: bool

    @property
    def commands(self) -> list[str]:
        """Without what follows a # that begins a word."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        marked = start > 0 and NOT_RUN.fullmatch(lines[start - 1]) is not None
        yield Block(page, start + 1, lines[start][3:], "\n".join(lines[start + 1 : number]) + "\n", marked)
        start = None
    assert start is None, f"{page.name}:{start}: the block has no end"

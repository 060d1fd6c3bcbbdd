"""Rows of the demo's format as the token ids of their conversations, and where their answers begin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def answered(file: Path, tokenizer: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """(token_ids int64 [T], the first row that predicts a token of the answer) of each row of JSON lines that has
    `prompt` and `completion`, lists of messages; rows without a completion are left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("completion"):
            asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
            yield torch.tensor(ids), len(asked) - 1

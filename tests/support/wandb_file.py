"""What a `.wandb` file holds: records of wandb's own protocol in the log format of LevelDB.

The library has no public reader. The format is described in leveldb/doc/log_format.md; the header of the file is
wandb's: 4 bytes ":W&B", a 16-bit magic number, a byte of version.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, IDENT = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Any]:
    """`wandb_internal_pb2.Record`s in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _chunks(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        yield record


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of the history, with `_step`."""
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            rows.append({key: json.loads(value) for key, value in items} | {"_step": record.history.step.num})
    return rows


def _chunks(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, parts = IDENT, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:  # the rest of a block that was never written
            at += left
            continue
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""

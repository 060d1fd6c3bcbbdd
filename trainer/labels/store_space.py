"""Which labels are the same: the space they belong to, and the key of a sequence inside it.

Labels are a function of the teacher, of how it computes, of the encoding and of the tokens. The first three make a
*space*, a folder of the store; the tokens and the rows that are asked for make the key.

    in the space      what the files of the teacher hold (weights, config, code), engine kind, dtype, what overrides the
                      model's configuration, tokenizer, V, the encoding's parameters (temperature among them), the
                      version of its code, the layout of its columns
    left out          what changes labels by rounding alone: batch sizes, tensor parallelism, device, release of vLLM

A parameter that an encoding got later is not in the spaces of before: at its default it makes the labels that there
were without it, and these are read on. All parameters are written out in a space, so that another default is others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from configs.labels import Labels
from trainer.labels.encoding import TeacherShape, load_encoding
from trainer.types import Sequence, hash_tokens


@dataclass(frozen=True)
class LabelSpace:
    """Everything beside its tokens that decides the labels of a sequence; all of it can be written as JSON."""

    fields: Mapping[str, Any]
    at_default: frozenset[str] = frozenset()  # parameters of the encoding that are

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    @cached_property
    def text(self) -> str:
        return json.dumps(self.fields, sort_keys=True, indent=1, ensure_ascii=False)

    @classmethod
    def of(cls, teacher: Mapping[str, Any], labels: Labels, shape: TeacherShape) -> LabelSpace:
        """`teacher`: what is to be told of its files and its engine."""
        columns = load_encoding(labels).layout(shape)
        layout = [
            [column.name, str(column.dtype).removeprefix("torch."), column.width, column.counts] for column in columns
        ]
        flat = labels.flat()
        encoding = {**flat, "code_version": type(labels).code_version}
        at_default = flat.keys() - labels.model_dump(mode="json", exclude_defaults=True).keys()
        return cls({"teacher": dict(teacher), "encoding": encoding, "layout": layout}, frozenset(at_default))

    def includes(self, older: LabelSpace) -> bool:
        """Whether the labels of a space, perhaps made when the encoding had fewer parameters, are those of this one."""
        mine, theirs = json.loads(self.text), json.loads(older.text)
        known = theirs.get("encoding")
        if isinstance(known, dict) and "encoding" in mine:
            mine["encoding"] = {
                name: value for name, value in mine["encoding"].items() if name in known or name not in self.at_default
            }
        return mine == theirs

    def difference(self, other: LabelSpace) -> list[str]:
        """What is not the same, as `name: here, there`."""
        mine, theirs = dict(_flat("", self.fields)), dict(_flat("", other.fields))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [f"{name}: {mine.get(name)}, not {theirs.get(name)}" for name in names]


def _flat(place: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield place, value
        return
    for name, inner in value.items():
        yield from _flat(f"{place}.{name}" if place else str(name), inner)


def key_of(sequence: Sequence) -> bytes:
    """16 bytes of its tokens and of the rows that are asked for."""
    return bytes.fromhex(hash_tokens((sequence,)))

"""Plain values as YAML that a person reads: block style, in the order given, with a comment above a key where there is
something to say. For the files that launch targets send."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

STEP, DASH = 2, 2


@dataclass(frozen=True, slots=True)
class Note:
    """A value, and the comment that stands above its key."""

    text: str
    value: Any


def dump(*documents: Mapping[str, Any], header: str = "") -> str:
    """Mappings, with `Note`s for values, as one file; lines of `header` become comments at its top."""
    yaml = YAML()
    yaml.indent(mapping=STEP, sequence=STEP + DASH, offset=DASH)
    yaml.width = 1000
    parts = []
    for document in documents:
        text = io.StringIO()
        yaml.dump(_block(document, 0), text)
        parts.append(text.getvalue())
    top = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return top + "---\n".join(parts)


def _block(value: Any, column: int) -> Any:
    if isinstance(value, Mapping):
        block = CommentedMap()
        for key, item in value.items():
            inside = item.value if isinstance(item, Note) else item
            block[key] = _block(inside, column + STEP)
            if isinstance(item, Note):
                block.yaml_set_comment_before_after_key(key, before=item.text, indent=column)
        return block
    if isinstance(value, Sequence) and not isinstance(value, str):
        return CommentedSeq([_block(item, column + STEP) for item in value])
    if isinstance(value, str):
        if "\n" in value:
            return LiteralScalarString(value)
        return DoubleQuotedScalarString(value) if _misread(value) else value
    return value


def _misread(text: str) -> bool:
    """Whether some reader of YAML 1.1, as Kubernetes' is, would not take the bare text for text."""
    words = {"", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"}
    return text.lower() in words or text[0] in "0123456789.+-"

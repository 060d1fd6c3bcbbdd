"""Marks in the text of rows that stand for a picture, a sound or a film: `<image>` of LLaVA and LLaMA-Factory,
`<img>ADDRESS</img>` of Qwen, `![](data:image/png;base64,...)` of Markdown.

Fields that hold media are refused (`row_fields.py`). A mark alone may be meant as it stands, since HTML has elements of
these names, so it is told and not refused.
"""

from __future__ import annotations

import re

from trainer.data.row import Row, texts_of

_KINDS = r"(?:image|img|video|audio)"
_MARKS = re.compile(
    rf"<\|?{_KINDS}(?:[ _]?\d+|_?placeholder)?\|?>(?!\s*<source)"  # of HTML, <video> alone holds <source>s
    rf"|\[{_KINDS}\]"
    r"|data:(?:image|video|audio)/[\w.+-]+;base64,",
    re.IGNORECASE,
)
_SHOWN = 60


def media_mark_in(row: Row) -> str | None:
    """The first such mark in the text of a row, as "field: 'text from there on'"."""
    for field, text in texts_of(row):
        if found := _MARKS.search(text):
            return f"{field}: {text[found.start() : found.start() + _SHOWN]!r}"
    return None

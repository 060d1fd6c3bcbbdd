"""Answers that hit the token limit end with a whole sentence."""

from __future__ import annotations

import pytest
from write_answers import whole_sentences


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two is. 3", "One. Two is."),
        ("A list:\n1. First thing.\n2. Second thi", "A list:\n1. First thing."),
        ('He said "hi." And then 3.5 is', 'He said "hi."'),
        ("line one\nline tw", "line one"),
        ("no end at all", "no end at all"),
        ("1. fo", "1. fo"),
    ],
)
def test_cut_text_ends_with_its_last_whole_sentence_or_line(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept

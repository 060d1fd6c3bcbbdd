"""Marks in text that stand for pictures, sound and films."""

from __future__ import annotations

import pytest

from trainer.data.media import media_mark_in
from trainer.data.row import ChatRow, CorpusRow, TextRow


@pytest.mark.parametrize(
    "mark",
    [
        "<image>",
        "<image 1>",
        "<image_2>",
        "<|image_1|>",
        "<|image|>",
        "<image_placeholder>",
        "<video>",
        "<audio>",
        "<img>http://example.org/still.png</img>",
        "<audio>still.wav</audio>",
        "[IMG]",
        "![a still](data:image/png;base64,iVBORw0KGgo=)",
    ],
)
def test_a_mark_is_found_with_its_place(mark: str) -> None:
    asked = {"role": "user", "content": f"What drips here?\n{mark}"}
    found = media_mark_in(ChatRow(({"role": "system", "content": "Look."}, asked), loss_from=1))
    assert found is not None
    assert found.startswith("messages[1].content: ")
    assert media_mark_in(TextRow(f"{mark} is", " a still")).startswith("prompt: ")


@pytest.mark.parametrize(
    "text",
    [
        "the image of a still",
        '<img src="still.png">',
        '<image href="still.svg" width="3"/>',
        '<video controls>\n<source src="a.mp4"></video>',
        "<video>\n  <source src='a.mp4'></video>",
        "x[image_index] and [1]",
        "data: image/png",
        "a < image > b",
    ],
)
def test_html_and_prose_are_no_marks(text: str) -> None:
    assert media_mark_in(CorpusRow(text)) is None

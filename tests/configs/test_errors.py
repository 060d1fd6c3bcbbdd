"""The border to other libraries: any of their exceptions becomes one message, and nothing of ours does."""

from __future__ import annotations

import asyncio

import pytest

from configs.errors import ConfigError, StillhouseError, foreign_errors, without_controls


class PanicException(BaseException):
    """As pyo3 raises it out of Rust code."""


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ValueError("the header is too large"), "cannot read it: the header is too large; write another"),
        (KeyError("shape"), "cannot read it: KeyError: 'shape'; write another"),
        (StopIteration(), "cannot read it: StopIteration; write another"),
        (PanicException("index out of bounds"), "cannot read it: PanicException: index out of bounds; write another"),
        (OSError("two\nlines of \x1b[31mred\x1b[0m"), "cannot read it: two lines of red; write another"),
    ],
)
def test_whatever_a_library_raises_becomes_one_line(cause: BaseException, said: str) -> None:
    with pytest.raises(ConfigError) as caught, foreign_errors("cannot read it", hint="write another"):
        raise cause
    assert str(caught.value) == said
    assert caught.value.__cause__ is cause


def test_a_long_reason_is_cut() -> None:
    with pytest.raises(ConfigError) as caught, foreign_errors("cannot read it"):
        raise ValueError("word " * 1000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("passing", [StillhouseError("ours"), KeyboardInterrupt(), asyncio.CancelledError()])
def test_ours_interrupts_and_cancellations_pass(passing: BaseException) -> None:
    with pytest.raises(type(passing)) as caught, foreign_errors("cannot read it"):
        raise passing
    assert caught.value is passing


def test_a_terminal_is_not_told_what_to_do_by_text_from_elsewhere() -> None:
    hostile = "a\x1b]0;title\x07b\x1b]52;c;AAAA\x1b\\c\x1b[2J\x1b[31md\x9b5me\rf\x08g\x1bc\n\tgrün 中文"
    assert without_controls(hostile) == "abcd5mefgc\n\tgrün 中文"

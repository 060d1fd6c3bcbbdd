"""Which rows are held out of a dataset, and by what two rows are told to ask the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from given_rows import rows_of

from trainer.data.prompt_keys import PromptKeys, held_out_of, keys_of, prompt_key
from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, TextRow


def chat(question: str, answer: str = "The still.") -> ChatRow:
    return ChatRow(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), 0)


def turns(*last: str) -> ChatRow:
    """A conversation of two questions, of which the last is given with or without its answer."""
    return ChatRow((*chat("a").messages, *chat(*last).messages), 0)


def keys(*prompts: int, unanswered: tuple[int, ...] = ()) -> PromptKeys:
    answered = np.array([row not in unanswered for row in range(len(prompts))])
    return PromptKeys(np.array(prompts, dtype=np.uint64), answered)


@pytest.mark.parametrize(
    ("row", "other", "same"),
    [
        (chat("What  drips?"), chat("what drips?\n", "Nothing."), True),
        (chat("What drips?"), chat("Who drips?"), False),
        (chat("What drips?"), TextRow("what drips?", " The still."), True),
        (TextRow("a", "b"), TextRow("a", None), True),
        (CorpusRow("plain Text"), CorpusRow("plain text "), True),
        (CorpusRow("plain text"), CorpusRow("plain texts"), False),
        (PreferenceRow(TextRow("a", "b"), TextRow("a", "c")), TextRow("A", "d"), True),
        (turns("b"), chat("a"), False),
        (turns("b"), turns("b", "c"), True),
    ],
)  # fmt: skip
def test_two_rows_ask_the_same_where_all_before_the_last_answer_is_the_same(row, other, same: bool) -> None:
    assert (prompt_key(row) == prompt_key(other)) is same


def test_a_fraction_is_exact_and_another_one_for_each_seed() -> None:
    distinct = keys(*range(1, 1001))
    for fraction, number in ((0.05, 50), (0.5, 500), (0.001, 1), (0.999, 999), (0.0004, 0)):
        assert held_out_of(distinct, fraction, seed=0).sum() == number
    one, other = (held_out_of(distinct, 0.1, seed=seed) for seed in (1, 2))
    assert 0 < (one & other).sum() < 40, "by chance 10 of 100"
    assert np.array_equal(one, held_out_of(distinct, 0.1, seed=1))
    assert np.all(held_out_of(distinct, 0.2, seed=1)[one]), "more rows are the same ones and others"


def test_which_rows_are_held_out_does_not_depend_on_their_order() -> None:
    prompts = np.random.default_rng(0).integers(1, 2**63, 200).astype(np.uint64)
    shuffled = np.random.default_rng(1).permutation(200)
    held = held_out_of(keys(*prompts), 0.1, seed=5)
    again = held_out_of(keys(*prompts[shuffled]), 0.1, seed=5)
    assert set(prompts[held]) == set(prompts[shuffled][again])


@pytest.mark.parametrize("seed", range(20))
def test_rows_with_one_prompt_are_never_on_both_sides(seed: int) -> None:
    prompts = np.random.default_rng(seed).integers(1, 40, 300)
    held = held_out_of(keys(*prompts), 0.1, seed=seed)
    assert not set(prompts[held]) & set(prompts[~held])
    assert 22 <= held.sum() <= 30


def test_rows_without_answers_or_that_cannot_be_read_are_not_held_out(tmp_path: Path) -> None:
    held = held_out_of(keys(1, 1, 2, 3, 4, unanswered=(0, 3)), 0.9, seed=0)
    assert held.tolist() == [False, False, True, False, True], "a question without one of its answers stays whole"
    rows = rows_of(tmp_path, {"prompt": "a", "completion": " b"}, {"prompt": "a"}, {"prompt": 3}, {"text": "c"})
    found = keys_of(rows)
    assert found.answered.tolist() == [True, False, False, False]
    assert found.keys[0] == found.keys[1] != 0
    assert found.keys[2:].tolist() == [0, 0]

"""Weights of teachers that rows say: read where they are of these teachers, else a bad row with what to write."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.teacher_weights import weights_of

NAMES = ("big", "code")


@pytest.mark.parametrize("value", [{"big": 3, "code": 0.5}, '{"big": 3, "code": 0.5}'])
def test_a_mapping_or_its_json_text_says_the_weights(value: Any) -> None:
    assert weights_of(value, NAMES) == {"big": 3.0, "code": 0.5}


def test_a_teacher_that_is_absent_or_null_has_none() -> None:
    assert weights_of({"code": 1, "big": None}, NAMES) == {"big": 0.0, "code": 1.0} == weights_of({"code": 1}, NAMES)


BAD = {
    "is missing; write": None,
    "is 0.5; write": 0.5,
    "is 'half'; write": "half",
    "'cod' is no teacher of the ensemble": {"big": 1, "cod": 1},
    "the weight of big is -1, no number from 0": {"big": -1, "code": 1},
    "the weight of big is True": {"big": True},
    "the weight of big is nan": {"big": float("nan"), "code": 1},
    "the weight of big is '1'": {"big": "1"},
    "every weight is 0": {"big": 0, "code": 0.0},
}


@pytest.mark.parametrize(("words", "value"), BAD.items())
def test_anything_else_says_what_to_write(words: str, value: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        weights_of(value, NAMES)
    assert str(caught.value).endswith('write {"big": 1, "code": 1}')

"""What engines refuse, and how packed rows become a block and a report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from label_oracle import VOCABULARY, random_given_ids, random_unit
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from cluster.engines.units import check_given, check_request, check_unit, count_non_finite, label_block, with_given
from configs.labels import GivenIds, Labels, TopK
from trainer.errors import EngineDead, UnitRejected
from trainer.labels.encoding import Column
from trainer.types import GenerationRequest, RowIds, Sampling, Unit, tokens_to_read

UNIT = random_unit("0:0", (20, [(3, 9), (12, 19)]), (8, []), (10, [(0, 4)]))
LAYOUT = (Column("x", torch.float32, 2),)


def refuse(unit: Unit, match: str, max_length: int = 64) -> None:
    with pytest.raises(UnitRejected, match=match):
        check_unit(unit, vocabulary_size=VOCABULARY, max_length=max_length)


def test_a_good_unit_passes() -> None:
    check_unit(UNIT, vocabulary_size=VOCABULARY, max_length=20)


def test_a_sequence_longer_than_the_engine_reads_is_refused() -> None:
    refuse(UNIT, r"sequence 0:0/0 has 20 tokens, this engine reads 1 to 19", max_length=19)


def test_an_id_of_the_padding_is_refused() -> None:
    ids = UNIT.sequences[2].token_ids.copy()
    ids[7] = VOCABULARY  # has a row in the embedding of every padded model
    bad = replace(UNIT, sequences=(replace(UNIT.sequences[2], token_ids=ids),))
    refuse(bad, f"token id {VOCABULARY} at 7 is outside the vocabulary of {VOCABULARY}")


def test_a_loss_row_after_the_last_token_is_refused() -> None:
    mask = np.ones(8, dtype=bool)
    refuse(replace(UNIT, sequences=(replace(UNIT.sequences[1], loss_mask=mask),)), "the last False")


def test_a_unit_without_loss_rows_is_refused() -> None:
    refuse(replace(UNIT, sequences=UNIT.sequences[1:2]), "no row")


GIVEN, ENCODING = random_given_ids(UNIT, 6), GivenIds(k=5)


def test_ids_of_every_row_pass_and_are_cut_by_sequence() -> None:
    check_given(UNIT, GIVEN, encoding=ENCODING, vocabulary_size=VOCABULARY)
    check_given(UNIT, None, encoding=TopK(), vocabulary_size=VOCABULARY)
    (first, of_first), (last, of_last) = with_given(UNIT, GIVEN)
    assert (first.id, last.id) == ("0:0/0", "0:0/2")
    assert np.array_equal(of_first, GIVEN.ids[:13])
    assert np.array_equal(of_last, GIVEN.ids[13:])


def changed(row: int, *ids: int) -> RowIds:
    wrong = GIVEN.ids.copy()
    wrong[row, : len(ids)] = ids
    return replace(GIVEN, ids=wrong)


@pytest.mark.parametrize(
    ("given", "encoding", "match"),
    [
        (None, ENCODING, "labels: given_ids needs ids of each row, the request holds None"),
        (GIVEN, TopK(), "labels: topk takes no ids"),
        (GIVEN, GivenIds(k=6), r"its given ids are int32 \[17, 6\], needed are int \[17, 7\]"),
        (replace(GIVEN, ids=GIVEN.ids[1:]), ENCODING, r"its given ids are int32 \[16, 6\]"),
        (replace(GIVEN, ids=GIVEN.ids.astype(np.float32)), ENCODING, "its given ids are float32"),
        (replace(GIVEN, tokens_hash="other"), ENCODING, r"its ids were given for other tokens \(other\)"),
        (
            changed(4, VOCABULARY),
            ENCODING,
            "row 4 of its given ids holds an id outside the vocabulary of 283",
        ),
        (changed(2, -2), ENCODING, "row 2 of its given ids holds an id outside"),
        (changed(5, 7, 8, 7), ENCODING, r"row 5 of its given ids holds an id twice: \[7, 8, 7"),
        (changed(3, -1), ENCODING, "row 3 of its given ids holds no id at all, or one behind a -1"),
        (changed(1, 9, -1), ENCODING, "row 1 of its given ids holds no id at all, or one behind a -1"),
    ],
)
def test_ids_that_no_teacher_can_be_asked_about_are_refused(given: object, encoding: Labels, match: str) -> None:
    with pytest.raises(UnitRejected, match=f"unit 0:0: {match}"):
        check_given(UNIT, given, encoding=encoding, vocabulary_size=VOCABULARY)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    request = GenerationRequest("0:0", np.arange(10, dtype=np.int32), Sampling(4), origin="file:1")
    check_request(request, vocabulary_size=VOCABULARY, max_length=11)
    with pytest.raises(UnitRejected, match=r"prompt 0:0 \(file:1\) has 10 tokens.*a prompt has 1 to 9"):
        check_request(request, vocabulary_size=VOCABULARY, max_length=10)


def test_tokens_after_the_last_predicted_one_are_not_read() -> None:
    assert len(tokens_to_read(UNIT.sequences[2])) == 5  # rows 0..3 predict tokens 1..4
    assert len(tokens_to_read(UNIT.sequences[0])) == 20


def block_of(rows: list[int]) -> object:
    packed = [np.full((n, 8), i, dtype=np.uint8) for i, n in enumerate(rows)]
    plan = engine_plan(Engine(), "folder")
    return label_block(UNIT, packed, plan=plan, spec=Labels(kind="x"), layout=LAYOUT, hidden_size=2)


def test_a_block_holds_each_sequences_rows_in_order() -> None:
    block = block_of([13, 4])
    assert block.row_offsets.tolist() == [0, 13, 13, 17]
    assert block.columns["x"].shape == (17, 2)
    assert block.tokens_hash == UNIT.tokens_hash()
    assert (block.columns["x"][13:].view(np.uint8) == 1).all()


@pytest.mark.parametrize("rows", [[13], [13, 3], [12, 5], [13, 4, 0]])
def test_other_rows_than_asked_are_an_error(rows: list[int]) -> None:
    with pytest.raises(EngineDead, match=r"asked for \[13, 4\] rows"):
        block_of(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_entries_are_counted_in_every_float(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, float("nan"), -3e4], [float("-inf"), 0.0, float("inf")]]).to(dtype)
    column = values.view(torch.uint16).numpy() if dtype is torch.bfloat16 else values.numpy()
    assert count_non_finite(column, dtype) == 3


def test_ids_are_never_non_finite() -> None:
    assert count_non_finite(np.full((2, 2), 0x7F80, dtype=np.uint16), torch.uint16) == 0

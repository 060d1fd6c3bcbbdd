"""The ids that a student finds likeliest, against a plain sort, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from label_oracle import random_given_ids, random_unit

from configs.labels import GivenIds
from trainer.loop.chosen_ids import ChosenIds
from trainer.model.chosen_ids import likeliest_ids
from trainer.model.head import Head, HeadShape
from trainer.types import hash_tokens

N, H, V = 23, 16, 211
HIDDEN = torch.randn(N, H, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(V + 13, H, generator=torch.Generator().manual_seed(2))  # 13 rows of padding
BIAS = torch.randn(V + 13, generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.25, soft_cap=30.0)])
@pytest.mark.parametrize("chunk_rows", [5, 512])
def test_they_are_the_target_id_and_the_likeliest_others_of_the_true_vocabulary(shape: HeadShape, chunk_rows: int):
    head = Head(WEIGHT, BIAS, shape, V)
    ordered = (HIDDEN.double() @ WEIGHT[:V].double().T + BIAS[:V].double()).argsort(dim=1, descending=True)
    made = likeliest_ids(HIDDEN, head, TARGETS, GivenIds(k=7), chunk_rows=chunk_rows)
    assert made.dtype == torch.int32
    for row, target in zip(range(N), TARGETS.tolist(), strict=True):
        assert made[row].tolist() == [target, *[i for i in ordered[row].tolist() if i != target][:7]]
    alone = likeliest_ids(HIDDEN, head, TARGETS, GivenIds(k=7, add_target=False), chunk_rows=chunk_rows)
    assert torch.equal(alone.long(), ordered[:, :7])


def test_control_ids_are_always_among_them_and_the_target_id_once():
    head, controls = Head(WEIGHT, BIAS, HeadShape(), V), (int(TARGETS[4]), 7)
    ordered = (HIDDEN.double() @ WEIGHT[:V].double().T + BIAS[:V].double()).argsort(dim=1, descending=True)
    made = likeliest_ids(HIDDEN, head, TARGETS, GivenIds(k=6, control_ids=controls), chunk_rows=512)
    for row, target in zip(range(N), TARGETS.tolist(), strict=True):
        others = [i for i in ordered[row].tolist() if i != target and i not in controls][:4]
        always = [i for i in controls if i != target]
        assert made[row].tolist() == [target, *others, *always, *[-1] * (2 - len(always))]
    assert made[4, -1] == -1
    alone = likeliest_ids(HIDDEN, head, TARGETS, GivenIds(k=2, add_target=False, control_ids=controls), chunk_rows=512)
    assert alone.tolist() == [list(controls)] * N


def test_a_vocabulary_may_be_given_as_a_whole_and_rows_may_be_none():
    head = Head(WEIGHT, None, HeadShape(), V)
    whole = likeliest_ids(HIDDEN, head, TARGETS, GivenIds(k=V - 1), chunk_rows=512)
    assert torch.equal(whole.long().sort(1).values, torch.arange(V).expand(N, V))
    assert likeliest_ids(HIDDEN[:0], head, TARGETS[:0], GivenIds(k=4), chunk_rows=512).shape == (0, 5)


def test_what_was_chosen_survives_a_checkpoint_until_its_step_is_trained():
    unit = random_unit("7/0:0", (20, [(3, 9), (12, 19)]), (8, []), (10, [(0, 4)]))
    given = random_given_ids(unit, 5)
    rows = iter(given.of_sequences(unit))
    ids = {hash_tokens([s]): next(rows) if s.num_loss_tokens else given.ids[:0] for s in unit.sequences}
    before, after = ChosenIds(), ChosenIds()
    before.keep(7, ids)
    before.keep(8, {})
    after.restore(before.state())
    assert after.knows(7, [unit])
    assert not after.knows(8, [unit])
    assert (after.of(7, unit).ids == given.ids).all()
    assert after.of(7, unit).tokens_hash == unit.tokens_hash()
    after.forget(7)
    assert not after.knows(7, [unit])
    assert after.knows(8, [])

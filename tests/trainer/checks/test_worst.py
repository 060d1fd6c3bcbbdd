"""The held-out rows and texts that are furthest from the teacher, against a sort of all of them."""

from __future__ import annotations

import numpy as np
import torch

from trainer.checks.evaluate import EvaluationRows
from trainer.checks.worst import AFTER, BEFORE, MAX_TOKENS, TEXTS, TOKENS, combined, worst_of
from trainer.loop.packing import pack
from trainer.loop.staging import HeldOutBatch
from trainer.types import Reading, Sequence, Unit


def held_out(lengths: list[int], *, seed: int, reached: float = 1.0) -> tuple[HeldOutBatch, EvaluationRows]:
    """A batch of random texts, and numbers of their rows; less than all are `reached` by a teacher of other tokens."""
    random = np.random.default_rng(seed)
    sequences = []
    for i, length in enumerate(lengths):
        mask = np.zeros(length, dtype=bool)
        mask[2 : length - 1] = True
        groups = np.where(random.random(int(mask.sum())) < reached, 0, -1)
        reading = Reading(np.zeros(2, np.int32), groups=groups) if reached < 1 else None
        ids = random.integers(0, 1000, length).astype(np.int32)
        sequences.append(Sequence(f"0:{seed}{i}", ids, mask, "dataset", reading=reading))
    unit = Unit("u", tuple(sequences))
    n = unit.num_rows
    own = np.concatenate(
        [np.ones(s.num_loss_tokens, bool) if not s.reading else s.reading.groups >= 0 for s in sequences]
    )
    of_all, of_scored = (torch.from_numpy(random.random(size)).float() for size in (n, int(own.sum())))
    rows = EvaluationRows(
        kl=of_scored,
        agree=of_scored > 1,
        student_logprob=-of_all,
        teacher_logprob=-2 * of_scored,
        padding_mass=of_all,
        student_entropy=of_all,
        teacher_entropy=of_scored,
        student_first=torch.arange(n),
        student_first_logprob=-3 * of_all,
        teacher_first=torch.arange(len(of_scored)),
        teacher_first_logprob=-4 * of_scored,
        kl_to_each=of_scored[:, None][:, :0],
    )
    return HeldOutBatch(pack((), (), ()), tuple((i, unit, i) for i in range(len(lengths)))), rows


def test_the_worst_tokens_and_texts_of_all_batches_are_those_of_a_sort() -> None:
    batches = [held_out([9, 30, 400], seed=1), held_out([12, 25], seed=2), held_out([40, 31], seed=3, reached=0.6)]
    found = combined(worst_of(*batch) for batch in batches)
    every, means = [], []
    for item, rows in batches:
        scored = all_rows = 0
        for _, unit, inside in item.members:
            sequence = unit.sequences[inside]
            at = np.flatnonzero(sequence.loss_mask)
            own = np.ones(len(at), bool) if sequence.reading is None else sequence.reading.groups >= 0
            kl = rows.kl[scored : scored + own.sum()].numpy()
            student = rows.student_logprob[all_rows : all_rows + len(at)].numpy()[own]
            every += zip(kl, [sequence.id] * len(kl), sequence.token_ids[at[own] + 1], student, strict=True)
            means.append((float(kl.mean()), sequence.id, len(kl)))
            scored, all_rows = scored + int(own.sum()), all_rows + len(at)
    expected = sorted(every, reverse=True)[:TOKENS]
    assert [(one.id, int(one.token[0])) for one in found.tokens] == [
        (name, int(token)) for _, name, token, _ in expected
    ]
    np.testing.assert_allclose([one.kl for one in found.tokens], [one[0] for one in expected], rtol=1e-6)
    np.testing.assert_allclose([one.student_logprob for one in found.tokens], [one[3] for one in expected], rtol=1e-6)
    furthest = sorted(means, reverse=True)[:TEXTS]
    assert [(one.shown.id, one.num_rows) for one in found.texts] == [(name, rows) for _, name, rows in furthest]
    for token in found.tokens:
        assert len(token.before) <= BEFORE
        assert len(token.after) <= AFTER
        assert (token.teacher_logprob is None) == token.id.startswith("0:3")


def test_a_long_text_is_cut_and_its_mean_is_that_of_all_of_it() -> None:
    item, rows = held_out([2000], seed=4)
    (text,) = worst_of(item, rows).texts
    assert len(text.shown.token_ids) == MAX_TOKENS
    assert text.shown.rows.max() + 1 < MAX_TOKENS
    assert text.num_rows == 1997
    np.testing.assert_allclose(text.kl, rows.kl.mean().item(), rtol=1e-5)
    np.testing.assert_array_equal(text.shown.kl, rows.kl[: len(text.shown.kl)].numpy())


def test_rows_that_nobody_scored_or_that_are_no_numbers_are_none_of_the_worst() -> None:
    item, rows = held_out([20, 20], seed=5)
    rows.kl[3], rows.kl[4] = torch.nan, torch.inf
    found = worst_of(item, rows)
    assert len(found.tokens) == TOKENS - 0
    assert np.isfinite([one.kl for one in found.tokens]).all()
    assert [text.shown.id for text in found.texts] == ["0:51"]
    nobody = EvaluationRows.empty(torch.zeros(1), 34, num_scored=0)
    assert worst_of(item, nobody).tokens == ()

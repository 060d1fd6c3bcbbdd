"""What a report shows of labels, against float64 distributions of both models, for every encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.labels import Dense, GivenIds, Hidden, Labels, Nucleus, Sampled, Token, TopK
from trainer.align.aligner import SharedIds
from trainer.align.overlap import OverlapEncoding
from trainer.checks.label_rows import LIKELIEST, MAX_IDS, PartLabels, label_rows
from trainer.checks.shown import LabelRows
from trainer.checks.trained import choose
from trainer.labels.encoding import ALIGNED, load_encoding
from trainer.loop.label_means import label_means, means_of_tasks
from trainer.losses.ensemble import Together
from trainer.model.head import Head, HeadShape
from trainer.types import RankBatch, Sequence, Unit, UnitReport

N, V, H, CONTROL = 70, 283, 24, (7, 211)
SHAPE = HeadShape()
ENCODINGS = [
    TopK(k=16, control_ids=CONTROL),
    TopK(k=16, control_ids=CONTROL, temperature=2.0),
    Nucleus(p=0.7, k_max=40, control_ids=CONTROL),
    Sampled(draws=30, control_ids=CONTROL),
    GivenIds(k=16, control_ids=CONTROL),
    Hidden(),
    Dense(),
    Dense(dtype="float16"),
]


def world() -> tuple[torch.Tensor, torch.Tensor, Head, torch.Tensor]:
    """Student logits, the teacher's hidden states and head, target ids."""
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(N, V, generator=random)
    hidden, weight = torch.randn(N, H, generator=random), torch.randn(V, H, generator=random)
    return logits, hidden, Head(weight, None, SHAPE, V), torch.randint(V, (N,), generator=random)


def labels_of(spec: Labels, hidden: torch.Tensor, head: Head, target_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    encoding = load_encoding(spec)
    extra = {}
    if encoding.takes_ids:
        given = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i)) for i in range(N)])
        others = torch.tensor([i for i in range(V) if i not in CONTROL])
        given = torch.stack([row[torch.isin(row, others)] for row in given])[:, : spec.num_given - len(CONTROL)]
        given = given.masked_fill(given == target_ids[:, None], -1).sort(1, descending=True).values
        extra["given_ids"] = torch.cat([torch.tensor(CONTROL).expand(N, -1), given], dim=1).int()
    if encoding.needs_row_keys:
        extra["row_keys"] = torch.arange(N)
    source = hidden if encoding.needs == "hidden" else head.logits(hidden)
    return encoding.encode(source, target_ids, **extra)


def shown(spec: Labels, **known: object) -> tuple[LabelRows, np.ndarray, np.ndarray, torch.Tensor]:
    """The rows, float64 probabilities [N, V] of teacher and student at the labels' temperature, and target ids."""
    logits, hidden, head, target_ids = world()
    encoding = load_encoding(spec)
    part = PartLabels(encoding, head, **known)
    labels = labels_of(spec, hidden, head, target_ids)
    rows = LabelRows(*label_rows(logits, labels, target_ids, encoding, head, part))
    sides = (head.logits(hidden), logits)
    p, q = ((side.double() / spec.temperature).softmax(1).numpy() for side in sides)
    return rows, p, q, target_ids


@pytest.mark.parametrize("spec", ENCODINGS, ids=lambda spec: f"{spec.kind}-{spec.temperature:g}")
def test_shown_ids_have_the_probabilities_of_both_models(spec: Labels) -> None:
    rows, p, q, target_ids = shown(spec)
    at, ids = np.nonzero(rows.ids >= 0)[0], rows.ids[rows.ids >= 0]
    np.testing.assert_allclose(np.exp(rows.student[rows.ids >= 0]), q[at, ids], rtol=1e-4, atol=1e-7)
    if spec.kind != "sampled":
        np.testing.assert_allclose(np.exp(rows.teacher[rows.ids >= 0]), p[at, ids], rtol=6e-3, atol=1e-6)
        shifted = np.roll(p, 1, axis=0)
        assert np.abs(np.exp(rows.teacher[rows.ids >= 0]) - shifted[at, ids]).max() > 0.1, "a shift by one must show"
    np.testing.assert_allclose(np.exp(rows.student_target), q[np.arange(N), target_ids], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.exp(rows.target), p[np.arange(N), target_ids], rtol=6e-3, atol=1e-6)
    assert (rows.ids >= 0).sum(1).max() <= MAX_IDS
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows.ids)


@pytest.mark.parametrize("spec", [one for one in ENCODINGS if one.kind not in ("hidden", "dense")], ids=str)
def test_the_tail_is_what_the_label_does_not_keep_and_control_ids_are_always_shown(spec: Labels) -> None:
    rows, p, q, target_ids = shown(spec)
    labels = labels_of(spec, *world()[1:])
    for n in range(N):
        present = slice(0, int(labels["num_ids"][n])) if "num_ids" in labels else slice(None)
        kept = set(labels["ids"][n, present].tolist()) | (set(CONTROL) if spec.kind == "sampled" else set())
        assert rows.num_kept[n] == len(kept)
        assert rows.tail[n] == pytest.approx(1 - p[n, list(kept)].sum(), abs=2e-6)
        assert rows.student_tail[n] == pytest.approx(1 - q[n, list(kept)].sum(), abs=2e-6)
        assert set(rows.ids[n, rows.control[n]]) == set(CONTROL)
        likeliest = sorted(kept, key=lambda i: -p[n, i])[:LIKELIEST]
        if spec.kind != "sampled":
            assert set(likeliest) <= set(rows.ids[n].tolist())
        assert (int(target_ids[n]) in kept) == (int(target_ids[n]) in rows.ids[n])


@pytest.mark.parametrize("spec", [Hidden(), Dense(), Dense(temperature=0.5)], ids=str)
def test_of_labels_that_keep_no_ids_the_likeliest_of_all_are_shown_with_exact_entropy_and_kl(spec: Labels) -> None:
    rows, p, q, _ = shown(spec)
    assert (rows.num_kept == -1).all()
    assert (rows.tail == 0).all()
    top = np.argsort(-p, axis=1)[:, :LIKELIEST]
    assert [set(row) - set(seen) for row, seen in zip(top, rows.ids, strict=True)] == [set()] * N
    np.testing.assert_allclose(rows.entropy, -(p * np.log(p)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows.student_entropy, -(q * np.log(q)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows.kl, (p * np.log(p / q)).sum(1), rtol=1e-3, atol=1e-5)


def test_sampled_labels_show_shares_of_draws_and_their_own_entropy() -> None:
    rows, p, _, _ = shown(ENCODINGS[3])
    left = 1 - p[:, list(CONTROL)].sum(1, keepdims=True)
    shares = np.exp(rows.teacher) / left * 30
    drawn = (rows.ids >= 0) & ~rows.control
    np.testing.assert_allclose(shares[drawn], shares[drawn].round(), atol=1e-3)
    np.testing.assert_allclose(rows.entropy, -(p * np.log(p)).sum(1), rtol=1e-4, atol=1e-6)


def test_token_labels_show_the_one_number_that_they_are() -> None:
    rows, p, q, target_ids = shown(Token())
    targets = np.arange(N), target_ids.numpy()
    assert (rows.ids[:, 0] == targets[1]).all()
    assert (rows.ids[:, 1:] == -1).all()
    np.testing.assert_allclose(np.exp(rows.teacher[:, 0]), p[targets], rtol=1e-4)
    np.testing.assert_allclose(rows.tail, 1 - p[targets], atol=1e-6)
    np.testing.assert_allclose(rows.student_tail, 1 - q[targets], atol=1e-6)
    assert np.isnan(rows.entropy).all()
    assert np.isnan(rows.kl).all()


@pytest.mark.parametrize("spec", [TopK(k=16), Dense()], ids=["topk", "dense"])
def test_of_another_vocabulary_the_student_has_what_it_shares_and_rows_without_a_partner_have_nothing(
    spec: Labels,
) -> None:
    logits, hidden, head, target_ids = world()
    table = np.arange(V, dtype=np.int32)[::-1].copy()
    table[::5] = -1  # tokens that the student lacks
    shared = SharedIds.of(table, num_student=V, device=torch.device("cpu"))
    encoding = load_encoding(spec)
    reached = (torch.arange(N) % 4 != 0).float()[:, None]
    labels = {**labels_of(spec, hidden, head, target_ids), ALIGNED: reached}
    part = PartLabels(encoding, head, shared, OverlapEncoding(encoding, shared), "overlap")
    rows = LabelRows(*label_rows(logits, labels, target_ids, encoding, head, part))
    p, q = head.logits(hidden).double().softmax(1).numpy(), logits.double().softmax(1).numpy()
    assert (rows.ids[::4] == -1).all()
    assert (rows.num_kept[::4] == 0).all()
    assert np.isnan(rows.kl[::4]).all()
    for n in (n for n in range(N) if n % 4):
        ids = rows.ids[n][rows.ids[n] >= 0]
        assert len(ids) == LIKELIEST
        np.testing.assert_allclose(np.exp(rows.teacher[n, : len(ids)]), p[n, ids], rtol=6e-3)
        expected = np.where(table[ids] < 0, np.nan, q[n, table[ids]])
        np.testing.assert_allclose(np.exp(rows.student[n, : len(ids)]), expected, rtol=1e-4)
        assert np.isfinite(rows.kl[n])


@pytest.mark.parametrize("how", ["probability_mean", "per_teacher"])
def test_several_teachers_are_shown_as_training_sees_them(how: str) -> None:
    _, hidden, head, target_ids = world()
    spec = Dense()
    of_each = {"a": labels_of(spec, hidden, head, target_ids), "b": labels_of(spec, -hidden, head, target_ids)}
    labels = {f"{name}/{key}": column for name, own in of_each.items() for key, column in own.items()}
    weights = {f"{name}/weight": torch.full((N, 1), weight) for name, weight in (("a", 0.25), ("b", 0.75))}
    known = PartLabels(Together(load_encoding(spec), ("a", "b"), how), None)
    seen = {
        name: LabelRows(*label_rows(world()[0], columns(labels | weights), target_ids, encoding, own, known))
        for name, encoding, columns, own in known.of_teachers("a+b")
    }
    p = {name: own["logprobs"].double().exp().numpy() for name, own in of_each.items()}
    expected = p if how == "per_teacher" else {"a+b": 0.25 * p["a"] + 0.75 * p["b"]}
    assert seen.keys() == expected.keys()
    for name, rows in seen.items():
        at = np.arange(N), rows.ids[:, 0]
        np.testing.assert_allclose(np.exp(rows.teacher[:, 0]), expected[name][at], rtol=1e-4)
        np.testing.assert_allclose(expected[name][at], expected[name].max(1), rtol=1e-4)


def test_of_a_step_sequences_of_every_task_are_chosen_as_far_as_they_fit() -> None:
    def sequence(task: str, length: int, *, learnt: bool = True) -> Sequence:
        mask = np.zeros(length, dtype=bool)
        mask[: length - 1] = learnt
        return Sequence(f"{task}{length}", np.zeros(length, np.int32), mask, "dataset", task=task)

    step = [sequence("a", 10), sequence("a", 11), sequence("a", 12), sequence("b", 10), sequence("c", 9, learnt=False)]
    assert choose(step, most=4, token_budget=1000) == [0, 1, 2, 3]
    assert choose(step, most=2, token_budget=1000) == [0, 3]
    assert choose(step, most=4, token_budget=31) == [0, 1, 3]
    assert choose(step, most=4, token_budget=1) == [0]
    assert choose(step[-1:], most=4, token_budget=1000) == []


@pytest.mark.parametrize("spec", ENCODINGS[:5], ids=str)
def test_the_entropy_that_a_step_logs_is_the_mean_over_the_rows_of_its_labels(spec: Labels) -> None:
    rows, p, _, _ = shown(spec)
    columns = labels_of(spec, *world()[1:])
    if "num_ids" in columns:  # ragged on the wire
        there = torch.arange(columns["ids"].shape[1]) < columns["num_ids"].long()
        columns |= {name: columns[name][there] for name in ("ids", "logprobs", "draws") if name in columns}
    found = load_encoding(spec).entropy({name: column.numpy() for name, column in columns.items()})
    assert found == pytest.approx(rows.entropy.mean(), abs=2e-3)
    assert found <= -(p * np.log(p)).sum(1).mean() + 2e-3


def test_encodings_whose_columns_do_not_tell_the_entropy_say_so() -> None:
    assert [load_encoding(spec).entropy({}) for spec in (Hidden(), Dense(), Token())] == [None] * 3


def test_means_over_reports_are_by_rows_and_of_each_named_task() -> None:
    def report(unit: str, rows: int, mass: float, entropy: float | None) -> UnitReport:
        return UnitReport(unit, "", "x", rows, rows, 1, 0, mass, 0.0, 0.0, mean_entropy=entropy)

    made = [report("a", 10, 0.9, 2.0), report("b", 30, 0.5, 1.0), report("c", 0, float("nan"), None)]
    assert label_means(made) == {"mass": pytest.approx(0.6), "entropy": 1.25}
    assert label_means([*made, report("d", 40, 1.0, None)]) == {"mass": pytest.approx(0.8)}
    assert np.isnan(label_means([])["mass"])
    units = [
        Unit(name, (Sequence(name, np.zeros(2, np.int32), np.zeros(2, bool), "dataset", task=task),))
        for name, task in (("a", "chat"), ("b", "chat"), ("d", "sft"))
    ]
    batch = RankBatch(1, tuple(units), (), {})
    found = means_of_tasks([batch], {one.unit_id: one for one in made})
    assert found == {"task/chat/mass": pytest.approx(0.6), "task/chat/entropy": 1.25}

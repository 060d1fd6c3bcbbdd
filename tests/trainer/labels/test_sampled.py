"""Sampled labels: unbiased, the same for whoever makes them, and better than independent draws."""

from __future__ import annotations

from itertools import pairwise

import loss_oracles as oracle
import pytest
import torch

from trainer.labels.encoding import TeacherShape, pack_rows, row_keys, unpack_rows
from trainer.labels.sampled import Encoding, uniform
from trainer.losses.kl import forward_kl

V = 60


def of_shards(
    encoding: Encoding, logits: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor, cuts: tuple[int, ...]
) -> list[torch.Tensor]:
    """What each shard sends, after all have told the others of their mass."""
    shards, told = list(pairwise(cuts)), []
    for a, b in shards:  # a first time only to hear it
        encoding.encode_shard(logits[:, a:b], ids, a, keys, lambda totals: (told.append(totals) or [totals], 0))
    return [
        encoding.encode_shard(logits[:, a:b], ids, a, keys, lambda _, place=place: (told, place))
        for place, (a, b) in enumerate(shards)
    ]


def many(encoding: Encoding, logits: torch.Tensor, times: int) -> dict[str, torch.Tensor]:
    """Labels of one row [1, V], drawn so many times."""
    ids = torch.zeros(times, dtype=torch.int64)
    return encoding.encode(logits.expand(times, -1), ids, row_keys(torch.arange(5), torch.arange(times)))


def gradients(encoding: Encoding, labels: dict[str, torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    """float64 [times, V] of forward_kl by the logits of one row."""
    rows = student.double().expand(len(labels["ids"]), -1)
    return oracle.gradient(lambda z: forward_kl(encoding.align(z, labels)), rows)


def standard_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[V]: how many standard errors the mean of [times, V] is off."""
    error = found.std(0) / len(found) ** 0.5
    return ((found.mean(0) - expected).abs() - 1e-9).clamp(min=0) / error.clamp(min=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("control", [(), (3, 41)])
@pytest.mark.parametrize("draws", [1, 12, 50])
def test_the_mean_gradient_of_forward_kl_is_that_over_the_vocabulary(
    draws: int, control: tuple[int, ...], temperature: float
) -> None:
    teacher, student = oracle.realistic_logits(1, V, seed=1) / 4, oracle.realistic_logits(1, V, seed=2)
    encoding = Encoding(draws=draws, temperature=temperature, control_ids=control)
    found = gradients(encoding, many(encoding, teacher, 4000), student)
    p, q = (oracle.probabilities(z, temperature)[0] for z in (teacher, student))
    assert standard_errors(found, (q - p) / temperature).max() < 4.5
    assert standard_errors(found, (q - p.roll(1)) / temperature).max() > 10, "that of ids off by one is told apart"
    if control:
        torch.testing.assert_close(found[:, list(control)], ((q - p) / temperature)[list(control)].expand(4000, -1))


def test_a_row_that_is_moved_by_one_has_another_gradient() -> None:
    teacher, student = oracle.realistic_logits(2, V, seed=3), oracle.realistic_logits(2, V, seed=4)
    encoding = Encoding(draws=50)
    found = gradients(encoding, many(encoding, teacher[1:], 2000), student[:1])
    p, q = oracle.probabilities(teacher)[0], oracle.probabilities(student)[0]
    assert standard_errors(found, q - p).max() > 50


def test_equally_spaced_draws_vary_less_than_independent_ones() -> None:
    teacher, draws = oracle.realistic_logits(1, V, seed=5), 50
    labels = many(Encoding(draws=draws), teacher, 3000)
    shares = torch.zeros(3000, V).scatter_add_(1, labels["ids"].long(), labels["draws"].float()) / draws
    p = oracle.probabilities(teacher)[0]
    assert (shares * draws - p * draws).abs().max() < 1 + 1e-4, "rounded up or down"
    independent = (p * (1 - p) / draws).sum()
    assert shares.var(0).sum() < 0.35 * independent


def test_whoever_makes_the_labels_again_draws_the_same_ids_and_other_rows_others() -> None:
    logits, ids = oracle.realistic_logits(40, 5_000, seed=6), torch.zeros(40, dtype=torch.int64)
    text = torch.arange(100)
    keys = row_keys(text, torch.arange(40))
    made = Encoding().encode(logits, ids, keys)
    parts = [Encoding().encode(logits[i : i + 7], ids[i : i + 7], keys[i : i + 7]) for i in range(0, 40, 7)]
    for name, column in made.items():
        assert torch.equal(column.int(), torch.cat([part[name] for part in parts]).int())
    nearly = Encoding().encode(logits + 1e-6 * torch.randn(logits.shape), ids, keys)  # as another machine rounds
    assert (nearly["ids"].int() == made["ids"].int()).float().mean() > 0.98
    for other in (Encoding(seed=1).encode(logits, ids, keys), Encoding().encode(logits, ids, row_keys(text + 1, keys))):
        assert (other["draws"].int() != made["draws"].int()).any(1).float().mean() > 0.7


@pytest.mark.parametrize("cuts", [(0, 2_600, 5_000), (0, 64, 1_000, 4_990, 5_000)])
@pytest.mark.parametrize("control", [(), (3, 4_998)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shards_of_the_vocabulary_draw_the_same_ids(
    temperature: float, control: tuple[int, ...], cuts: tuple[int, ...]
) -> None:
    logits, ids = oracle.realistic_logits(40, 5_000, seed=14), torch.randint(5_000, (40,))
    logits[:4, 3] += 300.0  # with control ids nothing is left to draw, without it is always drawn
    logits[4:8, 4_995:] = -torch.inf
    keys = row_keys(torch.arange(100), torch.arange(40))
    encoding = Encoding(temperature=temperature, control_ids=control)
    whole = encoding.encode(logits, ids, keys)
    shards = of_shards(encoding, logits, ids, keys, cuts)
    assert {shard.shape for shard in shards} == {(40, encoding.shard_width)}
    merged = encoding.merge_shards(shards, 5_000)
    assert list(merged) == list(whole)
    found, expected = (encoding.estimate(one, 5_000) for one in (merged, whole))
    assert (found - expected).abs().sum(1).mean() / 2 < 1e-3, "but where rounding moves a border over a point"
    for name in {"entropy", "target", "control"} & whole.keys():
        torch.testing.assert_close(merged[name], whole[name], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(merged["tail"].exp(), whole["tail"].exp(), atol=2e-3, rtol=0.0)
    assert torch.equal(merged["num_ids"] == 0, whole["num_ids"] == 0)
    moved = encoding.merge_shards(of_shards(encoding, logits.roll(1, 0), ids, keys, cuts), 5_000)
    assert (encoding.estimate(moved, 5_000) - expected).abs().sum(1).mean() / 2 > 0.3, "of other rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_tail_and_draws_are_those_of_float64_however_large_the_logits(dtype: torch.dtype) -> None:
    logits = oracle.realistic_logits(60, 5_000, seed=15)
    logits[10:20] += 400.0
    logits[20:30] -= 400.0
    logits[30:40, 100:] = -torch.inf
    logits[40:50, 7] += 60.0
    logits = logits.to(dtype)
    keys = row_keys(torch.arange(9), torch.arange(60))
    made = Encoding(draws=40).encode(logits, torch.full((60,), 7), keys)
    p = oracle.probabilities(logits.double())
    torch.testing.assert_close(
        made["entropy"].double(), torch.special.entr(p).sum(1, keepdim=True), atol=3e-4, rtol=1e-5
    )
    shares = torch.zeros(60, 5_000).scatter_add_(1, made["ids"].long(), made["draws"].float())
    assert (shares - 40 * p).abs().max() < 1 + 1e-3, "rounded up or down"
    missed = p.masked_fill(shares > 0, 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(made["tail"].double().exp(), missed, atol=1e-6, rtol=1e-5)
    cumulative = p.cumsum(1)  # systematic sampling by its definition
    points = (torch.arange(40) + uniform(keys, 0)[:, None]) / 40 * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, points, right=True)
    drawn = torch.zeros(60, 5_000).scatter_add_(1, expected, torch.ones(60, 40))
    assert (drawn - shares).abs().sum() / 2 <= 0.002 * 60 * 40


def test_random_numbers_are_even_and_do_not_follow_the_row() -> None:
    u = uniform(row_keys(torch.tensor([1, 2, 3]), torch.arange(20_000)), seed=0)
    assert (u.min() >= 0) & (u.max() < 1)
    counts = torch.histc(u.float(), 20, 0.0, 1.0)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square of 19 degrees, p = 0.0007
    assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("v", [5_000, 70_001])
def test_rows_survive_the_wire_and_hold_what_the_layout_says(v: int) -> None:
    encoding = Encoding(draws=300, control_ids=(1, v - 1))
    made = encoding.encode(oracle.realistic_logits(3, v, seed=7), torch.tensor([0, 5, v - 1]), torch.arange(3))
    layout = encoding.layout(TeacherShape(v, 8, torch.float32))
    sizes = [column.dtype.itemsize for column in layout]
    assert sizes == sorted(sizes, reverse=True)
    columns = unpack_rows(pack_rows(made, layout).numpy(), layout)
    assert all(columns[c.name].tolist() == made[c.name].tolist() for c in layout)
    assert made["draws"].int().sum(1).tolist() == [300] * 3


def test_control_ids_are_never_drawn_and_a_row_of_which_they_hold_everything_has_no_draws() -> None:
    logits = oracle.realistic_logits(20, V, seed=8)
    logits[:10, 7] += 200.0
    encoding = Encoding(control_ids=(7, 9))
    labels = encoding.encode(logits, torch.full((20,), 7), torch.arange(20))
    assert labels["num_ids"][:10].sum() == 0
    present = torch.arange(50) < labels["num_ids"].long()
    assert not torch.isin(labels["ids"].long()[present], torch.tensor([7, 9])).any()
    pair = encoding.align(oracle.realistic_logits(20, V, seed=9), labels)
    for side in (pair.student, pair.teacher):
        assert side.isfinite().all()
        torch.testing.assert_close(side.exp().sum(1), torch.ones(20))
    torch.testing.assert_close(pair.teacher[:10, 0], torch.zeros(10), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_value_of_forward_kl_is_that_over_the_vocabulary(temperature: float) -> None:
    teacher, student = oracle.realistic_logits(1, V, seed=10) / 2, oracle.realistic_logits(1, V, seed=11)
    encoding = Encoding(draws=20, control_ids=(4,), temperature=temperature)
    pair = encoding.align(student.double().expand(4000, -1), many(encoding, teacher, 4000))
    values = forward_kl(pair)
    p, q = oracle.probabilities(teacher, temperature), oracle.probabilities(student, temperature)
    error = values.std() / 4000**0.5
    assert abs(values.mean() - oracle.forward_kl(p, q)) < 4 * error
    own = (pair.teacher.exp() * (pair.teacher - pair.student)).sum(1)
    assert own.mean() - oracle.forward_kl(p, q) > 20 * error, "with the entropy of the draws it is too large"


def test_the_mass_reported_is_that_of_the_ids_kept() -> None:
    logits = oracle.realistic_logits(20, 500, seed=13)
    encoding = Encoding(control_ids=(1,))
    made = encoding.encode(logits, torch.zeros(20, dtype=torch.int64), torch.arange(20))
    p, expected = oracle.probabilities(logits), 0.0
    for row in range(20):
        kept = {1, *made["ids"][row, : int(made["num_ids"][row])].tolist()}
        expected += p[row, list(kept)].sum().item() / 20
    assert encoding.mass({"tail": made["tail"].numpy()}) == pytest.approx(expected, abs=1e-6)

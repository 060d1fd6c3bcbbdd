"""Encodings that keep some ids of each row, against brute force in float64: nucleus, control ids, shards."""

from __future__ import annotations

from itertools import pairwise

import loss_oracles as oracle
import pytest
import torch

from configs.labels import Labels, Nucleus, Token, TopK
from trainer.labels import nucleus, topk
from trainer.labels.encoding import ABSENT, TeacherShape, load_encoding
from trainer.losses.kl import forward_kl

V = 700
CONTROL = (3, 698)


def random_ids(n: int, v: int = V) -> torch.Tensor:
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))


def kl_and_gradient(encoding: Labels, labels: dict[str, torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[n] and [n, V] of forward_kl, float64."""
    z = z.double()
    rows = forward_kl(encoding.align(z, labels))
    return rows, oracle.gradient(lambda logits: forward_kl(encoding.align(logits, labels)), z)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("control", [(), CONTROL])
@pytest.mark.parametrize(("p", "k_max"), [(0.5, 300), (0.95, 300), (0.95, 4), (1.0, 9)])
def test_a_nucleus_is_the_fewest_likeliest_ids_that_hold_its_mass(
    p: float, k_max: int, control: tuple[int, ...], temperature: float
) -> None:
    logits, target_ids = oracle.realistic_logits(40, V, seed=1), random_ids(40)
    encoding = nucleus.Encoding(p=p, k_max=k_max, temperature=temperature, control_ids=control)
    made = encoding.encode(logits, target_ids)
    truth = oracle.probabilities(logits, temperature)
    for row in range(40):
        kept, mass = set(control), truth[row, list(control)].sum().item()
        for i in truth[row].argsort(descending=True).tolist():
            if (p < 1.0 and mass >= p) or len(kept) == k_max:
                break
            if i not in kept:
                kept.add(i)
                mass += truth[row, i].item()
        num = int(made["num_ids"][row])
        ids = made["ids"][row, :num].long()
        assert set(ids.tolist()) == kept
        assert num == len(kept)
        assert ids.tolist() == ids[truth[row, ids].argsort(descending=True, stable=True)].tolist(), "likeliest first"
        torch.testing.assert_close(made["logprobs"][row, :num].double(), truth[row, ids].log(), atol=1e-5, rtol=2**-10)
        rest = truth[row].index_fill(0, ids, 0.0).sum().log()
        torch.testing.assert_close(made["tail"][row, 0].double(), rest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made["target"][:, 0].double(), truth[range(40), target_ids].log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("control", [(), CONTROL])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_nucleus_of_all_mass_equals_top_k_and_the_whole_vocabulary(
    control: tuple[int, ...], temperature: float
) -> None:
    teacher, student = oracle.realistic_logits(12, V, seed=2), oracle.realistic_logits(12, V, seed=3)
    for k in (30, V):
        few = nucleus.Encoding(p=1.0, k_max=k, temperature=temperature, control_ids=control)
        best = topk.Encoding(k=k, temperature=temperature, control_ids=control)
        found = [kl_and_gradient(e, e.encode(teacher, random_ids(12)), student) for e in (few, best)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    p, q = oracle.probabilities(teacher, temperature), oracle.probabilities(student.double(), temperature)
    torch.testing.assert_close(found[0][0], oracle.forward_kl(p, q), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found[0][1], (q - p) / temperature, atol=1e-3, rtol=0.0)
    moved = few.encode(teacher.roll(1, dims=0), random_ids(12))
    assert (kl_and_gradient(few, moved, student)[1] - found[0][1]).abs().max() > 0.05, "of other rows: it differs"


@pytest.mark.parametrize("kind", [lambda k: TopK(k=k), lambda k: Nucleus(p=0.9999, k_max=k)])
def test_more_ids_never_lower_the_value_and_never_exceed_that_over_the_vocabulary(kind) -> None:
    teacher, student = oracle.realistic_logits(30, V, seed=4), oracle.realistic_logits(30, V, seed=5)
    whole = oracle.forward_kl(oracle.probabilities(teacher), oracle.probabilities(student))
    before = torch.zeros(30, dtype=torch.float64)
    for k in (1, 4, 16, 64, 256, V):
        encoding = load_encoding(kind(k))
        rows = forward_kl(encoding.align(student.double(), encoding.encode(teacher, random_ids(30))))
        assert (rows > before - 2e-3).all(), "but for the rounding of float16"
        before = rows
    assert (before < whole + 2e-3).all()
    assert before.mean() > 0.99 * whole.mean()


@pytest.mark.parametrize(("p", "k_max"), [(0.7, 64), (0.95, 200)])
def test_the_gradient_of_a_ragged_row_is_q_minus_p_on_kept_ids_and_scaled_q_elsewhere(p: float, k_max: int) -> None:
    teacher, student = oracle.realistic_logits(20, V, seed=6), oracle.realistic_logits(20, V, seed=7)
    encoding = nucleus.Encoding(p=p, k_max=k_max, control_ids=(0,))  # 0 is also what padding holds
    labels = encoding.encode(teacher, random_ids(20))
    beyond = torch.arange(k_max) >= labels["num_ids"].long()
    labels["ids"] = labels["ids"].int().masked_fill(beyond, 0)  # what a block's rows are padded with
    labels["logprobs"] = labels["logprobs"].masked_fill(beyond, 0.0)
    _, gradient = kl_and_gradient(encoding, labels, student)
    p, q = oracle.probabilities(teacher), oracle.probabilities(student)
    for row in range(20):
        kept = torch.zeros(V, dtype=torch.bool)
        kept[labels["ids"][row, : int(labels["num_ids"][row])].long()] = True
        scaled = q[row] * (1 - p[row][~kept].sum() / q[row][~kept].sum())
        expected = torch.where(kept, q[row] - p[row], scaled)
        torch.testing.assert_close(gradient[row], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("k", [2, 5, 20, V])
def test_control_ids_are_kept_in_the_place_of_the_least_likely_and_no_id_twice(k: int) -> None:
    logits = oracle.realistic_logits(30, V, seed=8)
    logits[:10, 3] += 20.0  # there it is likely
    logits[20:, 6:] = -torch.inf  # fewer possible ids than are kept
    made = topk.Encoding(k=k, control_ids=CONTROL).encode(logits, random_ids(30))
    for row in range(30):
        ids = made["ids"][row].long().tolist()
        assert len(set(ids)) == k
        assert set(CONTROL) <= set(ids)
        others = [i for i in logits[row].argsort(descending=True).tolist() if i not in CONTROL]
        if row < 20:
            assert set(ids) == {*CONTROL, *others[: k - 2]}
    assert all(column.float().isfinite().all() for column in made.values())


@pytest.mark.parametrize("cuts", [(0, 400, V), (0, 64, 640, V), (0, 690, V)])
@pytest.mark.parametrize("control", [(), CONTROL])
@pytest.mark.parametrize("labels", [TopK(k=16), TopK(k=128, temperature=2.0), Nucleus(k_max=100), Token()])
def test_shards_of_the_vocabulary_make_the_same_labels(labels: Labels, control: tuple, cuts: tuple[int, ...]) -> None:
    if not isinstance(labels, Token):
        labels = labels.model_copy(update={"control_ids": control})
    encoding = load_encoding(labels)
    logits, target_ids = oracle.realistic_logits(30, V, seed=9), random_ids(30)
    whole = encoding.encode(logits, target_ids)
    shards = [encoding.encode_shard(logits[:, a:b], target_ids, a) for a, b in pairwise(cuts)]
    assert len({shard.shape for shard in shards}) == 1, "one collective gathers them"
    merged = encoding.merge_shards(shards, V)
    assert list(merged) == list(whole)
    for name, column in whole.items():
        assert merged[name].dtype == column.dtype
        inside = torch.ones_like(column, dtype=torch.bool)
        if "num_ids" in whole and column.shape[1] > 1:
            inside = torch.arange(column.shape[1]) < whole["num_ids"].long()
        torch.testing.assert_close(merged[name].double()[inside], column.double()[inside], atol=2e-3, rtol=1e-6)
    moved = encoding.merge_shards([encoding.encode_shard(logits[:, :400], target_ids, 1), *shards[1:]], V)
    assert any((moved[name].double() - whole[name].double()).abs().max() > 0.01 for name in whole)


def test_a_nucleus_wider_than_the_vocabulary_is_as_wide_as_that() -> None:
    layout = nucleus.Encoding(k_max=1000).layout(TeacherShape(V, 8, torch.float32))
    assert {column.width for column in layout if column.counts} == {V}
    sizes = [column.dtype.itemsize for column in layout]
    assert sizes == sorted(sizes, reverse=True)


def test_names_that_no_tokenizer_has_read_yet_make_no_labels() -> None:
    for given in ("auto", ("<|im_end|>",)):
        with pytest.raises(ValueError, match="are no ids yet"):
            topk.Encoding(k=4, control_ids=given).encode(torch.zeros(1, V), random_ids(1))


def test_events_that_a_row_lacks_have_no_mass_on_either_side() -> None:
    encoding = nucleus.Encoding(p=0.3, k_max=50)
    teacher, student = oracle.realistic_logits(9, V, seed=10), oracle.realistic_logits(9, V, seed=11)
    labels = encoding.encode(teacher, random_ids(9))
    pair = encoding.align(student, labels)
    absent = torch.arange(50) >= labels["num_ids"].long()
    for side in (pair.student, pair.teacher):
        torch.testing.assert_close(side.exp().sum(1), torch.ones(9))
        assert (side[:, :-1][absent] < 0.9 * ABSENT).all()

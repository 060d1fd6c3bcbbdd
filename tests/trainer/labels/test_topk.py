"""Top-k columns and pairs against float64 brute force."""

from __future__ import annotations

import math

import loss_oracles as oracle
import pytest
import torch

from trainer.labels.encoding import ABSENT, TeacherShape, pack_rows, unpack_rows
from trainer.labels.topk import Encoding


def shape(v: int) -> TeacherShape:
    return TeacherShape(vocabulary_size=v, hidden_size=8, dtype=torch.float32)


def random_ids(n: int, v: int) -> torch.Tensor:
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("v", "k"), [(300, 16), (5_000, 64), (70_001, 64), (300, 1), (300, 299)])
def test_columns_are_the_teachers_best_ids_their_logprobs_and_the_exact_rest(v: int, k: int, temperature: float):
    logits, target_ids = oracle.realistic_logits(5, v, seed=1), random_ids(5, v)
    made = Encoding(k=k, temperature=temperature).encode(logits, target_ids)
    p = oracle.probabilities(logits, temperature)
    expected = logits.double().sort(dim=1, descending=True)
    assert torch.equal(logits.gather(1, made["ids"].long()).double(), expected.values[:, :k])
    torch.testing.assert_close(made["logprobs"].double(), p.gather(1, made["ids"].long()).log(), atol=0.0, rtol=2**-10)
    rest = p.gather(1, expected.indices[:, k:]).sum(1, keepdim=True).log()
    torch.testing.assert_close(made["tail"].double(), rest, atol=1e-5, rtol=1e-5)
    target = p.gather(1, target_ids[:, None]).log()
    torch.testing.assert_close(made["target"].double(), target, atol=1e-5, rtol=1e-5)


def test_the_tail_is_carried_where_one_minus_the_sum_would_be_noise():
    logits = torch.zeros(1, 10_000)
    logits[0, :4] = torch.tensor([30.0, 29.0, 28.0, 27.0])  # everything else: about 6e-10 of the mass
    made = Encoding(k=4).encode(logits, random_ids(1, 10_000))
    exact = oracle.lump(oracle.probabilities(logits), made["ids"].long())[0, -1].log().item()
    assert made["tail"].item() == pytest.approx(exact, abs=1e-5)
    by_difference = 1.0 - made["logprobs"].float().exp().sum().item()
    assert not math.isclose(by_difference, math.exp(exact), rel_tol=0.5)
    student = Encoding(k=4).align(logits, made).student[0, -1].item()
    assert student == pytest.approx(exact, abs=1e-5)


def test_a_student_that_gives_the_rest_next_to_nothing_keeps_a_finite_exact_tail_and_gradient():
    logits = torch.zeros(1, 50)
    logits[0, :2] = 300.0
    labels = Encoding(k=2).encode(oracle.realistic_logits(1, 50, seed=1), torch.zeros(1, dtype=torch.int64))
    labels["ids"] = torch.tensor([[0, 1]])
    pair = Encoding(k=2).align(logits, labels)
    assert pair.student[0, -1].item() == pytest.approx(math.log(48) - 300 - math.log(2), rel=1e-6)
    grad = oracle.gradient(lambda z: -Encoding(k=2).align(z, labels).student[:, -1], logits)
    torch.testing.assert_close(grad[0], torch.cat([torch.full((2,), 0.5), torch.full((48,), -1 / 48)]))


def test_pairs_are_distributions_and_reading_them_changes_nothing():
    logits, teacher = oracle.realistic_logits(6, 400, seed=5), oracle.realistic_logits(6, 400, seed=6)
    before = logits.clone()
    labels = Encoding(k=32).encode(teacher, random_ids(6, 400))
    kept = {name: column.clone() for name, column in labels.items()}
    pair = Encoding(k=32).align(logits.requires_grad_(True), labels)
    pair.student.sum().backward()
    assert not pair.exhaustive
    for side in (pair.student, pair.teacher):
        torch.testing.assert_close(side.exp().sum(1), torch.ones(6))
    assert torch.equal(logits, before)
    assert all(torch.equal(labels[name], kept[name]) for name in kept)
    p = oracle.lump(oracle.probabilities(teacher), labels["ids"].long())
    torch.testing.assert_close(pair.teacher.double(), p.log(), atol=8e-3, rtol=0.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_event_of_the_student_has_its_exact_gradient(temperature: float):
    encoding = Encoding(k=3, temperature=temperature)
    labels = encoding.encode(oracle.realistic_logits(3, 11, seed=7), random_ids(3, 11))
    logits = oracle.realistic_logits(3, 11, seed=8).double()
    ids = labels["ids"].long()
    for event in range(4):
        actual = oracle.gradient(lambda z, e=event: encoding.align(z, labels).student[:, e], logits)
        expected = oracle.gradient(
            lambda z, e=event: oracle.lump((z / temperature).softmax(1), ids)[:, e].log(), logits
        )
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-9)


def test_the_gradient_of_forward_kl_is_q_minus_p_on_kept_ids_and_scaled_q_elsewhere():
    teacher, student = oracle.realistic_logits(4, 60, seed=9), oracle.realistic_logits(4, 60, seed=10)
    labels = Encoding(k=8).encode(teacher, random_ids(4, 60))

    def rows(z: torch.Tensor) -> torch.Tensor:
        pair = Encoding(k=8).align(z, labels)
        return (pair.teacher.exp() * (pair.teacher - pair.student)).sum(1)

    p, q = oracle.probabilities(teacher), oracle.probabilities(student)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, labels["ids"].long(), True)
    tail = [(side * ~kept).sum(1, keepdim=True) for side in (p, q)]
    expected = torch.where(kept, q - p, q * (1 - tail[0] / tail[1]))
    torch.testing.assert_close(oracle.gradient(rows, student).double(), expected, atol=2e-3, rtol=2e-3)


def test_a_fully_kept_vocabulary_has_a_finite_vanishing_tail_and_plain_log_probabilities():
    logits, teacher = oracle.realistic_logits(3, 40, seed=11), oracle.realistic_logits(3, 40, seed=12)
    encoding = Encoding(k=40)
    labels = encoding.encode(teacher, random_ids(3, 40))
    assert (labels["tail"] == ABSENT).all()
    pair = encoding.align(logits, labels)
    assert pair.student.isfinite().all()
    assert pair.teacher.isfinite().all()
    torch.testing.assert_close(pair.student[:, :-1], logits.log_softmax(1).gather(1, labels["ids"].long()))
    grad = oracle.gradient(lambda z: encoding.align(z, labels).student[:, 0], logits)
    expected = oracle.gradient(lambda z: z.log_softmax(1).gather(1, labels["ids"].long()[:, :1]), logits)
    torch.testing.assert_close(grad, expected)


def test_more_ids_than_the_vocabulary_has_are_refused_with_its_size():
    with pytest.raises(ValueError, match=r"labels.k is 301.*V = 300"):
        Encoding(k=301).layout(shape(300))
    with pytest.raises(ValueError, match="V = 300"):
        Encoding(k=301).encode(torch.zeros(2, 300), random_ids(2, 300))


@pytest.mark.parametrize("parameters", [{"k": 0}, {"temperature": 0.0}, {"temperature": math.inf}])
def test_impossible_parameters_are_refused_by_name(parameters: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Encoding(**parameters)


@pytest.mark.parametrize(("v", "dtype"), [(65_536, torch.uint16), (65_537, torch.int32)])
def test_rows_survive_the_wire_bit_for_bit(v: int, dtype: torch.dtype):
    encoding, target_ids = Encoding(k=5), random_ids(4, v)
    logits = torch.zeros(4, v)
    logits[:, -5:] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # the largest ids there are
    made, layout = encoding.encode(logits, target_ids), encoding.layout(shape(v))
    assert made["ids"].dtype == dtype
    sizes = [column.dtype.itemsize for column in layout]
    assert sizes == sorted(sizes, reverse=True)
    columns = unpack_rows(pack_rows(made, layout).numpy(), layout)
    back = {c.name: torch.from_numpy(columns[c.name]).view(c.dtype) for c in layout}
    assert back["ids"].long().tolist() == [[v - 5, v - 4, v - 3, v - 2, v - 1]] * 4
    for name, values in made.items():
        assert back[name].dtype == values.dtype
        assert back[name].tolist() == values.tolist()


def test_the_mass_reported_is_the_mean_mass_of_the_kept_ids():
    logits = oracle.realistic_logits(20, 500, seed=13)
    made = Encoding(k=10).encode(logits, random_ids(20, 500))
    expected = oracle.probabilities(logits).topk(10).values.sum(1).mean().item()
    mass = Encoding(k=10).mass({name: column.numpy() for name, column in made.items() if name != "ids"})
    assert mass == pytest.approx(expected, abs=1e-6)


def test_columns_do_not_depend_on_how_many_rows_are_made_at_once_and_the_source_is_only_read():
    logits, target_ids = oracle.realistic_logits(50, 49_152, seed=14), random_ids(50, 49_152)
    before = logits.clone()
    whole = Encoding().encode(logits, target_ids)
    parts = [Encoding().encode(logits[i : i + 7], target_ids[i : i + 7]) for i in range(0, 50, 7)]
    for name, column in whole.items():
        assert torch.equal(column.float(), torch.cat([part[name] for part in parts]).float())
    assert torch.equal(logits, before)


def test_bfloat16_logits_and_forbidden_ids_give_finite_labels():
    logits = oracle.realistic_logits(3, 200, seed=15).bfloat16()
    logits[:, 4:] = -math.inf  # fewer possible ids than are kept
    made = Encoding(k=8).encode(logits, torch.tensor([0, 3, 9]))
    assert all(column.float().isfinite().all() for column in made.values())
    torch.testing.assert_close(made["logprobs"][:, :4].float().exp().sum(1), torch.ones(3), atol=2e-3, rtol=0.0)
    assert made["target"][2].item() == ABSENT

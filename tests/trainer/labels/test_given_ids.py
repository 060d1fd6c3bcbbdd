"""Labels on given ids against float64 brute force, and against top-k where the ids are the teacher's own."""

from __future__ import annotations

from itertools import pairwise

import loss_oracles as oracle
import numpy as np
import pytest
import torch
from loss_oracles import term

from trainer.labels import topk
from trainer.labels.encoding import ABSENT, TeacherShape, pack_rows, unpack_rows
from trainer.labels.given_ids import Encoding
from trainer.losses.objective import Objective

N, V = 7, 311
TEACHER, STUDENT = oracle.realistic_logits(N, V, seed=1), oracle.realistic_logits(N, V, seed=2)
TARGET_IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
TERMS = [term("forward_kl"), term("reverse_kl"), term("jsd", beta=0.3), term("skew_forward_kl", alpha=0.1)]


def students_ids(k: int, logits: torch.Tensor = STUDENT) -> torch.Tensor:
    return logits.topk(k, dim=1).indices.int()


def encoding_of(k: int, **parameters: object) -> Encoding:
    return Encoding(k=k, add_target=False, **parameters)


def exact(labels: dict[str, torch.Tensor], temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """Without the rounding of the wire, which is tested by itself."""
    wide = TEACHER.double().div(temperature).log_softmax(-1).gather(1, labels["ids"].long()).float()
    return {**labels, "logprobs": torch.where(labels["logprobs"] <= ABSENT, ABSENT, wide)}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("v", "k"), [(300, 16), (5_000, 64), (70_001, 64), (300, 1), (300, 299), (300, 300)])
def test_the_teachers_own_ids_give_the_labels_of_topk_to_the_bit(v: int, k: int, temperature: float):
    logits, target_ids = oracle.realistic_logits(5, v, seed=1), TARGET_IDS[:5] % v
    expected = topk.Encoding(k=k, temperature=temperature).encode(logits, target_ids)
    made = encoding_of(k, temperature=temperature).encode(logits, target_ids, expected["ids"].int())
    assert made.keys() == expected.keys()
    for name, column in expected.items():
        assert torch.equal(made[name], column), name


@pytest.mark.parametrize("cuts", [(0, 150, V), (0, 20, 300, V)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("more", [0, 30])
def test_shards_of_the_vocabulary_make_the_same_labels(more: int, temperature: float, cuts: tuple[int, ...]):
    ids = students_ids(12)
    ids[0] = torch.arange(290, 302)  # none of them in the first shard
    ids[1, 5:] = -1
    encoding = encoding_of(12, temperature=temperature, add_teacher_topk=more)
    whole = encoding.encode(TEACHER, TARGET_IDS, ids)
    shards = [encoding.encode_shard(TEACHER[:, a:b], TARGET_IDS, a, ids) for a, b in pairwise(cuts)]
    assert {shard.shape for shard in shards} == {(N, encoding.shard_width)}
    merged = encoding.merge_shards(shards, V)
    assert list(merged) == list(whole)
    for name, column in whole.items():
        assert merged[name].dtype == column.dtype
        torch.testing.assert_close(merged[name].double(), column.double(), atol=2e-3, rtol=1e-6)
    wrong = encoding.encode_shard(TEACHER[:, : cuts[1]], TARGET_IDS, 1, ids)
    moved = encoding.merge_shards([wrong, *shards[1:]], V)
    assert any((moved[name].double() - whole[name].double()).abs().max() > 0.01 for name in whole)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_columns_are_the_logprobs_of_the_given_ids_in_their_order_and_the_exact_rest(temperature: float):
    ids = students_ids(12)
    made = encoding_of(12, temperature=temperature).encode(TEACHER, TARGET_IDS, ids)
    p = oracle.probabilities(TEACHER, temperature)
    assert torch.equal(made["ids"].int(), ids)
    kept = p.gather(1, ids.long())
    torch.testing.assert_close(made["logprobs"].double(), kept.log(), atol=0.0, rtol=2**-10)
    torch.testing.assert_close(made["tail"].double().exp(), 1 - kept.sum(1, keepdim=True), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made["target"].double(), p.gather(1, TARGET_IDS[:, None]).log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("one", TERMS, ids=lambda one: one.loss)
def test_values_and_gradients_are_those_of_the_given_ids_and_one_tail(one: object, temperature: float):
    encoding, ids = encoding_of(10, temperature=temperature), students_ids(10)
    labels = exact(encoding.encode(TEACHER, TARGET_IDS, ids), temperature)
    objective = Objective.of((one,), encoding)

    def rows(logits: torch.Tensor) -> torch.Tensor:
        return objective.rows(logits, labels, TARGET_IDS, encoding)[0]

    def expected(logits: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
        p, q = (oracle.lump(oracle.probabilities(z, temperature), ids.long()) for z in (TEACHER, logits))
        return temperature**2 * oracle.DIVERGENCES[one.loss](p, q, **one.parameters())

    torch.testing.assert_close(rows(STUDENT).double(), expected(STUDENT), atol=3e-5, rtol=1e-5)
    gradient = oracle.gradient(rows, STUDENT).double()
    torch.testing.assert_close(gradient, oracle.gradient(expected, STUDENT.double()), atol=1e-5, rtol=1e-5)
    # The control: ids of the row before are another support, and another gradient.
    moved = oracle.gradient(lambda z: expected(z, ids.roll(1, 0)), STUDENT.double())
    assert (gradient - moved).abs().max() > 1e-2


def test_reverse_kl_on_the_students_ids_is_near_the_whole_one_and_on_the_teachers_ids_is_not():
    """Where both are sure of different things, as a student before training is."""
    teacher, student = 3 * TEACHER, 3 * STUDENT
    whole = oracle.reverse_kl(oracle.probabilities(teacher), oracle.probabilities(student))
    value = {}
    for whose, logits in {"student": student, "teacher": teacher}.items():
        labels = encoding_of(16).encode(teacher, TARGET_IDS, students_ids(16, logits))
        objective = Objective.of((term("reverse_kl"),), encoding_of(16))
        value[whose] = objective.rows(student, labels, TARGET_IDS, encoding_of(16))[0].double()
        assert (value[whose] <= whole + 5e-2).all()  # the wire rounds by 2^-11 of each logprob
    assert value["student"].mean() > 0.9 * whole.mean() > value["teacher"].mean()


@pytest.mark.parametrize("one", TERMS, ids=lambda one: one.loss)
def test_the_bound_rises_with_the_ids_and_is_the_value_where_all_are_given(one: object):
    p, q = oracle.probabilities(TEACHER), oracle.probabilities(STUDENT)
    whole = oracle.DIVERGENCES[one.loss](p, q, **one.parameters())
    before = torch.zeros(N, dtype=torch.float64)
    for k in (1, 4, 32, 200, V):
        encoding = encoding_of(k)
        labels = exact(encoding.encode(TEACHER, TARGET_IDS, students_ids(k)))
        value = Objective.of((one,), encoding).rows(STUDENT, labels, TARGET_IDS, encoding)[0].double()
        assert (value >= before - 1e-5).all()
        assert (value <= whole + 1e-4).all()
        before = value
    torch.testing.assert_close(before, whole, atol=1e-4, rtol=1e-4)


def test_a_row_with_fewer_ids_says_what_it_says_alone():
    ids = students_ids(9)
    ids[::2, 4:] = -1
    ids[3, 1:] = -1
    labels = exact(encoding_of(9).encode(TEACHER, TARGET_IDS, ids))
    for row in range(N):
        own = ids[row : row + 1, : int((ids[row] >= 0).sum())]
        alone = encoding_of(own.shape[1])
        expected = exact_row(alone, row, own)
        for one in TERMS:
            found, wanted = [], []
            for encoding, columns, into in (
                (encoding_of(9), {name: column[row : row + 1] for name, column in labels.items()}, found),
                (alone, expected, wanted),
            ):
                logits = STUDENT[row : row + 1].clone().requires_grad_()
                objective = Objective.of((one,), encoding)
                loss = objective.rows(logits, columns, TARGET_IDS[row : row + 1], encoding)[0]
                into += [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def exact_row(encoding: Encoding, row: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    made = encoding.encode(TEACHER[row : row + 1], TARGET_IDS[row : row + 1], ids)
    wide = TEACHER[row : row + 1].double().log_softmax(-1).gather(1, ids.long()).float()
    return {**made, "logprobs": wide}


def test_the_teacher_adds_its_likeliest_ids_that_are_not_given():
    ids = students_ids(8)
    made = encoding_of(8, add_teacher_topk=5).encode(TEACHER, TARGET_IDS, ids)
    assert torch.equal(made["ids"][:, :8].int(), ids)
    for row in range(N):
        others = [i for i in TEACHER[row].argsort(descending=True).tolist() if i not in ids[row].tolist()]
        assert made["ids"][row, 8:].tolist() == others[:5]
    p = oracle.probabilities(TEACHER).gather(1, made["ids"].long())
    torch.testing.assert_close(made["logprobs"].double(), p.log(), atol=0.0, rtol=2**-10)
    torch.testing.assert_close(made["tail"].double().exp(), 1 - p.sum(1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_more_ids_than_a_vocabulary_has_are_refused_with_what_to_write():
    shape = TeacherShape(vocabulary_size=20, hidden_size=8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"keep 21 ids.*k: 16, add_target: true, add_teacher_topk: 4.*V = 20"):
        Encoding(k=16, add_teacher_topk=4).layout(shape)


@pytest.mark.parametrize(("v", "bytes_of_an_id"), [(65_536, 2), (65_537, 4)])
def test_rows_survive_the_wire_at_their_price(v: int, bytes_of_an_id: int):
    encoding = Encoding(k=64, add_teacher_topk=16)
    layout = encoding.layout(TeacherShape(vocabulary_size=v, hidden_size=8, dtype=torch.float32))
    logits = oracle.realistic_logits(3, v, seed=9)
    made = encoding.encode(logits, torch.zeros(3, dtype=torch.int64), logits.topk(65).indices.int())
    packed = pack_rows(made, layout).numpy()
    assert packed.shape[1] == 8 + 81 * (2 + bytes_of_an_id)
    columns = unpack_rows(packed, layout)
    assert np.array_equal(columns["ids"].astype(np.int64), made["ids"].long().numpy())
    assert encoding.mass(columns) == pytest.approx(float(1 - made["tail"].double().exp().mean()))

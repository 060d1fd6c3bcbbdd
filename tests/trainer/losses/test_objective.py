"""Every encoding times every loss times temperatures against float64 brute force, values and gradients."""

from __future__ import annotations

import loss_oracles as oracle
import pytest
import torch
from loss_oracles import term

from configs.losses import LOSSES, Term
from trainer.labels import dense, hidden, topk
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

N, V, H = 9, 211, 24
STUDENT = oracle.realistic_logits(N, V, seed=3)
TARGET_IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))
TEACHER_HIDDEN = torch.randn(N, H, generator=torch.Generator().manual_seed(5))
HEAD = Head(torch.randn(V, H, generator=torch.Generator().manual_seed(6)), None, HeadShape(), V)
TEACHER = TEACHER_HIDDEN @ HEAD.weight.T

OBJECTIVES = [
    (term("forward_kl"),),
    (term("reverse_kl"),),
    (term("jsd", beta=0.1),),
    (term("jsd", beta=0.9),),
    (term("skew_forward_kl", alpha=0.1),),
    (term("cross_entropy"),),
    (term("forward_kl", 0.7), term("cross_entropy", 0.3), term("jsd", 2.0, 0.5)),
]
ENCODINGS = {"topk": topk.Encoding, "hidden": hidden.Encoding, "dense": dense.Encoding}


def source_of(encoding: object) -> torch.Tensor:
    return TEACHER if encoding.needs == "logits" else TEACHER_HIDDEN


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("terms", OBJECTIVES, ids=lambda terms: "+".join(t.loss for t in terms))
@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_rows_and_gradients_equal_brute_force(kind: str, terms: tuple[Term, ...], temperature: float):
    encoding = ENCODINGS[kind](temperature=temperature, **({"k": 12} if kind == "topk" else {}))
    labels = encoding.encode(source_of(encoding), TARGET_IDS)
    if kind == "topk":  # float16 on the wire is tested elsewhere; here the arithmetic is
        labels["logprobs"] = TEACHER.double().div(temperature).log_softmax(-1).gather(1, labels["ids"].long()).float()
    objective = Objective.of(terms, encoding)
    k = 12 if kind == "topk" else None

    def rows(logits: torch.Tensor) -> torch.Tensor:
        return objective.rows(logits, labels, TARGET_IDS, encoding, HEAD)[0]

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return oracle.objective(terms, logits, TEACHER, TARGET_IDS, temperature=temperature, k=k)

    torch.testing.assert_close(rows(STUDENT).double(), expected(STUDENT), atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(
        oracle.gradient(rows, STUDENT).double(), oracle.gradient(expected, STUDENT.double()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("terms", OBJECTIVES[:5], ids=lambda terms: terms[0].loss)
def test_topk_is_a_lower_bound_that_grows_with_k_up_to_the_full_divergence(terms: tuple[Term, ...]):
    full = oracle.objective(terms, STUDENT, TEACHER, TARGET_IDS).float()
    previous = torch.zeros(N)
    for k in (1, 2, 8, 32, 128, V - 1, V):
        encoding = topk.Encoding(k=k)
        labels = encoding.encode(TEACHER, TARGET_IDS)
        rows, _ = Objective.of(terms, encoding).rows(STUDENT, labels, TARGET_IDS, encoding)
        slack = 0.01 * full + 1e-3  # float16 log-probabilities
        assert (rows <= full + slack).all()
        assert (rows >= previous - slack).all()
        previous = rows
    torch.testing.assert_close(previous, full, atol=2e-3, rtol=5e-3)


def test_hidden_and_dense_labels_give_the_same_rows():
    values = []
    for encoding in (hidden.Encoding(temperature=1.5), dense.Encoding(temperature=1.5)):
        labels = encoding.encode(source_of(encoding), TARGET_IDS)
        values.append(Objective.of(OBJECTIVES[0], encoding).rows(STUDENT, labels, TARGET_IDS, encoding, HEAD)[0])
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(kind: str):
    encoding = ENCODINGS[kind]()
    labels = encoding.encode(source_of(encoding), TARGET_IDS)
    objective = Objective.of((term("forward_kl"), term("reverse_kl"), term("jsd", beta=0.5)), encoding)
    rows, _ = objective.rows(TEACHER, labels, TARGET_IDS, encoding, HEAD)
    grad = oracle.gradient(lambda z: objective.rows(z, labels, TARGET_IDS, encoding, HEAD)[0], TEACHER)
    tolerance = 1e-4 if kind == "topk" else 1e-5  # float16 log-probabilities
    assert rows.abs().max() < tolerance
    assert grad.abs().max() < 20 * tolerance


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_labels_shifted_by_one_row_change_the_loss_a_lot(kind: str):
    encoding = ENCODINGS[kind]()
    objective = Objective.of((term("forward_kl"),), encoding)
    labels = encoding.encode(source_of(encoding), TARGET_IDS)
    shifted = {name: column.roll(1, 0) for name, column in labels.items()}
    near_teacher = TEACHER + 0.1 * STUDENT
    right = objective.rows(near_teacher, labels, TARGET_IDS, encoding, HEAD)[0].mean()
    wrong = objective.rows(near_teacher, shifted, TARGET_IDS, encoding, HEAD)[0].mean()
    assert wrong > 10 * right


def test_terms_are_reported_bare_and_cross_entropy_stays_at_temperature_one():
    encoding = dense.Encoding(temperature=3.0)
    labels = encoding.encode(TEACHER, TARGET_IDS)
    objective = Objective.of((term("forward_kl", 5.0), term("cross_entropy", 7.0)), encoding)
    _, terms = objective.rows(STUDENT, labels, TARGET_IDS, encoding)
    p, q = oracle.probabilities(TEACHER, 3.0), oracle.probabilities(STUDENT, 3.0)
    torch.testing.assert_close(terms["forward_kl"].double(), oracle.forward_kl(p, q), atol=1e-5, rtol=1e-5)
    cross_entropy = -oracle.probabilities(STUDENT).gather(1, TARGET_IDS[:, None])[:, 0].log()
    torch.testing.assert_close(terms["cross_entropy"].double(), cross_entropy, atol=1e-5, rtol=1e-5)


def test_a_loss_named_twice_gets_a_number():
    objective = Objective.of((term("jsd", beta=0.1), term("jsd", beta=0.9)), dense.Encoding())
    assert objective.names == ("jsd", "jsd_2")


def test_a_term_of_a_user_is_computed_by_the_function_of_its_file():
    encoding = dense.Encoding()
    labels = encoding.encode(TEACHER, TARGET_IDS)
    own = LOSSES.validate({"loss": "fakes.half_kl", "part": 0.25, "weight": 2.0})
    loss, values = Objective.of((own,), encoding).rows(STUDENT, labels, TARGET_IDS, encoding)
    expected = oracle.forward_kl(oracle.probabilities(TEACHER), oracle.probabilities(STUDENT))
    torch.testing.assert_close(values["fakes.half_kl"].double(), 0.25 * expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.double(), 0.5 * expected, atol=1e-5, rtol=1e-5)


def test_the_schema_s_terms_are_what_an_objective_is_made_of():
    from configs.losses import CrossEntropy, Jsd

    objective = Objective.of((Jsd(beta=0.5), CrossEntropy(weight=0.1)), dense.Encoding())
    assert objective.names == ("jsd", "cross_entropy")
    assert objective.needs_labels


def test_cross_entropy_alone_never_looks_at_the_labels():
    encoding = dense.Encoding()
    objective = Objective.of((term("cross_entropy"),), encoding)
    rows, _ = objective.rows(STUDENT, {}, TARGET_IDS, encoding)
    assert not objective.needs_labels
    assert rows.shape == (N,)

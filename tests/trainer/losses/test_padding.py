"""The term for rows of the head beyond the vocabulary: float64 oracles, and what it does to a student that trains."""

from __future__ import annotations

import loss_oracles as oracle
import pytest
import torch
from loss_oracles import one_part, term
from tiny_models import tiny_model

from trainer.labels import dense, hidden, topk
from trainer.losses.fused import HeadLoss, head_loss
from trainer.losses.objective import Objective
from trainer.losses.padding import padding_nats
from trainer.model.head import Head, HeadShape
from trainer.model.load import StudentModule

V, ROWS = 283, 320
N = 45
ENCODINGS = {"topk": topk.Encoding(k=16), "hidden": hidden.Encoding(), "dense": dense.Encoding()}
MIX = (term("forward_kl", 0.8), term("reverse_kl", 0.2), term("jsd", 0.3, 0.4), term("cross_entropy"))
LOGITS = oracle.realistic_logits(N, ROWS, seed=3)
TEACHER = oracle.realistic_logits(N, V, seed=4)
TARGET_IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shift", [0.0, -40.0, 30.0])
def test_value_and_gradient_equal_float64_however_small_or_large_the_mass(shift: float) -> None:
    """At -40 the mass is about 1e-17: one minus it is 1 in any float."""
    logits = LOGITS.clone()
    logits[:, V:] += shift
    ours = oracle.gradient(lambda z: padding_nats(z[:, :V], z[:, V:]), logits)
    q = oracle.probabilities(logits)
    mass = q[:, V:].sum(1, keepdim=True)
    inside = oracle.probabilities(logits[:, :V])
    expected = torch.cat([-mass * inside, q[:, V:]], 1)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-4, atol=1e-30)
    value = padding_nats(logits[:, :V], logits[:, V:]).double()
    exact = -torch.log1p(-mass[:, 0]) if shift <= 0 else oracle.padding_nats(logits, V)
    torch.testing.assert_close(value, exact, rtol=2e-4, atol=1e-30)


def test_with_forward_kl_and_cross_entropy_it_is_the_loss_over_all_rows() -> None:
    encoding = dense.Encoding()
    terms = (term("forward_kl", 0.7), term("cross_entropy", 0.3))
    objective = Objective.of(terms, encoding, padded=True)
    labels = encoding.encode(TEACHER, TARGET_IDS)
    everywhere = torch.cat([TEACHER, torch.full((N, ROWS - V), float("-inf"))], 1)  # a teacher without mass there

    def rows(logits: torch.Tensor) -> torch.Tensor:
        return objective.rows(logits[:, :V], labels, TARGET_IDS, encoding, None, logits[:, V:])[0]

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return oracle.objective(terms, logits, everywhere, TARGET_IDS)

    torch.testing.assert_close(rows(LOGITS).double(), expected(LOGITS), atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(
        oracle.gradient(rows, LOGITS).double(), oracle.gradient(expected, LOGITS.double()), atol=1e-5, rtol=1e-5
    )


def _fused(
    parameters: tuple[torch.Tensor, ...], shape: HeadShape, kind: str, head: Head, **changes: object
) -> HeadLoss:
    encoding = ENCODINGS[kind]
    states = torch.randn(N, head.weight.shape[1], generator=torch.Generator().manual_seed(9))
    source = states if kind == "hidden" else head.logits(states)
    given = {"chunk_rows": 16, "padded": True, **changes}
    objective = Objective.of(MIX, encoding, padded=bool(given["padded"]))
    labels = encoding.encode(source, TARGET_IDS)
    return head_loss(
        *parameters,
        TARGET_IDS,
        head_shape=shape,
        vocabulary_size=V,
        parts=one_part(labels, encoding, objective, num_rows=N, scale=0.25, teacher_head=head),
        chunk_rows=given["chunk_rows"],
    )


def _parameters(rows: int = ROWS) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    made = torch.randn(N, 24, generator=g), torch.randn(ROWS, 24, generator=g) * 0.6, torch.randn(ROWS, generator=g)
    return tuple(t[:rows].clone().requires_grad_(True) for t in made)


HEAD = Head(torch.randn(V, 32, generator=torch.Generator().manual_seed(1)) * 0.6, None, HeadShape(), V)


@pytest.mark.parametrize("chunk_rows", [7, 1000])
@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.5, soft_cap=4.0)])
@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_the_fused_loss_and_its_gradients_equal_the_unfused_float64_formula(
    kind: str, shape: HeadShape, chunk_rows: int
) -> None:
    parameters = _parameters()
    result = _fused(parameters, shape, kind, HEAD, chunk_rows=chunk_rows)
    states, weight, bias = (p.double() for p in parameters)
    logits = (states @ weight.T + bias) * shape.scale
    if shape.soft_cap is not None:
        logits = shape.soft_cap * torch.tanh(logits / shape.soft_cap)
    teacher = HEAD.logits(torch.randn(N, 32, generator=torch.Generator().manual_seed(9)))
    inside = oracle.objective(MIX, logits[:, :V], teacher, TARGET_IDS, k=16 if kind == "topk" else None)
    padding = oracle.padding_nats(logits, V)
    expected = 0.25 * (inside + 2.3 * padding).sum()
    tolerance = 1e-3 if kind == "topk" else 1e-5  # float16 log-probabilities
    torch.testing.assert_close(result.loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.sums[0]["padding"], padding.sum().detach(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(result.loss, parameters)
    for actual, exact in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    assert (found[1][V:].abs().sum(1) > 0).all()


def test_a_head_as_large_as_the_vocabulary_trains_bit_for_bit_as_without_the_term() -> None:
    results = []
    for padded in (False, True):
        parameters = _parameters(rows=V)
        loss = _fused(parameters, HeadShape(), "topk", HEAD, padded=padded).loss
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    assert all(torch.equal(plain, counted) for plain, counted in zip(*results, strict=True))


def _trained(kind: str, *, tied: bool, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty steps of a tiny student on one text; (its mass beyond the vocabulary, the teacher's), by transformers."""
    teacher, student = tiny_model("llama", tied=tied, seed=1), tiny_model("llama", tied=tied, seed=2)
    module, encoding = StudentModule(student), ENCODINGS[kind]
    ids = torch.randint(3, V, (1, 40), generator=torch.Generator().manual_seed(1))
    target_ids, positions = torch.cat([ids[0, 1:], ids[0, :1]]), torch.arange(40)
    with torch.no_grad():
        states = teacher.model(ids).last_hidden_state[0]
        head = Head(teacher.lm_head.weight[:V], None, HeadShape(), V)
        labels = encoding.encode(states if kind == "hidden" else head.logits(states), target_ids)
        theirs = teacher(ids).logits[0].softmax(-1)[:, V:].sum(-1).mean()
    objective = Objective.of((term("forward_kl"),), encoding, padded=padded)

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        result = head_loss(
            hidden,
            weight,
            bias,
            target_ids,
            head_shape=module.head_shape,
            vocabulary_size=V,
            parts=one_part(labels, encoding, objective, num_rows=40, scale=1 / 40, teacher_head=head),
        )
        return (result.loss,)

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        (loss,) = module(ids, positions[None], positions, loss_of)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        hidden = student.model(ids).last_hidden_state[0]
        return (hidden @ student.lm_head.weight.T).softmax(-1)[:, V:].sum(-1).mean(), theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_a_trained_student_puts_no_more_on_ids_that_do_not_exist_than_its_teacher(kind: str, tied: bool) -> None:
    ours, theirs = _trained(kind, tied=tied, padded=True)
    assert ours < theirs
    ignored, _ = _trained(kind, tied=tied, padded=False)  # what nothing keeps small
    assert ignored > 5 * ours

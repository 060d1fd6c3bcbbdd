"""The fused head loss against the unfused formula on the whole [rows, vocabulary] tensor in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import loss_oracles as oracle
import pytest
import torch
from loss_oracles import one_part, term
from torch.utils.checkpoint import checkpoint

from configs.losses import Term
from trainer.labels import dense, hidden, topk
from trainer.losses.fused import HeadLoss, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

N, V, PADDED, H, TEACHER_H = 45, 307, 320, 24, 32
SHAPES = {"plain": HeadShape(), "capped": HeadShape(scale=0.5, soft_cap=4.0)}
MIX = (
    term("forward_kl", 0.8),
    term("reverse_kl", 0.1),
    term("jsd", 0.3, 0.4),
    term("skew_forward_kl", 0.4, alpha=0.2),
    term("cross_entropy"),
)
ENCODINGS = {
    "topk": topk.Encoding(k=V - 60, temperature=1.3),
    "hidden": hidden.Encoding(temperature=1.3),
    "dense": dense.Encoding(temperature=1.3),
}


@dataclass
class Case:
    """A student's head with poisoned padding, a teacher, and labels of one encoding."""

    encoding: object
    terms: tuple[Term, ...]
    shape: HeadShape
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target_ids: torch.Tensor
    teacher_head: Head
    teacher_hidden: torch.Tensor
    labels: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, kind: str, *, terms: tuple[Term, ...] = MIX, shape: str = "plain", rows: int = N) -> Case:
        g = torch.Generator().manual_seed(0)
        encoding = ENCODINGS[kind]
        weight, bias = torch.randn(PADDED, H, generator=g) * 0.6, torch.randn(PADDED, generator=g)
        weight[V:], bias[V:] = 1e4, 1e4
        teacher_weight = torch.randn(PADDED, TEACHER_H, generator=g) * 0.6
        teacher_weight[V:] = 1e4
        head = Head(teacher_weight, None, HeadShape(), V)
        student_hidden, teacher_hidden = torch.randn(N, H, generator=g), torch.randn(N, TEACHER_H, generator=g)
        target_ids = torch.randint(V, (N,), generator=g)
        source = teacher_hidden if encoding.needs == "hidden" else head.logits(teacher_hidden)
        labels = {name: column[:rows] for name, column in encoding.encode(source, target_ids).items()}
        return cls(
            encoding, terms, SHAPES[shape], student_hidden[:rows].requires_grad_(True), weight.requires_grad_(True),
            bias.requires_grad_(True), target_ids[:rows], head, teacher_hidden[:rows], labels,
        )  # fmt: skip

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight, self.bias

    def fused(self, *, chunk_rows: int = 16, scale: float = 0.25, bias: bool = True, **changes: object) -> HeadLoss:
        given = {"labels": self.labels, "weight": self.weight, "hidden": self.hidden, **changes}
        objective = Objective.of(self.terms, self.encoding)
        return head_loss(
            given["hidden"],
            given["weight"],
            self.bias if bias else None,
            self.target_ids,
            head_shape=self.shape,
            vocabulary_size=V,
            parts=one_part(
                given["labels"],
                self.encoding,
                objective,
                num_rows=len(self.target_ids),
                scale=scale,
                teacher_head=self.teacher_head,
            ),
            chunk_rows=chunk_rows,
        )

    def unfused(self, *, scale: float = 0.25, bias: bool = True) -> torch.Tensor:
        """float64, from the definitions; for top-k labels of the exact (not the float16) log-probabilities."""
        logits = self.hidden.double() @ self.weight[:V].double().T + (self.bias[:V].double() if bias else 0.0)
        logits = logits * self.shape.scale
        if self.shape.soft_cap is not None:
            logits = self.shape.soft_cap * torch.tanh(logits / self.shape.soft_cap)
        teacher = self.teacher_head.logits(self.teacher_hidden)
        k = self.encoding.k if isinstance(self.encoding, topk.Encoding) else None
        rows = oracle.objective(
            self.terms, logits, teacher, self.target_ids, temperature=self.encoding.temperature, k=k
        )
        return scale * rows.sum()


def gradients_of(loss: torch.Tensor, case: Case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, case.parameters))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_value_and_gradients_equal_the_unfused_float64_formula(kind: str, shape: str):
    case = Case.of(kind, shape=shape)
    loss, expected = case.fused().loss, case.unfused()
    tolerance = 1e-3 if kind == "topk" else 1e-5  # float16 log-probabilities
    assert_close(loss, expected, tolerance)
    for actual, exact in zip(gradients_of(loss, case), gradients_of(expected, case), strict=True):
        assert_close(actual, exact, tolerance)


@pytest.mark.parametrize("terms", [(term,) for term in MIX], ids=lambda terms: terms[0].loss)
@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_each_term_alone_equals_its_rows_and_reports_its_bare_sum(kind: str, terms: tuple[Term, ...]):
    case = Case.of(kind, terms=terms)
    objective = Objective.of(terms, case.encoding)
    logits = torch.nn.functional.linear(case.hidden, case.weight[:V], case.bias[:V])
    rows, values = objective.rows(logits, case.labels, case.target_ids, case.encoding, case.teacher_head)
    result = case.fused(scale=1.0)
    assert_close(result.loss, rows.sum())
    (sums,) = result.sums
    assert_close(sums[terms[0].loss], values[terms[0].loss].sum())
    assert sums[terms[0].loss].dtype is torch.float64
    for actual, exact in zip(gradients_of(result.loss, case), gradients_of(rows.sum(), case), strict=True):
        assert_close(actual, exact)


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_the_chunk_size_changes_nothing(kind: str):
    case = Case.of(kind)
    whole = case.fused(chunk_rows=1000)
    expected = gradients_of(whole.loss, case)
    for chunk_rows in (1, 7, 32, 45):
        result = case.fused(chunk_rows=chunk_rows)
        assert_close(result.loss, whole.loss, 1e-6)
        for actual, exact in zip(gradients_of(result.loss, case), expected, strict=True):
            assert_close(actual, exact, 1e-6)


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_padded_rows_never_enter_and_get_gradient_exactly_zero(kind: str):
    case = Case.of(kind)
    loss = case.fused().loss
    _, weight, bias = gradients_of(loss, case)
    assert (weight[V:] == 0).all()
    assert (bias[V:] == 0).all()
    assert (weight[:V].abs().sum(1) > 0).all()
    with torch.no_grad():
        case.weight[V:], case.bias[V:], case.teacher_head.weight[V:] = -7.0, float("nan"), float("inf")
    assert torch.equal(case.fused().loss, loss)


def test_labels_shifted_by_one_row_change_the_loss_a_lot():
    case = Case.of("dense", terms=(term("forward_kl"),))
    teacher = case.teacher_head
    twin = {"hidden": case.teacher_hidden, "weight": teacher.weight}
    right = case.fused(bias=False, **twin).loss
    wrong = case.fused(bias=False, labels={"logprobs": case.labels["logprobs"].roll(1, 0)}, **twin).loss
    assert right.abs() < 1e-4
    assert wrong > 10


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_a_student_equal_to_its_teacher_stands_still(kind: str):
    case = Case.of(kind, terms=(term("forward_kl"), term("reverse_kl"), term("jsd", beta=0.5)))
    states = case.teacher_hidden.clone().requires_grad_(True)
    weight = case.teacher_head.weight.clone().requires_grad_(True)
    result = case.fused(bias=False, hidden=states, weight=weight, scale=1 / N)
    gradients = torch.autograd.grad(result.loss, (states, weight))
    tolerance = 2e-3 if kind == "topk" else 1e-6
    assert result.loss.abs() < tolerance
    assert all(gradient.abs().max() < tolerance for gradient in gradients)


def test_no_rows_give_a_loss_of_zero_with_a_working_backward():
    case = Case.of("hidden", rows=0)
    result = case.fused()
    result.loss.backward()
    assert result.loss == 0.0
    (sums,) = result.sums
    assert tuple(sums) == ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "cross_entropy")
    assert all(value == 0.0 for value in sums.values())
    assert case.hidden.grad.shape == (0, H)
    assert (case.weight.grad == 0).all()
    assert case.weight.grad.shape == (PADDED, H)
    assert (case.bias.grad == 0).all()


def test_a_frozen_weight_gets_neither_gradient_nor_buffer():
    case = Case.of("topk")
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    seen = NewTensors()
    with seen:
        case.fused(chunk_rows=4).loss.backward()
    assert case.weight.grad is None
    assert case.bias.grad is None
    assert seen.shapes.isdisjoint({(V, H), (PADDED, H)})
    assert seen.shapes.isdisjoint({(V,), (PADDED,)})
    assert_close(case.hidden.grad, torch.autograd.grad(case.unfused(), case.hidden)[0], 1e-3)


def test_without_gradients_only_values_are_computed():
    case = Case.of("dense")
    expected = case.fused()
    with torch.no_grad():
        result = case.fused()
    assert not result.loss.requires_grad
    assert_close(result.loss, expected.loss)
    assert {name: value.item() for name, value in result.sums[0].items()} == pytest.approx(
        {name: value.item() for name, value in expected.sums[0].items()}
    )


def test_what_multiplies_the_loss_afterwards_multiplies_the_gradients():
    case = Case.of("dense")
    plain, scaled = gradients_of(case.fused().loss, case), gradients_of(case.fused().loss * 0.125, case)
    for one, eighth in zip(plain, scaled, strict=True):
        assert_close(eighth, one * 0.125, 1e-6)


def test_a_second_backward_is_refused_and_not_wrong():
    case = Case.of("dense")
    loss = case.fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_around_the_head_changes_nothing(reentrant: bool):
    case = Case.of("topk")
    expected = gradients_of(case.fused().loss, case)
    checkpoint(
        lambda h, w, b: case.fused(hidden=h, weight=w).loss, *case.parameters, use_reentrant=reentrant
    ).backward()
    for parameter, exact in zip(case.parameters, expected, strict=True):
        assert_close(parameter.grad, exact, 1e-6)


class CountingEncoding:
    """An encoding that counts how often a pair is asked for."""

    needs = "logits"

    def __init__(self, inner: topk.Encoding) -> None:
        self.inner, self.temperature, self.pairs = inner, inner.temperature, 0
        self.layout, self.encode, self.mass, self.prepare = inner.layout, inner.encode, inner.mass, inner.prepare

    def align(self, logits, labels, teacher_head):
        self.pairs += 1
        return self.inner.align(logits, labels, teacher_head)


def test_an_activation_checkpoint_does_not_make_the_head_compute_twice():
    case = Case.of("topk", terms=(term("forward_kl"),))
    case.encoding = CountingEncoding(case.encoding)
    checkpoint(lambda h: case.fused(hidden=h, chunk_rows=N).loss, case.hidden, use_reentrant=False).backward()
    assert case.encoding.pairs == 1


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_bfloat16_follows_float32_within_its_rounding_whatever_the_scale(kind: str):
    exact = Case.of(kind, terms=(term("forward_kl"),))
    half = Case.of(kind, terms=(term("forward_kl"),))
    for name in ("hidden", "weight", "bias"):
        value = getattr(exact, name).detach()
        with torch.no_grad():
            value.copy_(value.bfloat16())
        setattr(half, name, value.bfloat16().requires_grad_(True))
    for scale in (1.0, 1e-6):
        full, rounded = exact.fused(scale=scale), half.fused(scale=scale)
        assert rounded.loss.dtype is torch.float32
        torch.testing.assert_close(rounded.loss, full.loss, rtol=2e-2, atol=0.0)
        for ours, theirs in zip(gradients_of(rounded.loss, half), gradients_of(full.loss, exact), strict=True):
            assert ours.dtype is torch.bfloat16
            assert (ours.float() - theirs).norm() < 2e-2 * theirs.norm()


class NewTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """Shapes of everything that operations allocate; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(output.shape))
        return result


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
def test_no_tensor_of_all_rows_by_vocabulary_ever_exists(kind: str):
    case = Case.of(kind)
    seen = NewTensors()
    with seen:
        case.fused(chunk_rows=8).loss.backward()
    assert max(rows for rows, width in (s for s in seen.shapes if len(s) == 2) if V <= width <= PADDED) == 32
    assert (V, H) in seen.shapes  # and the gradient of the weight is seen


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_peak_memory_is_a_few_chunks_however_many_rows_there_are():
    rows, vocabulary, width = 4096, 8192, 32
    encoding = topk.Encoding(k=8)
    states = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = {
        "ids": torch.randint(vocabulary, (rows, 1)) // 8 + torch.arange(8) * (vocabulary // 8),
        "logprobs": torch.full((rows, 8), -3.0),
        "tail": torch.full((rows, 1), -0.5),
    }

    def added_mb(chunk_rows: int) -> float:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_mb("VmRSS")
        head_loss(
            states,
            weight,
            None,
            torch.zeros(rows, dtype=torch.int64),
            head_shape=HeadShape(),
            vocabulary_size=vocabulary,
            parts=one_part(labels, encoding, Objective.of((term("forward_kl"),), encoding), num_rows=rows, scale=1.0),
            chunk_rows=chunk_rows,
        ).loss.backward()
        return _status_mb("VmHWM") - before

    added_mb(128)  # first-call code and arenas
    assert added_mb(128) < 40  # [4096, 8192] float32 alone is 134 MB
    assert added_mb(rows) > 100  # the measurement sees it when it does exist


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))

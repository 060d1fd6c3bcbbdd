"""Labels of another vocabulary on the student's side, against brute force in float64 over every event, and their
gradients by the student's logits; with equal vocabularies they are the plain loss."""

from __future__ import annotations

import loss_oracles as oracle
import numpy as np
import pytest
import torch

from configs.alignment import ALIGNMENTS
from configs.labels import LABELS
from trainer.align.aligner import SharedIds
from trainer.labels.encoding import ALIGNED, load_encoding
from trainer.labels.token import LOGPROB
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

N, V_T, V_S, H = 11, 61, 47, 16
G = torch.Generator().manual_seed(3)
HEAD = Head(torch.randn(V_T, H, generator=G), None, HeadShape(), V_T)
HIDDEN = torch.randn(N, H, generator=G)
TEACHER = HIDDEN @ HEAD.weight.T
STUDENT = torch.randn(N, V_S, generator=G) * 2
TARGETS = torch.randint(V_S, (N,), generator=G)
TABLE = np.full(V_T, -1, dtype=np.int32)
TABLE[torch.randperm(V_T, generator=G)[:30].numpy()] = torch.randperm(V_S, generator=G)[:30].numpy()
SAME = np.random.default_rng(2).permutation(V_T).astype(np.int32)
"""Of a student with the same tokens under other ids."""


def shared(table: np.ndarray = TABLE, num_student: int = V_S) -> SharedIds:
    return SharedIds.of(table, num_student=num_student, device=torch.device("cpu"))


def labels_of(kind: str, *, temperature: float = 1.0, **parameters: object) -> tuple[object, dict[str, torch.Tensor]]:
    encoding = load_encoding(LABELS.validate({"kind": kind, "temperature": temperature, **parameters}))
    source = HIDDEN if encoding.needs == "hidden" else TEACHER
    return encoding, encoding.encode(source, torch.zeros(N, dtype=torch.int64)) | {ALIGNED: torch.ones(N, 1)}


def loss_rows(encoding: object, labels: dict[str, torch.Tensor], loss: str, logits: torch.Tensor) -> torch.Tensor:
    objective = Objective.of((oracle.term(loss),), encoding)
    rows, _ = objective.rows(logits, labels, TARGETS, encoding, HEAD)
    return rows


def lumped(kept: list[int], table: np.ndarray, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Events of one row, by a loop: the kept ids that both have, and the rest of each."""
    both = [i for i in kept if table[i] >= 0]
    mine, others = p[both], q[[int(table[i]) for i in both]]
    return torch.cat([mine, (1 - mine.sum())[None]]), torch.cat([others, (1 - others.sum())[None]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "by_hand"), [("forward_kl", oracle.forward_kl), ("reverse_kl", oracle.reverse_kl)])
@pytest.mark.parametrize(("kind", "k"), [("dense", 0), ("hidden", 0), ("topk", 9)])
def test_overlap_is_the_divergence_over_shared_tokens_and_one_event_of_all_others(
    kind: str, k: int, loss: str, by_hand: object, temperature: float
) -> None:
    encoding, labels = labels_of(kind, temperature=temperature, **({"k": k} if k else {}))
    aligned = ALIGNMENTS.load(ALIGNMENTS.validate("overlap")).encoding(encoding, shared())
    logits, exact = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    found = loss_rows(aligned, labels, loss, logits)
    p, q = oracle.probabilities(TEACHER, temperature), (exact / temperature).softmax(-1)
    kept = [TEACHER[i].argsort(descending=True)[:k].tolist() if k else list(range(V_T)) for i in range(N)]
    pairs = [lumped(kept[i], TABLE, p[i], q[i]) for i in range(N)]
    expected = temperature**2 * torch.stack([by_hand(a, b) for a, b in pairs])
    tolerance = 6e-3 if k else 1e-4  # float16 on the wire
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.double(), wanted, atol=tolerance, rtol=tolerance)
    moved = loss_rows(aligned, {name: column.roll(1, 0) for name, column in labels.items()}, loss, logits)
    assert (moved - expected).abs().max() > 20 * tolerance, "labels moved by one row are seen"
    other = ALIGNMENTS.load(ALIGNMENTS.validate("overlap")).encoding(encoding, shared(np.roll(TABLE, 1)))
    assert (loss_rows(other, labels, loss, logits) - expected).abs().max() > 20 * tolerance, "so are other ids"


def test_a_kept_token_that_the_student_lacks_is_mass_of_the_tail_on_both_sides() -> None:
    encoding, labels = labels_of("topk", k=5)
    nothing = np.full(V_T, -1, dtype=np.int32)
    aligned = ALIGNMENTS.load(ALIGNMENTS.validate("overlap")).encoding(encoding, shared(nothing))
    logits = STUDENT.clone().requires_grad_()
    found = loss_rows(aligned, labels, "forward_kl", logits)
    torch.testing.assert_close(found, torch.zeros(N), atol=1e-3, rtol=0)  # of float16: one event is certain
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "tvd"])
@pytest.mark.parametrize("kind", ["dense", "hidden", "topk"])
def test_with_equal_vocabularies_overlap_is_the_plain_loss(kind: str, loss: str) -> None:
    encoding, labels = labels_of(kind, **({"k": 9} if kind == "topk" else {}))
    aligned = ALIGNMENTS.load(ALIGNMENTS.validate("overlap")).encoding(encoding, shared(SAME, V_T))
    plain = torch.randn(N, V_T, generator=torch.Generator().manual_seed(6)).requires_grad_()
    moved = torch.empty_like(plain).index_copy(1, torch.from_numpy(SAME).long(), plain)
    ours, theirs = loss_rows(aligned, labels, loss, moved), loss_rows(encoding, labels, loss, plain)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
    gradients = [torch.autograd.grad(x.sum(), plain, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["dense", "hidden"])
def test_uld_is_the_distance_of_sorted_probabilities_filled_up_with_zeros(kind: str) -> None:
    encoding, labels = labels_of(kind)
    aligned = ALIGNMENTS.load(ALIGNMENTS.validate("uld")).encoding(encoding, shared())
    logits, exact = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    found = loss_rows(aligned, labels, "uld", logits)
    p, q = oracle.probabilities(TEACHER), exact.softmax(-1)
    rows = []
    for one, other in zip(p, q, strict=True):
        first = one.sort(descending=True).values
        second = torch.cat([other.sort(descending=True).values, other.new_zeros(V_T - V_S)])
        rows.append((first - second).abs().sum())
    expected = torch.stack(rows)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-5, rtol=1e-5)
    moved = loss_rows(aligned, {name: column.roll(1, 0) for name, column in labels.items()}, "uld", logits)
    assert (moved - expected).abs().max() > 1e-2
    equal = ALIGNMENTS.load(ALIGNMENTS.validate("uld")).encoding(encoding, shared(SAME, V_T))
    plain = torch.randn(N, V_T, generator=torch.Generator().manual_seed(6))
    assert torch.equal(loss_rows(equal, labels, "uld", plain), loss_rows(encoding, labels, "uld", plain))


@pytest.mark.parametrize("kind", ["dense", "hidden", "topk"])
def test_rows_without_a_partner_have_no_loss_and_no_gradient_by_terms_of_labels(kind: str) -> None:
    encoding, labels = labels_of(kind, **({"k": 9} if kind == "topk" else {}))
    aligned = ALIGNMENTS.load(ALIGNMENTS.validate("overlap")).encoding(encoding, shared())
    without = torch.tensor([0, 4, 10])
    present = torch.ones(N, 1).index_fill(0, without, 0)
    labels = {name: (column * present).to(column.dtype) for name, column in labels.items()}
    objective = Objective.of((oracle.term("forward_kl"), oracle.term("cross_entropy", 0.5)), aligned)
    logits = STUDENT.clone().requires_grad_()
    part = LossPart(slice(0, N), labels, aligned, objective, 1.0, HEAD)
    found = head_loss(
        logits, torch.eye(V_S), None, TARGETS, head_shape=HeadShape(), vocabulary_size=V_S, parts=[part], chunk_rows=4
    )
    (gradient,) = torch.autograd.grad(found.loss, logits)
    hard = STUDENT.clone().requires_grad_()
    nats = torch.nn.functional.cross_entropy(hard, TARGETS, reduction="none")
    (only_hard,) = torch.autograd.grad(0.5 * nats.sum(), hard)
    torch.testing.assert_close(gradient[without], only_hard[without], atol=1e-6, rtol=1e-6)
    kept = sorted(set(range(N)) - set(without.tolist()))
    assert (gradient[kept] - only_hard[kept]).abs().amax(1).min() > 1e-3
    rows = loss_rows(aligned, labels | {ALIGNED: torch.ones(N, 1)}, "forward_kl", STUDENT)
    torch.testing.assert_close(found.sums[0]["forward_kl"].float(), rows[kept].sum())


CHUNKS = torch.tensor([0, 0, 1, 4, 2, 2, 2, 3, 4, 4, 3])
"""Of each row; 4: in none."""


def chunk_loss(
    logits: torch.Tensor, chunks: torch.Tensor, reference: torch.Tensor, count: int, *, temperature: float
) -> torch.Tensor:
    encoding = load_encoding(LABELS.validate("token"))
    objective = Objective.of((oracle.term("chunk_kl", temperature=temperature),), encoding)
    part = LossPart(
        slice(0, N),
        {LOGPROB: reference[:, None]},
        encoding,
        objective,
        1.0,
        group_scale=1 / count,
        row_sequences=chunks,
        groups=tuple((chunk,) for chunk in range(count)),
        rewards=(None,) * (count + 1),
    )
    return head_loss(
        logits, torch.eye(V_S), None, TARGETS, head_shape=HeadShape(), vocabulary_size=V_S, parts=[part], chunk_rows=4
    ).loss


def binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return oracle.forward_kl(torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1))


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_chunk_kl_is_the_kl_of_whether_a_chunk_comes_and_so_is_its_gradient(temperature: float) -> None:
    of_teacher = torch.tensor([-0.7, -1.9, -0.02, -4.0])
    reference = torch.zeros(N)
    reference[[0, 2, 4, 7]] = of_teacher  # at the first row of each chunk
    reference[3] = -9.0  # of a row in none
    logits, exact = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    found = chunk_loss(logits, CHUNKS, reference, 4, temperature=temperature)
    logprobs = exact.log_softmax(-1)[torch.arange(N), TARGETS]
    q = torch.stack([logprobs[chunk == CHUNKS].sum() for chunk in range(4)]).exp()
    expected = temperature * binary_kl((of_teacher.double() / temperature).exp(), q ** (1 / temperature)).mean()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    (gradient,), (wanted,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-6, rtol=1e-4)
    assert not gradient[CHUNKS == 4].any(), "rows in no chunk have no gradient"
    assert abs(chunk_loss(logits, CHUNKS.roll(1), reference, 4, temperature=temperature) - expected) > 1e-2, (
        "moved rows are seen"
    )


def test_with_equal_tokenizers_chunk_kl_is_that_of_each_target_and_its_rest() -> None:
    p = oracle.probabilities(torch.randn(N, generator=G)[:, None].expand(N, 2) * torch.tensor([1.0, -1.0]))[:, 0]
    q = oracle.probabilities(STUDENT)[torch.arange(N), TARGETS]
    found = chunk_loss(STUDENT, torch.arange(N), p.log().float(), N, temperature=1.0)
    torch.testing.assert_close(found.double(), binary_kl(p, q).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_chunk_kl_is_finite_where_a_chunk_is_certain_or_impossible(temperature: float) -> None:
    certain = torch.zeros(N, V_S)
    certain[torch.arange(N), TARGETS] = 100.0
    for sign in (1, -1):
        logits = (sign * certain).requires_grad_()
        reference = torch.tensor([0.0, -1e4, -1.0] + [-0.5] * (N - 3))
        loss = chunk_loss(logits, torch.arange(N), reference, N, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()

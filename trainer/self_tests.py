"""Start-up self-tests of a student rank on the user's own devices, each with the numbers that decided it.

What is tested is what kernels, drivers and interconnects can break: attention over packed sequences, the loss kernel,
the head, a sum over ranks. They run on a few random tokens and the student's real weights, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from trainer.attention import border_arguments
from trainer.collectives import add_up, gather_objects
from trainer.heads import Head, HeadShape
from trainer.labels.encoding import Encoding
from trainer.losses.fused import head_loss
from trainer.losses.objective import Objective
from trainer.models import StudentModule

LENGTHS = (37, 24)  # of the two packed sequences
ROWS = 64
LOSS_VOCABULARY = 4096  # at most: the plain formula needs its own copies of this many rows of the head

KL_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # mean nats between two runs that should be equal
RELATIVE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest gradient


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """One test; `numbers` is shown to people whether it passed or not."""

    name: str
    passed: bool
    numbers: str


@dataclass(frozen=True, slots=True)
class Subject:
    """The rank under test. `forward` is the sharded model's forward, in evaluation mode."""

    module: StudentModule
    forward: Callable[..., tuple[torch.Tensor, ...]]
    attention: str
    encoding: Encoding
    objective: Objective
    vocabulary_size: int
    chunk_rows: int
    dtype: torch.dtype
    device: torch.device


@torch.no_grad()
def run_self_tests(subject: Subject) -> tuple[SelfTestResult, ...]:
    """All tests; collective, the same answer on all ranks: of a failing test, the numbers of the first rank it failed
    on."""
    on_host = subject.device.type == torch.empty(0).device.type
    kept = {"devices": []} if on_host else {"devices": [subject.device], "device_type": subject.device.type}
    with torch.random.fork_rng(**kept):
        torch.manual_seed(11)
        results = (_packing(subject), _logits(subject), _loss(subject), _all_reduce(subject))
    ranks = gather_objects(results)
    return tuple(_first_failure(column) for column in zip(*ranks, strict=True))


def _first_failure(ranks: tuple[SelfTestResult, ...]) -> SelfTestResult:
    for rank, result in enumerate(ranks):
        if not result.passed:
            return SelfTestResult(result.name, False, f"on rank {rank}: {result.numbers}")
    return ranks[0]


def _packing(subject: Subject) -> SelfTestResult:
    """Two packed sequences against the same two alone, by transformers' own eager attention."""
    tokens = _random_tokens(subject, sum(LENGTHS))
    offsets = (0, LENGTHS[0], sum(LENGTHS))
    packed = _own_logits(subject, tokens, offsets)
    separate = torch.cat([_eager_logits(subject, tokens[start:stop]) for start, stop in pairwise(offsets)])
    mixed = _own_logits(subject, tokens, (0, sum(LENGTHS)))
    kl, limit = _mean_kl(separate, packed), KL_LIMIT[subject.dtype]
    return SelfTestResult(
        name=f"packing ({subject.attention})",
        passed=kl <= limit,
        numbers=f"packed against separate sequences: mean KL {kl:.1e} nats (limit {limit:.0e}), largest difference "
        f"{_largest(packed - separate):.1e}; without borders {_mean_kl(separate, mixed):.1e}",
    )


def _logits(subject: Subject) -> SelfTestResult:
    """The head as the loss computes it against `model(...).logits`, on one sequence."""
    tokens = _random_tokens(subject, LENGTHS[1])
    ours = _own_logits(subject, tokens, (0, len(tokens)))
    theirs = _eager_logits(subject, tokens)
    kl, limit = _mean_kl(theirs, ours), KL_LIMIT[subject.dtype]
    return SelfTestResult(
        name="student logits",
        passed=kl <= limit,
        numbers=f"loss path against model(...).logits: mean KL {kl:.1e} nats (limit {limit:.0e}), largest difference "
        f"{_largest(ours - theirs):.1e} on logits up to {_largest(theirs):.1f}",
    )


def _loss(subject: Subject) -> SelfTestResult:
    """The chunked loss and its gradient against the plain formula in float32, inside the student's real head."""
    size = min(subject.vocabulary_size, max(LOSS_VOCABULARY, getattr(subject.encoding, "k", 0) + 1))
    next_ids = torch.randint(size, (ROWS,)).to(subject.device)
    found: list[float] = []

    def compare(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        labels, teacher_head = _random_labels(subject, size, next_ids)
        runs = []
        for run in (_fused_loss, _plain_loss):
            h, w = hidden.detach().requires_grad_(), weight[:size].detach().clone().requires_grad_()
            b = None if bias is None else bias[:size].detach()
            with torch.enable_grad():
                loss = run(subject, h, w, b, labels=labels, teacher_head=teacher_head, next_ids=next_ids, size=size)
                runs.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
        for ours, plain in zip(*runs, strict=True):
            found.append(_largest(ours.float() - plain.float()) / max(_largest(plain), 1e-12))
        return (hidden,)

    tokens = _random_tokens(subject, ROWS)
    rows = torch.arange(ROWS, device=subject.device)
    borders = border_arguments(subject.attention, (0, ROWS), subject.device)
    subject.forward(tokens[None], rows[None], rows, compare, **borders)
    limit = RELATIVE_LIMIT[subject.dtype]
    return SelfTestResult(
        name="loss kernel",
        passed=max(found) <= limit,
        numbers=f"against the plain formula on {ROWS} rows, relative: loss {found[0]:.1e}, gradient by hidden states "
        f"{found[1]:.1e}, by the head {found[2]:.1e} (limit {limit:.0e})",
    )


def _fused_loss(subject: Subject, hidden, weight, bias, *, labels, teacher_head, next_ids, size) -> torch.Tensor:
    return head_loss(
        hidden,
        weight,
        bias,
        head_shape=subject.module.head_shape,
        vocabulary_size=size,
        labels=labels,
        next_ids=next_ids,
        encoding=subject.encoding,
        objective=subject.objective,
        teacher_head=teacher_head,
        chunk_rows=min(subject.chunk_rows, ROWS // 3),
        scale=1 / ROWS,
    ).loss


def _plain_loss(subject: Subject, hidden, weight, bias, *, labels, teacher_head, next_ids, size) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    logits = subject.module.head_shape.apply(logits)
    loss, _ = subject.objective.rows(logits, labels, next_ids, subject.encoding, teacher_head)
    return loss.sum() / ROWS


def _random_labels(subject: Subject, size: int, next_ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], Head | None]:
    """Labels of a made-up teacher, as its worker would make them."""
    if subject.encoding.needs == "logits":
        return subject.encoding.make(3 * torch.randn(ROWS, size).to(subject.device), next_ids), None
    width = 32
    weight = torch.randn(size, width).to(subject.device, subject.dtype)
    hidden = torch.randn(ROWS, width).to(subject.device, subject.dtype)
    return subject.encoding.make(hidden, next_ids), Head(weight, None, HeadShape(), size)


def _all_reduce(subject: Subject) -> SelfTestResult:
    """A sum over ranks of a million numbers each, and how long it took."""
    ones = torch.ones(1_000_000, device=subject.device)
    started = time.perf_counter()
    total = add_up(ones)
    smallest, largest = float(total.min()), float(total.max())
    world = len(gather_objects(None))
    return SelfTestResult(
        name="all-reduce",
        passed=smallest == largest == world,
        numbers=f"{world} ranks adding up ones got {smallest:g} to {largest:g}, "
        f"{ones.numel() * ones.itemsize / 1e6:.0f} MB in {time.perf_counter() - started:.3f} s",
    )


def _random_tokens(subject: Subject, length: int) -> torch.Tensor:
    return torch.randint(subject.vocabulary_size, (length,)).to(subject.device)


def _own_logits(subject: Subject, tokens: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    """float32 [T, V] by the attention in use and the head as the loss computes it."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (Head(weight, bias, subject.module.head_shape, subject.vocabulary_size).logits(hidden),)

    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(offsets)]).to(subject.device)
    rows = torch.arange(len(tokens), device=subject.device)
    borders = border_arguments(subject.attention, offsets, subject.device)
    return subject.forward(tokens[None], positions[None], rows, logits, **borders)[0]


def _eager_logits(subject: Subject, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [T, V]: `model(...).logits` of one sequence, by transformers' eager attention."""
    config = subject.module.config
    used, config._attn_implementation = config._attn_implementation, "eager"
    try:
        rows = torch.arange(len(tokens), device=subject.device)
        (logits,) = subject.forward(tokens[None], rows[None], rows, None)
    finally:
        config._attn_implementation = used
    return logits[:, : subject.vocabulary_size].float()


def _mean_kl(first: torch.Tensor, second: torch.Tensor) -> float:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())

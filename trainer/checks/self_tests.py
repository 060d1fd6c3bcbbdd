"""Start-up self-tests of a student rank on the user's own devices, each with the numbers that decided it.

What is tested is what kernels, drivers and interconnects can break: attention over packed sequences, the loss kernel,
the head, a sum over ranks. They run on a few random tokens and the student's real weights, in seconds. Where the
student computes otherwise beyond some length that the data reaches, a window for example, one sequence is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch

from trainer.labels.encoding import Encoding
from trainer.labels.token import LOGPROB
from trainer.losses.compiled import CompiledRows
from trainer.losses.ensemble import WEIGHT, Together, target_logprobs
from trainer.losses.fused import LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.losses.terms import SequenceScores
from trainer.model.attention import REFERENCE, border_arguments
from trainer.model.attention_choice import lengths_to_cross
from trainer.model.collectives import all_gather_objects, all_reduce
from trainer.model.head import Head, HeadShape
from trainer.model.load import StudentModule
from trainer.protocols import SelfTestResult
from trainer.types import WRITTEN

LENGTHS = (37, 24)  # of the packed sequences, a long one between them where there is a length to cross
LONGEST = 8192 + 32
"""Tokens of the long one at most: its cost is that of a training step with such a row."""

ROWS = 64
_BEYOND = 32  # tokens after a length that is crossed
_BEFORE = 4
LOSS_VOCABULARY = 4096  # at most: the plain formula needs its own copies of this many rows of the head

KL_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # mean nats between two runs that should be equal
RELATIVE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest gradient


@dataclass(frozen=True, slots=True)
class Subject:
    """The rank under test. `forward` is the sharded model's forward, in evaluation mode."""

    module: StudentModule
    forward: Callable[..., tuple[torch.Tensor, ...]]
    attention: str
    losses: Mapping[str, tuple[Encoding | Together | None, Objective]]  # by task
    vocabulary_size: int
    chunk_rows: int
    dtype: torch.dtype
    device: torch.device
    max_length: int  # of the run's rows
    compiled: Mapping[str, CompiledRows] = field(default_factory=dict)  # by task, of those that are
    lengths: tuple[int, ...] = ()  # ascending; beyond them the student computes otherwise (`changing_lengths`)


@torch.no_grad()
def run_self_tests(subject: Subject) -> tuple[SelfTestResult, ...]:
    """All tests; collective, the same answer on all ranks: of a failing test, the numbers of the first rank it failed
    on."""
    on_host = subject.device.type == "cpu"
    kept = {"devices": []} if on_host else {"devices": [subject.device], "device_type": subject.device.type}
    with torch.random.fork_rng(**kept):
        torch.manual_seed(11)
        losses = [_loss(subject, task) for task in subject.losses]
        results = (_packing(subject), _logits(subject), *losses, _all_reduce(subject))
    ranks = all_gather_objects(results)
    return tuple(_first_failure(column) for column in zip(*ranks, strict=True))


def _first_failure(ranks: tuple[SelfTestResult, ...]) -> SelfTestResult:
    for rank, result in enumerate(ranks):
        if not result.passed:
            return SelfTestResult(result.name, False, f"on rank {rank}: {result.numbers}")
    return ranks[0]


def _packing(subject: Subject) -> SelfTestResult:
    """Packed sequences against the same alone, by transformers' own eager attention."""
    crossed, beyond = lengths_to_cross(subject.lengths, max_length=subject.max_length, longest_row=LONGEST)
    long = min(subject.max_length, crossed[-1] + _BEYOND) if crossed else 0
    first, last = LENGTHS
    lengths = [first, long, last] if long else [first, last]
    offsets = tuple(accumulate(lengths, initial=0))
    tokens = _random_tokens(subject, offsets[-1])
    rows = [_rows_of(length, crossed) for length in lengths]
    packed = _own_logits(
        subject, tokens, offsets, torch.cat([r + start for r, start in zip(rows, offsets, strict=False)])
    )
    pieces = tokens.split(lengths)
    separate = torch.cat([_eager_logits(subject, piece, r) for piece, r in zip(pieces, rows, strict=True)])
    kl, limit = _largest_mean_kl(separate, packed, [len(r) for r in rows]), KL_LIMIT[subject.dtype]
    mixed = _own_logits(subject, torch.cat([pieces[0], pieces[-1]]), (0, first + last))
    ends = torch.cat([separate[:first], separate[-last:]])
    return SelfTestResult(
        name=f"packing ({subject.attention})",
        passed=kl <= limit,
        numbers=f"packed against separate sequences: mean KL {kl:.1e} nats (limit {limit:.0e}), largest difference "
        f"{_largest(packed - separate):.1e}; without borders {_mean_kl(ends, mixed):.1e}"
        + (f"; a sequence of {long} tokens crosses {', '.join(map(str, crossed))}" if crossed else "")
        + (f"; not tested: sequences of more than {', '.join(map(str, beyond))} tokens" if beyond else ""),
    )


def _rows_of(length: int, crossed: Sequence[int]) -> torch.Tensor:
    """The rows of a sequence that are compared: all of a short one, of a long one those around each length and the
    last."""
    if length <= max(LENGTHS):
        return torch.arange(length)
    near = {row for border in crossed for row in range(border - _BEFORE, min(length, border + _BEYOND))}
    return torch.tensor(sorted(near | set(range(length - _BEYOND, length))))


def _logits(subject: Subject) -> SelfTestResult:
    """The head as the loss computes it against `model(...).logits`, on one sequence."""
    tokens = _random_tokens(subject, LENGTHS[1])
    ours = _own_logits(subject, tokens, (0, len(tokens)))
    theirs = _eager_logits(subject, tokens, torch.arange(len(tokens)))
    kl, limit = _mean_kl(theirs, ours), KL_LIMIT[subject.dtype]
    return SelfTestResult(
        name="student logits",
        passed=kl <= limit,
        numbers=f"loss path against model(...).logits: mean KL {kl:.1e} nats (limit {limit:.0e}), largest difference "
        f"{_largest(ours - theirs):.1e} on logits up to {_largest(theirs):.1f}",
    )


def _loss(subject: Subject, task: str) -> SelfTestResult:
    """The chunked loss and its gradient against the plain formula in float32, inside the student's real head."""
    encoding, _ = subject.losses[task]
    encoding = encoding.encoding if isinstance(encoding, Together) else encoding
    least = 0 if encoding is None else encoding.least_vocabulary
    size = min(subject.vocabulary_size, max(LOSS_VOCABULARY, least + 1))
    target_ids = torch.randint(size, (ROWS,)).to(subject.device)
    found: list[float] = []

    def compare(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        part = _random_part(subject, task, size, target_ids)
        runs = []
        for run in (_fused_loss, _plain_loss):
            h, w = hidden.detach().requires_grad_(), weight[:size].detach().clone().requires_grad_()
            b = None if bias is None else bias[:size].detach()
            with torch.enable_grad():
                loss = run(subject, part, h, w, b, target_ids)
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
        name="loss kernel" if len(subject.losses) == 1 else f"loss kernel of {task}",
        passed=max(found) <= limit,
        numbers=f"against the plain formula on {ROWS} rows, relative: loss {found[0]:.1e}, gradient by hidden states "
        f"{found[1]:.1e}, by the head {found[2]:.1e} (limit {limit:.0e}){_how(subject.compiled.get(task))}",
    )


def _how(compiled: CompiledRows | None) -> str:
    if compiled is None:
        return ""
    return "; compiled" if compiled.works else f"; not compiled: {compiled.failure}"


def _fused_loss(subject: Subject, part: LossPart, hidden, weight, bias, target_ids) -> torch.Tensor:
    return head_loss(
        hidden,
        weight,
        bias,
        target_ids,
        head_shape=subject.module.head_shape,
        vocabulary_size=weight.shape[0],
        parts=[part],
        chunk_rows=min(subject.chunk_rows, ROWS // 3),
    ).loss


def _plain_loss(subject: Subject, part: LossPart, hidden, weight, bias, target_ids) -> torch.Tensor:
    product = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    # Values rounded as the model's dtype rounds them, which changes probabilities by per cents where logits are large
    # (how logits are computed is another test's), and gradients that are not.
    rounded = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = subject.module.head_shape.apply(product + (rounded - product).detach())
    given = (part.labels, target_ids, part.encoding, part.teacher_head)
    columns = dict(part.columns)
    if part.objective.looks_ahead:
        nats = torch.nn.functional.cross_entropy(logits.detach(), target_ids, reduction="none")
        known = (part.labels, target_ids, part.teacher_head)
        teacher = target_logprobs(part.encoding, *known, vocabulary_size=logits.shape[1], chunk_rows=ROWS)
        columns |= part.objective.futures(-nats, teacher, part.row_sequences)
    rows, _ = part.objective.rows(logits, *given, positions=part.positions, columns=columns)
    loss = logits.new_zeros(()) if rows is None else rows.sum() * part.scale
    if part.objective.sequence_terms:
        logprobs = [-torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")]
        if part.objective.needs_reference:
            logprobs.append(part.labels[LOGPROB][:, 0])
        answers = [torch.stack([rows[part.row_sequences == s].sum() for s in range(4)]).double() for rows in logprobs]
        student, reference = (*answers, None)[:2]
        scores = SequenceScores(student, reference, part.row_sequences.bincount(), part.rewards, part.groups)
        for term in part.objective.sequence_terms:
            loss = loss + (term.factor * part.group_scale * term.function(scores).sum()).float()
    return loss


def _random_part(subject: Subject, task: str, size: int, target_ids: torch.Tensor) -> LossPart:
    """Two pairs of answers, with labels, rewards and groups for whatever a term needs."""
    encoding, objective = subject.losses[task]
    if isinstance(encoding, Together):
        encoding, labels = _random_teachers(subject, encoding, size, target_ids)
        teacher_head = None
    else:
        labels, teacher_head = _random_labels(subject, encoding, size, target_ids)
    return LossPart(
        rows=slice(0, ROWS),
        labels=labels,
        encoding=encoding,
        objective=objective,
        scale=1 / ROWS,
        teacher_head=teacher_head,
        group_scale=1 / 2,
        positions=torch.arange(ROWS).to(subject.device) % (ROWS // 4),
        row_sequences=(torch.arange(ROWS) * 4 // ROWS).to(subject.device),
        groups=((0, 1), (2, 3)),
        rewards=(1.0, 0.0, 0.5, 0.25),
        compiled=subject.compiled.get(task),
        columns={WRITTEN: -3 * torch.rand(ROWS).to(subject.device)} if objective.on_rollouts else {},
    )


def _random_teachers(
    subject: Subject, together: Together, size: int, target_ids: torch.Tensor
) -> tuple[Together, dict[str, torch.Tensor]]:
    """The teachers with heads, and labels of each with unequal weights."""
    labels, heads = {}, {}
    weights = torch.rand(ROWS, len(together.teachers)).to(subject.device).softmax(1)
    ids = torch.rand(ROWS, size).to(subject.device)
    for index, name in enumerate(together.teachers):
        columns, heads[name] = _random_labels(subject, together.encoding, size, target_ids, ids)
        labels |= {f"{name}/{column}": values for column, values in columns.items()}
        labels[f"{name}/{WEIGHT}"] = weights[:, index : index + 1]
    return replace(together, heads=heads), labels


def _random_labels(
    subject: Subject,
    encoding: Encoding | None,
    size: int,
    target_ids: torch.Tensor,
    preference: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], Head | None]:
    """Labels of a made-up teacher, as its worker would make them. `preference` [ROWS, size]: which ids are given."""
    if encoding is None:
        return {}, None
    if encoding.needs == "logits":
        logits = 3 * torch.randn(ROWS, size).to(subject.device)
        chosen = logits if preference is None else preference
        more = {"given_ids": chosen.topk(encoding.num_given).indices} if encoding.takes_ids else {}
        if encoding.needs_row_keys:
            more["row_keys"] = torch.arange(ROWS, device=logits.device)
        return encoding.encode(logits, target_ids, **more), None
    width = 32
    weight = torch.randn(size, width).to(subject.device, subject.dtype)
    hidden = torch.randn(ROWS, width).to(subject.device, subject.dtype)
    layers = getattr(encoding, "layers", ())
    more = {"states": torch.zeros(ROWS, len(layers), width).to(hidden)} if layers else {}
    return encoding.encode(hidden, target_ids, **more), Head(weight, None, HeadShape(), size)


def _all_reduce(subject: Subject) -> SelfTestResult:
    """A sum over ranks of a million numbers each, and how long it took."""
    ones = torch.ones(1_000_000, device=subject.device)
    started = time.perf_counter()
    total = all_reduce(ones)
    smallest, largest = float(total.min()), float(total.max())
    world = len(all_gather_objects(None))
    return SelfTestResult(
        name="all-reduce",
        passed=smallest == largest == world,
        numbers=f"{world} ranks adding up ones got {smallest:g} to {largest:g}, "
        f"{ones.numel() * ones.itemsize / 1e6:.0f} MB in {time.perf_counter() - started:.3f} s",
    )


def _random_tokens(subject: Subject, length: int) -> torch.Tensor:
    return torch.randint(subject.vocabulary_size, (length,)).to(subject.device)


def _own_logits(
    subject: Subject, tokens: torch.Tensor, offsets: tuple[int, ...], rows: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [n, V] of these rows, of all where none are named, by the attention in use and the head as the loss
    computes it."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (Head(weight, bias, subject.module.head_shape, subject.vocabulary_size).logits(hidden),)

    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(offsets)]).to(subject.device)
    rows = (torch.arange(len(tokens)) if rows is None else rows).to(subject.device)
    borders = border_arguments(subject.attention, offsets, subject.device)
    return subject.forward(tokens[None], positions[None], rows, logits, **borders)[0]


def _eager_logits(subject: Subject, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 [n, V]: `model(...).logits` of these rows of one sequence, by transformers' eager attention."""
    config = subject.module.config
    used, config._attn_implementation = config._attn_implementation, REFERENCE
    try:
        positions = torch.arange(len(tokens), device=subject.device)
        (logits,) = subject.forward(tokens[None], positions[None], rows.to(subject.device), None)
    finally:
        config._attn_implementation = used
    return logits[:, : subject.vocabulary_size].float()


def _largest_mean_kl(first: torch.Tensor, second: torch.Tensor, counts: list[int]) -> float:
    """Of the sequences' means the largest: what is wrong in one must not disappear among the others."""
    return max(_mean_kl(p, q) for p, q in zip(first.split(counts), second.split(counts), strict=True))


def _mean_kl(first: torch.Tensor, second: torch.Tensor) -> float:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())

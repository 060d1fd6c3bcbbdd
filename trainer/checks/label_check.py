"""The start-up self-test of the teacher's labels: a wrong label that trains silently is the worst bug of this field.

On a few real sequences, and on one that is long enough to cross every length at which the teacher computes otherwise
than below it, the scorer gives hidden labels and the labels of the run. Three questions, each with a negative control
(the same comparison with the labels moved by one row must fail):

    1  reference   where the teacher fits the budget: do the labels equal transformers' `model(...).logits`?
       text        where it does not: does the target id's log-probability beat that of labels moved by one row?
    2  encoding    do the labels of the run tell the same distribution as the hidden ones?

All comparisons are forward KL in nats over the events of the encoding, so they hold for every encoding alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from configs.models import ModelSource
from trainer.errors import foreign_errors
from trainer.labels.encoding import load_encoding, row_keys
from trainer.labels.sampled import Encoding as Sampled
from trainer.labels.token import LOGPROB
from trainer.loop.packing import layout_of, pack
from trainer.losses.kl import forward_kl
from trainer.model.attention import REFERENCE
from trainer.model.attention_choice import changing_lengths, lengths_to_cross
from trainer.model.head import Head
from trainer.model.load import load_causal, load_config, load_teacher_head
from trainer.model.weights import weight_bytes
from trainer.protocols import SelfTestResult
from trainer.types import RowIds, Sequence, SoftLabelBlock, Unit, tokens_to_read

REFERENCE_BYTES = 4 * 2**30
"""Teachers of at most this many bytes of weights are run by transformers in the controller, once, for the self-test."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # mean KL in nats; two right implementations differ by 1e-8 and 1e-3
DRAWN_TOLERANCE = {"float32": 0.02, "bfloat16": 0.15}  # share of draws that rounding moves to another id
DRAWN_CONTROL_FACTOR = 3.0
CONTROL_FACTOR = 20.0  # moved labels must be this many times as far away as labels in their place
ROUNDING_FACTOR = 100.0  # rows that differ by fewer roundings than this from their neighbours tell no shift
TEXT_MARGIN = 0.5  # nats by which real text must beat moved labels; random labels differ by 0

CHECK_TOKENS = 512
"""Tokens of real text that are checked, in whole sequences where they are shorter."""

LONGEST_ROW = 8192 + 64
"""Tokens of the row that crosses lengths; what lies beyond is said to be unchecked."""

_BEYOND = 64  # tokens after a length that is crossed
_BEFORE = 8
_LONG = "self-test/long"


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """The sequences to check on, and in words what was made of the text and what is left out."""

    unit: Unit
    note: str


def plan_check(rows: Iterable[Sequence], *, lengths: AbstractSequence[int], max_length: int) -> CheckPlan | None:
    """Sequences of together about `CHECK_TOKENS` tokens, the first cut where it is longer, and one more out of the same
    text that is long enough to cross those of the teacher's changing `lengths` which `max_length` reaches.

    None where no row has a token with a label.
    """
    chosen: list[Sequence] = []
    notes: list[str] = []
    for row in rows:
        if row.num_loss_tokens and sum(s.num_tokens for s in chosen) + row.num_tokens <= CHECK_TOKENS:
            chosen.append(row)
        elif row.num_loss_tokens and not chosen:
            chosen.append(_cut(row))
            notes.append(f"the first row is cut from {row.num_tokens} to {chosen[0].num_tokens} tokens")
    if not chosen:
        return None
    crossed, beyond = lengths_to_cross(lengths, max_length=max_length, longest_row=LONGEST_ROW)
    longest = max(row.num_tokens for row in chosen)
    if crossed and longest < min(max_length, crossed[-1] + _BEYOND):
        chosen.append(_long_row(chosen, crossed, min(max_length, crossed[-1] + _BEYOND)))
        notes.append(f"a row of {chosen[-1].num_tokens} tokens crosses {', '.join(map(str, crossed))}")
    if beyond:
        notes.append(f"rows of more than {', '.join(map(str, beyond))} tokens are not checked")
    return CheckPlan(Unit(id="self-test", sequences=tuple(chosen), is_test=True), "; ".join(notes))


def _cut(row: Sequence) -> Sequence:
    """The `CHECK_TOKENS` tokens around the first one with a label."""
    first = int(np.flatnonzero(row.loss_mask)[0])
    start = min(max(0, first - CHECK_TOKENS // 2), row.num_tokens - CHECK_TOKENS)
    mask = row.loss_mask[start : start + CHECK_TOKENS].copy()
    mask[-1] = False  # its label is that of the token which is cut off
    return Sequence(row.id, row.token_ids[start : start + CHECK_TOKENS], mask, row.author)


def _long_row(rows: AbstractSequence[Sequence], crossed: AbstractSequence[int], num_tokens: int) -> Sequence:
    """The rows' text, again and again; the tokens around each length and the last ones have labels."""
    text = np.concatenate([row.token_ids for row in rows])
    mask = np.zeros(num_tokens, dtype=bool)
    for length in crossed:
        mask[length - _BEFORE : length + _BEFORE] = True
    mask[-_BEYOND:] = True
    mask[-1] = False
    return Sequence(_LONG, np.resize(text, num_tokens), mask, "dataset")


def check_labels(
    unit: Unit,
    *,
    hidden: SoftLabelBlock,
    labels: SoftLabelBlock,
    teacher_head: Head,
    dtype: str,
    reference_logits: torch.Tensor | None,
    note: str = "",
) -> tuple[SelfTestResult, ...]:
    """Compare the scorer's two blocks of one unit with each other and with the truth.

    `reference_logits` is float32 [N, >= V], transformers' logits of the unit's loss rows in order, or None where the
    teacher is over the budget. `dtype` is the teacher's. `note` of the plan is added to the first answer.
    """
    if unit.num_rows < 2:
        return (SelfTestResult("labels", True, "a single token with an answer: too few to check on"),)
    target_ids = torch.from_numpy(np.concatenate([targets_of(s.token_ids, s.loss_mask) for s in unit.sequences]))
    from_hidden = teacher_head.logits(block_columns(unit, hidden)["hidden"])
    if reference_logits is not None:
        truth = reference_logits[:, : teacher_head.vocabulary_size].float()
        first = _compare("labels against transformers", unit, truth, hidden, teacher_head, target_ids, dtype)
    else:
        first = _compare_text(from_hidden, target_ids)
    if note:
        first = replace(first, numbers=f"{first.numbers}; {note}")
    name = f"{labels.header.encoding.kind} labels against hidden"
    return first, _compare(name, unit, from_hidden, labels, teacher_head, target_ids, dtype)


def _compare(
    name: str,
    unit: Unit,
    truth: torch.Tensor,
    block: SoftLabelBlock,
    teacher_head: Head,
    target_ids: torch.Tensor,
    dtype: str,
) -> SelfTestResult:
    """Labels must be near the truth, and far nearer than the labels of the row before: how far those are is the rows'
    own spread, which is small where a teacher is nearly flat. Where it is so small that rounding hides it, no shift can
    be seen, and none matters."""
    encoding = load_encoding(block.header.encoding)
    if LOGPROB in block.columns:
        return _compare_targets(name, truth, block_columns(unit, block)[LOGPROB][:, 0], target_ids, dtype)
    if isinstance(encoding, Sampled):
        return _compare_drawn(name, unit, truth, block_columns(unit, block), encoding, target_ids, dtype)
    columns = encoding.prepare(block_columns(unit, block), teacher_head)
    kept = len(truth) - 1

    def mean_kl(rows: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> float:
        return float(forward_kl(encoding.align(rows, labels, teacher_head)).mean())

    tolerance = TOLERANCE[dtype]
    rows = forward_kl(encoding.align(truth, columns, teacher_head))
    # The long row by itself: what is wrong beyond a window must not disappear among the others.
    aligned = max(float(part.mean()) for part in rows.split(_parts(unit)) if len(part))
    moved = mean_kl(truth[1:], {key: column[:kept] for key, column in columns.items()})
    told_apart = 0 < moved >= CONTROL_FACTOR * aligned
    numbers = (
        f"mean KL {aligned:.2e} nats (limit {tolerance:.0e}) on {len(truth)} rows; control, labels moved by one "
        f"row: {moved:.2g} (at least {CONTROL_FACTOR:g} times as much)"
    )
    if not told_apart:
        rounded = truth.to(getattr(torch, dtype)).float()
        rounding = _kl(truth, rounded)
        if encoding.needs == "logits":
            ids = {"given_ids": columns["ids"][:, : encoding.num_given].int()} if encoding.takes_ids else {}
            rounding = max(rounding, mean_kl(truth, encoding.encode(rounded, target_ids, **ids)))
        flat = _flatness(truth, rounding, dtype)
        told_apart, numbers = bool(flat), numbers + flat
    return SelfTestResult(name=name, passed=aligned <= tolerance and told_apart, numbers=numbers)


def _flatness(truth: torch.Tensor, rounding: float, dtype: str) -> str:
    """What is to be told of rows so much alike that `rounding`, in nats, hides a shift by one; empty where they are
    not."""
    spread = _kl(truth[1:], truth[:-1])
    if spread > ROUNDING_FACTOR * rounding:
        return ""
    return (
        f". Neighbouring rows differ by {spread:.1g} nats, and {dtype} rounds by {rounding:.1g}: this teacher is too "
        "flat for a shift to be seen"
    )


def _compare_targets(
    name: str, truth: torch.Tensor, given: torch.Tensor, target_ids: torch.Tensor, dtype: str
) -> SelfTestResult:
    """Log-probabilities of target ids, which are no distribution: their mean difference from the truth, in nats, must
    be small, and far smaller than that of the row before. A KL of t allows one of about sqrt(2 t)."""
    expected = truth.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
    limit = math.sqrt(2 * TOLERANCE[dtype])
    aligned, moved = (float(x.abs().mean()) for x in (given - expected, given[:-1] - expected[1:]))
    return SelfTestResult(
        name=name,
        passed=aligned <= limit and moved >= max(limit, math.sqrt(CONTROL_FACTOR) * aligned),
        numbers=f"mean difference {aligned:.2e} nats (limit {limit:.0e}) on {len(given)} rows; control, labels moved "
        f"by one row: {moved:.2g}",
    )


def _compare_drawn(
    name: str,
    unit: Unit,
    truth: torch.Tensor,
    labels: Mapping[str, torch.Tensor],
    encoding: Sampled,
    target_ids: torch.Tensor,
    dtype: str,
) -> SelfTestResult:
    """Drawn labels are drawn again from the truth, with the same random numbers: a draw may fall on the next id where
    rounding moves a border, but few do. In total variation, the share of draws that fell on other ids."""
    keys = torch.cat(
        [
            row_keys(torch.from_numpy(tokens_to_read(s)), torch.from_numpy(np.flatnonzero(s.loss_mask)))
            for s in unit.sequences
            if s.num_loss_tokens
        ]
    )
    again = encoding.estimate(encoding.encode(truth, target_ids, keys), truth.shape[1])
    given = encoding.estimate(labels, truth.shape[1])
    aligned, moved = (float((a - b).abs().sum(1).mean()) / 2 for a, b in ((given, again), (given[:-1], again[1:])))
    limit = DRAWN_TOLERANCE[dtype]
    return SelfTestResult(
        name=name,
        passed=aligned <= limit and moved >= DRAWN_CONTROL_FACTOR * max(aligned, limit / DRAWN_CONTROL_FACTOR),
        numbers=f"{aligned:.2%} of the draws fell on other ids (limit {limit:.0%}) on {len(truth)} rows; control, "
        f"labels moved by one row: {moved:.0%} (at least {DRAWN_CONTROL_FACTOR:g} times as many)",
    )


def _parts(unit: Unit) -> list[int]:
    """Numbers of rows of the real sequences and of the one that was made to be long."""
    long = sum(s.num_loss_tokens for s in unit.sequences if s.id == _LONG)
    return [unit.num_rows - long, long]


def _kl(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean KL(first, second) in nats of logits [n, V]."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _compare_text(logits: torch.Tensor, target_ids: torch.Tensor) -> SelfTestResult:
    logprobs = logits.log_softmax(-1)
    aligned = float(logprobs.gather(-1, target_ids[:, None]).mean())
    moved = float(logprobs[:-1].gather(-1, target_ids[1:, None]).mean())
    return SelfTestResult(
        name="labels against real text",
        passed=aligned >= moved + TEXT_MARGIN,
        numbers=f"mean logprob of the target id {aligned:.2f}, of labels moved by one row {moved:.2f} on "
        f"{len(target_ids)} rows (must be {TEXT_MARGIN} better)",
    )


def block_columns(unit: Unit, block: SoftLabelBlock) -> Mapping[str, torch.Tensor]:
    """A block's columns as tensors in host memory, rows in block order."""
    layout = layout_of(load_encoding(block.header.encoding), block)
    sequences = [(0, index) for index in range(len(unit.sequences))]
    (part,) = pack([unit], sequences, [block], layouts={unit.kind: layout}).parts
    return part.labels


def some_ids(unit: Unit, num_given: int, *, vocabulary_size: int) -> RowIds:
    """Ids to ask a teacher about: those of the text itself, of each row the target id and those of the rows before it,
    so that labels moved by one row are other labels; then others until there are enough."""
    rows = []
    for sequence in unit.sequences:
        for target in np.flatnonzero(sequence.loss_mask) + 1:
            said = sequence.token_ids[max(0, target + 1 - num_given) : target + 1][::-1]
            others = (int(said[0]) + np.arange(1, 2 * num_given + 1)) % vocabulary_size
            rows.append(list(dict.fromkeys([*said.tolist(), *others.tolist()]))[:num_given])
    return RowIds(unit.tokens_hash(), np.array(rows, dtype=np.int32))


def targets_of(token_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """int64 [N]: the token that each loss row predicts (the shift of trainer/types.py)."""
    return token_ids[np.flatnonzero(loss_mask) + 1].astype(np.int64)


def teacher_truth(
    unit: Unit, source: ModelSource, *, vocabulary_size: int, dtype: str
) -> tuple[Head, torch.Tensor | None]:
    """The teacher's head in host memory, and transformers' logits of the unit's loss rows, float32 [N, rows of the
    head]: None where the teacher's weights are over `REFERENCE_BYTES`."""
    head = load_teacher_head(
        source, vocabulary_size=vocabulary_size, dtype=getattr(torch, dtype), device=torch.device("cpu")
    )
    if weight_bytes(source) > REFERENCE_BYTES:
        return head, None
    model = reference_model(source)
    rows = []
    with torch.inference_mode():
        for sequence in unit.sequences:
            kept = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
            token_ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
            rows.append(model(token_ids, use_cache=False, logits_to_keep=kept).logits[0])
    return head, torch.cat(rows)


def teacher_lengths(source: ModelSource) -> tuple[int, ...]:
    """The row lengths that the label self-test should cross (`changing_lengths`)."""
    config = load_config(source, role="teacher.model")
    return changing_lengths(config, role="teacher.model", trust_remote_code=source.trust_remote_code)


def reference_model(source: ModelSource) -> PreTrainedModel:
    """The teacher in float32, with its own eager attention (sdpa drops the soft-cap without a word), in bounded memory
    where transformers lets others compute it."""
    with foreign_errors(f"teacher.model: transformers cannot load {source.path}"):
        model = load_causal(source, role="teacher.model", dtype=torch.float32, attn_implementation="eager").eval()
    if model._supports_attention_backend:
        model.set_attn_implementation(REFERENCE)
    return model

"""The start-up self-test of the teacher's labels: a wrong label that trains silently is the worst bug of this field.

On a few real sequences the scorer gives hidden labels and the labels of the run. Three questions, each with a negative
control (the same comparison with the labels moved by one row must fail):

    1  reference   where the teacher fits the budget: do the labels equal transformers' `model(...).logits`?
       text        where it does not: does the realised token's log-probability beat that of labels moved by one row?
    2  encoding    do the labels of the run tell the same distribution as the hidden ones?

All comparisons are forward KL in nats over the events of the encoding, so they hold for every encoding alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from configs.schema import ModelSource
from trainer.heads import Head
from trainer.labels.encoding import load_encoding
from trainer.losses.divergences import forward_kl
from trainer.models import load_teacher_head, weight_bytes
from trainer.packing import layout_of, pack
from trainer.types import SoftLabelBlock, Unit

REFERENCE_BYTES = 4 * 2**30
"""Teachers of at most this many bytes of weights are run by transformers in the controller, once, for the self-test."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # mean KL in nats; two right implementations differ by 1e-8 and 1e-3
CONTROL_FACTOR = 20.0  # the moved comparison must be at least this many tolerances away
TEXT_MARGIN = 0.5  # nats by which real text must beat moved labels; random labels differ by 0


@dataclass(frozen=True, slots=True)
class LabelCheck:
    """One question and its answer; `numbers` is shown to the user whether it passed or not."""

    name: str
    passed: bool
    numbers: str


def check_labels(
    unit: Unit,
    *,
    hidden: SoftLabelBlock,
    labels: SoftLabelBlock,
    teacher_head: Head,
    dtype: str,
    reference_logits: torch.Tensor | None,
) -> tuple[LabelCheck, ...]:
    """Compare the scorer's two blocks of one unit with each other and with the truth.

    `reference_logits` is float32 [N, >= V], transformers' logits of the unit's loss rows in order, or None where the
    teacher is over the budget. `dtype` is the teacher's.
    """
    if unit.num_rows < 2:
        return (LabelCheck("labels", True, "a single token with an answer: too few to check on"),)
    tolerance = TOLERANCE[dtype]
    next_ids = torch.from_numpy(np.concatenate([realised_ids(s.token_ids, s.loss_mask) for s in unit.sequences]))
    from_hidden = teacher_head.logits(block_columns(unit, hidden)["hidden"])
    if reference_logits is not None:
        truth = reference_logits[:, : teacher_head.vocabulary_size].float()
        first = _compare("labels against transformers", unit, truth, hidden, teacher_head, tolerance)
    else:
        first = _compare_text(from_hidden, next_ids)
    return first, _compare(
        f"{labels.header.encoding.kind} labels against hidden", unit, from_hidden, labels, teacher_head, tolerance
    )


def _compare(
    name: str, unit: Unit, truth: torch.Tensor, block: SoftLabelBlock, teacher_head: Head, tolerance: float
) -> LabelCheck:
    encoding = load_encoding(block.header.encoding)
    columns = encoding.ready(block_columns(unit, block), teacher_head)
    kept = len(truth) - 1

    def mean_kl(rows: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> float:
        return float(forward_kl(encoding.pair(rows, labels, teacher_head)).mean())

    aligned = mean_kl(truth, columns)
    moved = mean_kl(truth[1:], {key: column[:kept] for key, column in columns.items()})
    passed = aligned <= tolerance and moved >= CONTROL_FACTOR * tolerance
    return LabelCheck(
        name=name,
        passed=passed,
        numbers=f"mean KL {aligned:.2e} nats (limit {tolerance:.0e}) on {len(truth)} rows; moved by one row "
        f"{moved:.2f} (must exceed {CONTROL_FACTOR * tolerance:.2g})",
    )


def _compare_text(logits: torch.Tensor, next_ids: torch.Tensor) -> LabelCheck:
    logprobs = logits.log_softmax(-1)
    aligned = float(logprobs.gather(-1, next_ids[:, None]).mean())
    moved = float(logprobs[:-1].gather(-1, next_ids[1:, None]).mean())
    return LabelCheck(
        name="labels against real text",
        passed=aligned >= moved + TEXT_MARGIN,
        numbers=f"mean logprob of the realised token {aligned:.2f}, of labels moved by one row {moved:.2f} on "
        f"{len(next_ids)} rows (must be {TEXT_MARGIN} better)",
    )


def block_columns(unit: Unit, block: SoftLabelBlock) -> Mapping[str, torch.Tensor]:
    """A block's columns as tensors in host memory, rows in block order."""
    layout = layout_of(load_encoding(block.header.encoding), block)
    sequences = [(0, index) for index in range(len(unit.sequences))]
    return pack([unit], sequences, [block], layout=layout).labels


def realised_ids(token_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """int64 [N]: the token that each loss row predicts (the shift of trainer/types.py)."""
    return token_ids[np.flatnonzero(loss_mask) + 1].astype(np.int64)


def teacher_truth(
    unit: Unit, source: ModelSource, *, vocabulary_size: int, dtype: str
) -> tuple[Head, torch.Tensor | None]:
    """The teacher's head in host memory, and transformers' logits of the unit's loss rows, float32 [N, rows of the
    head]: None where the teacher's weights are over `REFERENCE_BYTES`."""
    host = torch.empty(0).device
    head = load_teacher_head(source, vocabulary_size=vocabulary_size, dtype=getattr(torch, dtype), device=host)
    if weight_bytes(source) > REFERENCE_BYTES:
        return head, None
    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="eager",  # sdpa drops the soft-cap of attention without a word
    ).eval()
    rows = []
    with torch.inference_mode():
        for sequence in unit.sequences:
            logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0]
            rows.append(logits[torch.from_numpy(np.flatnonzero(sequence.loss_mask))])
    return head, torch.cat(rows)

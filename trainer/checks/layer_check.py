"""The self-test of states between a teacher's layers: an engine that counts or scales them otherwise would teach wrong
numbers without a word."""

from __future__ import annotations

import numpy as np
import torch

from configs.models import ModelSource
from trainer.checks.label_check import REFERENCE_BYTES, block_columns, reference_model
from trainer.labels.hidden import Encoding
from trainer.model.weights import weight_bytes
from trainer.protocols import SelfTestResult
from trainer.types import SoftLabelBlock, Unit

LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""Of the norm of the difference over that of the states, in the mean over rows."""

CONTROL_FACTOR = 3.0
"""How much further the states of the row before must be, at least."""


def states_truth(unit: Unit, source: ModelSource, layers: tuple[int, ...]) -> torch.Tensor | None:
    """float32 [N, K, H] of the unit's loss rows by transformers' `hidden_states`; None where the teacher's weights are
    over `REFERENCE_BYTES`."""
    if weight_bytes(source) > REFERENCE_BYTES:
        return None
    model, rows = reference_model(source), []
    with torch.inference_mode():
        for sequence in unit.sequences:
            kept = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
            token_ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
            states = model.base_model(token_ids, use_cache=False, output_hidden_states=True).hidden_states
            rows.append(torch.stack([states[layer][0, kept] for layer in layers], dim=1))
    return torch.cat(rows)


def check_states(unit: Unit, block: SoftLabelBlock, truth: torch.Tensor | None, *, dtype: str) -> SelfTestResult:
    """The scorer's states against the truth, layer by layer, and against that of the rows before."""
    name, encoding = "states against transformers", Encoding.model_validate(block.header.encoding.model_dump())
    if truth is None:
        return SelfTestResult(name, True, "not tested: the teacher is too large to be here a second time")
    if unit.num_rows < 2:
        return SelfTestResult(name, True, "a single token with an answer: too few to check on")
    columns, limit, passed, told = block_columns(unit, block), LIMIT[dtype], True, []
    for place, layer in enumerate(encoding.layers):
        found, exact = encoding.states_of(columns, layer).float(), truth[:, place]
        error, moved = _distance(found, exact), _distance(found[:-1], exact[1:])
        passed = passed and error <= limit and moved >= CONTROL_FACTOR * error
        told.append(f"layer {layer}: {error:.1e} (rows moved by one: {moved:.2g})")
    return SelfTestResult(name, passed, f"relative, limit {limit:g}: {', '.join(told)}")


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-9)).mean())

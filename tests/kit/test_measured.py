"""What docs/exactness.json measured on real models, held to what the registries claim of each cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import term_oracles as kit

from configs.labels import LABELS
from configs.losses import LOSSES

FOUND = json.loads((Path(__file__).parents[2] / "docs" / "exactness.json").read_text())["cells"]
CELLS = [(kind, loss) for kind, loss in kit.cells() if not LOSSES.parameters_of(loss).across_tokenizers]
"""Of terms that compare one vocabulary."""
AGAIN = "measure it: python -m benchmarks exactness, then python docs/exactness_table.py > docs/exactness.md"


def test_every_cell_that_is_allowed_is_measured_and_no_other():
    allowed = set(CELLS)
    measured = {(kind, loss) for kind, own in FOUND.items() for loss in own}
    assert not allowed - measured, f"not measured: {sorted(allowed - measured)}; {AGAIN}"
    assert not measured - allowed, f"measured, and refused by now: {sorted(measured - allowed)}; {AGAIN}"


@pytest.mark.parametrize(("kind", "loss"), CELLS)
def test_what_was_measured_bears_out_what_is_claimed(kind: str, loss: str):
    claim, cell = LOSSES.parameters_of(loss).exactness_with(LABELS.parameters_of(kind)), FOUND[kind][loss]
    rounding = 5e-3 if kit.encoding_oracle(kind).kept else 1e-4  # float16 log-probabilities
    if claim == "exact":
        assert abs(cell["value_bias"]) < rounding
        assert cell["gradient_bias"] < rounding
    elif claim == "lower_bound":
        assert cell["value_bias"] < rounding
    elif claim == "unbiased":
        assert abs(cell["value_bias"]) < 5 * cell["value_error"]
        assert cell["gradient_bias"] < 2 * cell["gradient_error"]

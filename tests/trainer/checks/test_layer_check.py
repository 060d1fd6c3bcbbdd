"""The self-test of states: what it lets pass, and what it is there to find."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from label_oracle import random_unit
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from configs.labels import Hidden
from configs.models import ModelSource
from trainer.checks import layer_check
from trainer.checks.layer_check import check_states, states_truth

UNIT = random_unit("0:0", (40, [(5, 20), (25, 39)]), (9, [(2, 8)]))
LABELS = Hidden(layers=(0, 1, 2))


def test_states_of_an_engine_pass_and_those_of_another_row_or_layer_or_scale_do_not(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Engine().start_scorer(engine_plan(Engine(), tiny_teacher), "hf-0")
    _, block = asyncio.run(scorer.score(UNIT, LABELS, deadline_s=60))
    scorer.close()
    source = ModelSource(path=str(tiny_teacher))
    truth = states_truth(UNIT, source, LABELS.layers)
    result = check_states(UNIT, block, truth, dtype="float32")
    assert result.passed, result.numbers
    assert result.numbers.count("layer ") == 3
    states = block.columns["states"].reshape(UNIT.num_rows, 3, -1)
    for wrong in (np.roll(states, 1, 0), np.roll(states, 1, 1), states * 1.1, states * [[[1], [1.2], [1]]]):
        columns = {**block.columns, "states": wrong.reshape(UNIT.num_rows, -1).astype(np.float32)}
        assert not check_states(UNIT, replace(block, columns=columns), truth, dtype="float32").passed
    monkeypatch.setattr(layer_check, "REFERENCE_BYTES", 10)
    assert states_truth(UNIT, source, LABELS.layers) is None
    assert "too large to be here a second time" in check_states(UNIT, block, None, dtype="float32").numbers

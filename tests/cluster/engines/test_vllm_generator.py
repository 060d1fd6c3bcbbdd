"""What vLLM is asked for a request, and what is made of its answer; vLLM itself is not imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_process import engine_plan

from cluster.engines.vllm import Engine
from cluster.engines.vllm_generator import FORBID, VllmGenerator


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("abort", "abort"),
        ("error", "abort"),
        ("repetition", "abort"),
        (None, "abort"),
    ],
)
def test_an_answer_that_ends_for_another_reason_is_aborted(tiny_teacher: Path, said: str | None, reason: str) -> None:
    plan = engine_plan(Engine(), tiny_teacher, role="generator", prefix="big")
    generator = VllmGenerator(plan, SimpleNamespace(padded_vocabulary_size=plan.vocabulary_size))
    output = SimpleNamespace(token_ids=[5, 6], logprobs=SimpleNamespace(logprobs=[-0.5, -1.5]), finish_reason=said)
    completion = generator._completion(output, "7")
    assert (completion.finish_reason, completion.author) == (reason, "teacher:big")
    assert completion.versions == ((0, "7"),)
    assert completion.logprobs.tolist() == [-0.5, -1.5]
    assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)


def test_rows_of_the_head_beyond_the_vocabulary_are_never_drawn(tiny_teacher: Path) -> None:
    plan = engine_plan(Engine(), tiny_teacher, role="generator")
    padded = VllmGenerator(plan, SimpleNamespace(padded_vocabulary_size=plan.vocabulary_size + 2))
    assert padded._without_padding == {plan.vocabulary_size: FORBID, plan.vocabulary_size + 1: FORBID}
    assert VllmGenerator(plan, SimpleNamespace(padded_vocabulary_size=plan.vocabulary_size))._without_padding is None

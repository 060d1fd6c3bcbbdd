"""The transformers engine against the model's own logits, and what the loops rely on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import EVERY, architecture_config, architecture_folder
from label_oracle import VOCABULARY, assert_labels_match, label_errors, oracle_of, random_unit, teacher_head_of
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM
from vllm_process import engine_plan

from cluster.engines.hf import Engine, draw
from cluster.engines.plan import Sampling
from configs.labels import Dense, Hidden, Labels, Token, TopK
from configs.models import ModelSource
from trainer.errors import ConfigError, DeadlineExceeded, UnitRejected, foreign_errors
from trainer.model.attention_choice import packable_layers
from trainer.model.load import load_teacher_head
from trainer.types import Prompt

UNIT = random_unit("0:0", (60, [(5, 20), (31, 59)]), (90, [(60, 80)]), (12, []), (33, [(0, 32)]))


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"tied": False}), ("qwen2", {}), ("qwen3", {"tied": False}), ("gemma2", {})],
)
@pytest.mark.parametrize("spec", [TopK(k=8), Dense(), Hidden(), Token()])
def test_labels_equal_transformers(tmp_path: Path, family: str, options: dict[str, object], spec: Labels) -> None:
    folder = tiny_folder(tmp_path / family, family, **options)
    scorer = Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")
    report, block = asyncio.run(scorer.score(UNIT, spec, deadline_s=60))
    again = asyncio.run(scorer.score(UNIT, spec, deadline_s=60))[1]
    statistics = scorer.statistics()
    scorer.close()
    oracle, next_ids = oracle_of(folder, UNIT)
    assert_labels_match(spec.kind, block.columns, oracle, next_ids, teacher_head_of(folder))
    assert all(np.array_equal(column, again.columns[name]) for name, column in block.columns.items())
    assert (report.num_rows, report.num_non_finite) == (UNIT.num_rows, 0)
    assert (statistics.num_units, statistics.num_rows) == (2, 2 * UNIT.num_rows)


@pytest.mark.parametrize("name", ["opt", "phi3", "deepseek_v3"])
def test_hidden_labels_are_as_wide_as_what_the_head_reads(tmp_path: Path, name: str) -> None:
    folder = architecture_folder(tmp_path, name)
    scorer = Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")
    _, block = asyncio.run(scorer.score(UNIT, Hidden(), deadline_s=60))
    scorer.close()
    assert block.columns["hidden"].shape[1] == (32 if name == "opt" else 64)  # of OPT-350m half of hidden_size
    head = load_teacher_head(
        ModelSource(path=str(folder)), vocabulary_size=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
    )
    oracle, next_ids = oracle_of(folder, UNIT)
    assert_labels_match("hidden", block.columns, oracle, next_ids, head)


OTHER_HEADS = {"modernbert-decoder"}
"""Heads that do more than multiply, scale and cap: hidden labels would be wrong, and the start-up self-test fails."""


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_labels_of_every_student_like_architecture_equal_transformers(name: str, tmp_path: Path) -> None:
    try:
        with foreign_errors("no tiny model"):  # each config has rules of its own
            packable_layers(architecture_config(name))
            folder = architecture_folder(tmp_path, name)
    except ConfigError as error:
        pytest.skip(str(error))
    scorer = Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")
    oracle, next_ids = oracle_of(folder, UNIT)
    head = load_teacher_head(
        ModelSource(path=str(folder)), vocabulary_size=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
    )
    for spec in (TopK(k=8), Hidden()):
        _, block = asyncio.run(scorer.score(UNIT, spec, deadline_s=60))
        errors = label_errors(spec.kind, block.columns, oracle, next_ids, head)
        errors.pop("logprobs_f16", None)
        assert (max(errors.values()) < 1e-3) == (spec.kind == "topk" or name not in OTHER_HEADS), (spec, errors)
    scorer.close()


def test_a_unit_past_its_deadline_is_given_up_and_the_next_one_scored(tiny_teacher: Path) -> None:
    scorer = Engine().start_scorer(engine_plan(Engine(), tiny_teacher), "hf-0")
    long = random_unit("long", *[(250, [(0, 249)])] * 2000)

    async def both() -> int:
        with pytest.raises(DeadlineExceeded, match="unit long"):
            await scorer.score(long, Hidden(), deadline_s=0.1)
        report, _ = await scorer.score(UNIT, Hidden(), deadline_s=60)
        return report.num_rows

    assert asyncio.run(both()) == UNIT.num_rows
    assert scorer.statistics().num_steps < 2000
    scorer.close()


def test_a_unit_the_model_cannot_read_is_refused(tiny_teacher: Path) -> None:
    scorer = Engine().start_scorer(engine_plan(Engine(), tiny_teacher, max_length=50), "hf-0")
    with pytest.raises(UnitRejected, match="reads 1 to 50"):
        asyncio.run(scorer.score(UNIT, Hidden(), deadline_s=60))
    scorer.close()


def write(folder: Path, sampling: Sampling, prompts: list[Prompt]) -> list[list[int]]:
    writer = Engine().start_writer(engine_plan(Engine(), folder, role="writer", sampling=sampling), "hf-0")
    answers = asyncio.run(writer.write(prompts, deadline_s=60))
    writer.close()
    assert all(answer.dtype == np.int32 for answer in answers)
    return [answer.tolist() for answer in answers]


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [Prompt(f"0:{n}", rng.integers(3, VOCABULARY, n).astype(np.int32), None, f"test:{n}") for n in (9, 30, 4)]


def test_a_greedy_answer_is_what_rereading_the_text_says(tiny_teacher: Path) -> None:
    asked = prompts()
    answers = write(tiny_teacher, Sampling(max_new_tokens=10), asked)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer) == 10
        token_ids = torch.tensor([prompt.token_ids.tolist() + answer])
        best = model(token_ids).logits[0, :, :VOCABULARY].argmax(-1)
        assert best[len(prompt.token_ids) - 1 : -1].tolist() == answer


def test_an_answer_ends_with_its_stop_token(tiny_teacher: Path) -> None:
    asked = prompts()[:1]
    (free,) = write(tiny_teacher, Sampling(max_new_tokens=10), asked)
    (cut,) = write(tiny_teacher, Sampling(max_new_tokens=10, stop_token_ids=(free[4],)), asked)
    assert cut == free[: free.index(free[4]) + 1]


def test_an_answer_stays_within_the_engines_length(tiny_teacher: Path) -> None:
    plan = engine_plan(Engine(), tiny_teacher, role="writer", sampling=Sampling(max_new_tokens=10), max_length=12)
    writer = Engine().start_writer(plan, "hf-0")
    (answer,) = asyncio.run(writer.write(prompts()[:1], deadline_s=60))
    writer.close()
    assert len(answer) == 3


def test_a_sampled_answer_depends_on_its_prompt_and_seed_alone(tiny_teacher: Path) -> None:
    asked = prompts()
    sampling = Sampling(max_new_tokens=10, temperature=1.5, seed=3)
    together = write(tiny_teacher, sampling, asked)
    assert write(tiny_teacher, sampling, asked[1:2]) == together[1:2]
    assert write(tiny_teacher, Sampling(max_new_tokens=10, temperature=1.5, seed=4), asked) != together


def test_draws_follow_the_nucleus() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    generator = torch.Generator().manual_seed(0)
    drawn = [int(draw(logits, Sampling(1, temperature=1.0, top_p=0.6), generator)) for _ in range(2000)]
    counts = np.bincount(drawn, minlength=4) / 2000
    assert counts == pytest.approx([0, 0.625, 0.375, 0], abs=0.04)  # 0.5 and 0.3, renormalised


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2"):
        engine_plan(Engine(), Path("folder"), tensor_parallel_size=2)

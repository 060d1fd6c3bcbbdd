"""The transformers engine against the model's own logits, and what the loops rely on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EVERY, architecture_config, architecture_folder
from generation_oracle import PADDING, check_logprobs, generation_requests, warped
from label_oracle import (
    VOCABULARY,
    assert_labels_match,
    assert_states_match,
    label_errors,
    oracle_of,
    random_given_ids,
    random_unit,
    teacher_head_of,
)
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from cluster.engines.hf_generator import draw, restrict
from configs.labels import Dense, GivenIds, Hidden, Labels, Nucleus, Sampled, Token, TopK
from configs.models import ModelSource
from trainer.errors import ConfigError, DeadlineExceeded, UnitRejected, foreign_errors
from trainer.model.attention_choice import packable_layers
from trainer.model.load import load_teacher_head
from trainer.types import Completion, GenerationRequest, Sampling

UNIT = random_unit("0:0", (60, [(5, 20), (31, 59)]), (90, [(60, 80)]), (12, []), (33, [(0, 32)]))
SPECS = (
    TopK(k=8),
    Dense(),
    Hidden(),
    Token(),
    Nucleus(p=0.3, k_max=40, control_ids=(2,)),
    Sampled(draws=20, control_ids=(2,)),
    GivenIds(k=8),
)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"tied": False}), ("qwen2", {}), ("qwen3", {"tied": False}), ("gemma2", {})],
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_labels_equal_transformers(tmp_path: Path, family: str, options: dict[str, object], spec: Labels) -> None:
    folder = tiny_folder(tmp_path / family, family, **options)
    scorer = Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")
    given = random_given_ids(UNIT, 9) if spec.takes_ids else None
    report, block = asyncio.run(scorer.score(UNIT, spec, deadline_s=60, given=given))
    again = asyncio.run(scorer.score(UNIT, spec, deadline_s=60, given=given))[1]
    statistics = scorer.statistics()
    scorer.close()
    oracle, target_ids = oracle_of(folder, UNIT)
    assert_labels_match(spec, UNIT, block.columns, oracle, target_ids, teacher_head_of(folder))
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
    oracle, target_ids = oracle_of(folder, UNIT)
    assert_labels_match(Hidden(), UNIT, block.columns, oracle, target_ids, head)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_states_between_layers_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(tmp_path / family, family, num_hidden_layers=3)
    scorer = Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")
    for layers in ((1,), (0, 2, 3)):
        _, block = asyncio.run(scorer.score(UNIT, Hidden(layers=layers), deadline_s=60))
        assert_states_match(layers, UNIT, folder, block.columns)
        assert_labels_match(Hidden(), UNIT, block.columns, *oracle_of(folder, UNIT), teacher_head_of(folder))
    scorer.close()


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
    oracle, target_ids = oracle_of(folder, UNIT)
    head = load_teacher_head(
        ModelSource(path=str(folder)), vocabulary_size=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
    )
    for spec in (TopK(k=8), Hidden()):
        _, block = asyncio.run(scorer.score(UNIT, spec, deadline_s=60))
        errors = label_errors(spec, UNIT, block.columns, oracle, target_ids, head)
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


def generate(folder: Path, requests: list[GenerationRequest], **changes: Any) -> list[Completion]:
    generator = Engine().start_generator(engine_plan(Engine(), folder, role="generator", **changes), "hf-0")
    completions = asyncio.run(generator.generate(requests, deadline_s=60))
    generator.close()
    assert all(completion.token_ids.dtype == np.int32 for completion in completions)
    assert all(completion.logprobs.dtype == np.float32 for completion in completions)
    assert all(len(completion.token_ids) == len(completion.logprobs) for completion in completions)
    return completions


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def test_a_greedy_answer_is_that_of_transformers(tiny_teacher: Path) -> None:
    requests = generation_requests(Sampling(10))
    completions = generate(tiny_teacher, requests, weights_version="v3")
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.from_numpy(request.token_ids).long()[None]
        settings = GenerationConfig(
            max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=PADDING
        )
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert completion.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()
        assert (completion.finish_reason, completion.author) == ("length", "teacher")
        assert completion.versions == ((0, "v3"),)


WAYS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.7, "top_p": 0.7},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.3, "min_p": 0.3},
    {"temperature": 2.0, "min_p": 0.05, "top_k": 40, "top_p": 0.8},
]


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_are_those_of_the_distribution_that_tokens_are_drawn_from(
    tiny_teacher: Path, way: dict[str, float]
) -> None:
    requests = generation_requests(Sampling(10, **way, seed=3))
    check_logprobs(tiny_teacher, requests, generate(tiny_teacher, requests))


def test_an_answer_ends_with_its_stop_token(tiny_teacher: Path) -> None:
    (free,) = texts(generate(tiny_teacher, generation_requests(Sampling(10))[:1]))
    (cut,) = generate(tiny_teacher, generation_requests(Sampling(10, stop_token_ids=(free[4],)))[:1])
    assert cut.token_ids.tolist() == free[: free.index(free[4]) + 1]
    assert cut.finish_reason == "stop"
    assert len(cut.logprobs) == len(cut.token_ids)


def test_an_answer_ends_with_the_token_that_completes_a_string_as_in_transformers(tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    requests, ended = generation_requests(Sampling(12)), set()
    for request, free in zip(requests, texts(generate(tiny_teacher, requests)), strict=True):
        stop = tokenizer.decode(free[3:6])[1:]  # begins and ends inside tokens
        if not stop or "\ufffd" in stop:
            continue
        ids = torch.from_numpy(request.token_ids).long()[None]
        settings = GenerationConfig(
            max_new_tokens=12, do_sample=False, stop_strings=[stop], eos_token_id=None, pad_token_id=0
        )
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            tokenizer=tokenizer,
            suppress_tokens=PADDING,
        )
        (completion,) = generate(tiny_teacher, [replace(request, sampling=Sampling(12, stop=("never", stop)))])
        assert completion.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()
        assert completion.finish_reason == "stop"
        ended.add(len(completion.token_ids))
    assert ended
    assert max(ended) < 12


def test_an_answer_stays_within_the_engines_length(tiny_teacher: Path) -> None:
    (completion,) = generate(tiny_teacher, generation_requests(Sampling(10))[:1], max_length=12)
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def test_a_sampled_answer_depends_on_its_prompt_sample_and_seed_alone(tiny_teacher: Path) -> None:
    requests = generation_requests(Sampling(10, temperature=1.5, seed=3), n=2)
    together = texts(generate(tiny_teacher, requests))
    assert texts(generate(tiny_teacher, requests[1:2])) == together[1:2]
    assert together[0] != together[1], "two samples of one prompt"
    assert texts(generate(tiny_teacher, generation_requests(Sampling(10, temperature=1.5, seed=4), n=2))) != together


def test_one_generator_writes_in_several_ways(tiny_teacher: Path) -> None:
    greedy, warm = Sampling(10), Sampling(6, temperature=1.5, top_k=3, seed=3)
    mixed = [*generation_requests(greedy), *generation_requests(warm)]
    separate = generate(tiny_teacher, generation_requests(greedy)) + generate(tiny_teacher, generation_requests(warm))
    assert texts(generate(tiny_teacher, mixed)) == texts(separate)


@pytest.mark.parametrize("way", WAYS[1:])
def test_draws_follow_the_distribution_of_transformers_warpers(way: dict[str, float]) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    expected = warped(logits, Sampling(1, **way)).exp().numpy()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, Sampling(1, **way), generator) for _ in range(4000)]
    counts = np.bincount([token for token, _ in drawn], minlength=60) / 4000
    assert not counts[expected == 0].any()
    assert counts == pytest.approx(expected, abs=0.04)
    for token, logprob in drawn[:50]:
        assert logprob == pytest.approx(np.log(expected[token]), abs=1e-4)


def test_tokens_as_likely_as_the_last_one_kept_stay() -> None:
    falling = torch.tensor([0.4, 0.2, 0.2, 0.2])
    assert restrict(falling, Sampling(1, temperature=1.0, top_k=2)).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert restrict(falling, Sampling(1, temperature=1.0, top_p=0.3)).tolist() == pytest.approx([0.4, 0, 0, 0])


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2"):
        engine_plan(Engine(), Path("folder"), tensor_parallel_size=2)

"""The vLLM engine for real, on tiny models: labels against transformers, concurrency, death, tensor parallelism."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import vllm_process as cases
from generation_oracle import check_logprobs, generation_requests
from label_oracle import VOCABULARY, assert_labels_match, assert_states_match, oracle_of, random_unit, teacher_head_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder
from transformers import AutoTokenizer

from cluster.engines.hf import Engine as HfEngine
from cluster.engines.vllm import Engine
from configs.labels import Dense, GivenIds, Hidden, Nucleus, Sampled, Token, TopK
from trainer.errors import ConfigError, EngineDead
from trainer.types import Completion, GenerationRequest, Sampling

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

UNIT = random_unit("0:0", (60, [(5, 20), (31, 59)]), (90, [(60, 80)]), (7, [(0, 3)]), (12, []), (33, [(0, 32)]))
SPECS = (
    TopK(k=8),
    Dense(),
    Hidden(),
    Token(),
    Nucleus(p=0.3, k_max=40, control_ids=(2,)),
    Sampled(draws=20, control_ids=(2,)),
    GivenIds(k=8),
    GivenIds(k=1, add_target=False, add_teacher_topk=7),
)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with cases.vllm_process() as pool:
        yield pool


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tied": True}),
        ("llama", {"tied": True, "sliding_window": 16}),
        ("qwen2", {"tied": False}),
        ("qwen3", {"tied": True}),
        ("gemma2", {"tied": True}),
        ("llama", {"tied": True, "model_type": "cohere2", "sliding_window": 16, "logit_scale": 1.0}),
        ("llama", {"tied": False, "model_type": "nanochat"}),  # not in vLLM: its Transformers backend runs it
    ],
    ids=[
        "llama",
        "llama-that-ignores-its-window",
        "qwen2-untied",
        "qwen3",
        "gemma2-soft-capped",
        "cohere2-whose-window-vllm-widens",
        "nanochat-through-transformers",
    ],
)
def test_labels_equal_transformers_for_every_family(
    process: ProcessPoolExecutor, tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    folder = tiny_folder(tmp_path / family, family, **options)
    # 32 tokens a step: each of these sequences is cut into chunks, and steps hold rows of several units.
    answers = process.submit(cases.score_once, folder, UNIT, SPECS, max_num_batched_tokens=32).result()
    check(folder, answers)


def test_two_shards_make_the_same_labels(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "llama", tied=False)
    specs = (*SPECS, Hidden(layers=(0, 1, 2)))
    told = {"encodings": specs, "tensor_parallel_size": 2}
    *answers, (_, states) = process.submit(cases.score_once, folder, UNIT, specs, plan=told).result()
    check(folder, answers)
    assert_states_match((0, 1, 2), UNIT, folder, states)


def check(folder: Path, answers: list[tuple[object, dict[str, np.ndarray]]]) -> None:
    oracle, target_ids = oracle_of(folder, UNIT)
    head = teacher_head_of(folder)
    for spec, (report, columns) in zip(SPECS, answers, strict=True):
        assert_labels_match(spec, UNIT, columns, oracle, target_ids, head)
        assert report.unit_id == UNIT.id
        assert report.tokens_hash == UNIT.tokens_hash()
        assert (report.num_rows, report.num_tokens) == (UNIT.num_rows, UNIT.num_tokens)
        assert report.num_bytes == sum(column.nbytes for column in columns.values())
        assert report.num_non_finite == 0
        if spec.kind in ("nucleus", "sampled"):
            continue  # their mass is that of their tail
        kept = {
            "given_ids": 1 - np.exp(columns["tail"].astype(np.float64)).mean() if spec.takes_ids else None,
            "topk": np.exp(-np.sort(-oracle, axis=1)[:, :8]).sum(1).mean(),
            "token": np.exp(oracle[np.arange(len(oracle)), target_ids]).mean(),
        }.get(spec.kind, 1.0)
        assert report.mean_mass == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "layers"),
    [
        ("llama", {}, ((0, 2, 3), (1,))),
        ("llama", {"tied": False, "model_type": "nanochat"}, ((1, 2, 3),)),
    ],
    ids=["llama", "nanochat-through-transformers"],
)
def test_states_between_layers_equal_transformers(tmp_path: Path, family: str, options: dict, layers: tuple) -> None:
    folder = tiny_folder(tmp_path / family, family, num_hidden_layers=3, **options)
    specs = (*(Hidden(layers=one) for one in layers), Hidden(), TopK(k=8))
    told = {"encodings": specs}
    with cases.vllm_process() as own:  # vLLM's Transformers backend starts a model of transformers once in a process
        answers = own.submit(cases.score_once, folder, UNIT, specs, max_num_batched_tokens=32, plan=told).result()
    oracle, target_ids = oracle_of(folder, UNIT)
    for spec, (_, columns) in zip(specs, answers, strict=True):
        if spec.kind == "hidden" and spec.layers:
            assert_states_match(spec.layers, UNIT, folder, columns)
        assert_labels_match(spec, UNIT, columns, oracle, target_ids, teacher_head_of(folder))


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        ("gemma2", 1, "does not give the states between its layers; write engine: {kind: hf}"),
        ("llama", 3, "labels.layers: the teacher has layers 0 to 2, not 3"),
    ],
)
def test_layers_that_a_model_does_not_give_refuse_the_start(
    process: ProcessPoolExecutor, tmp_path: Path, family: str, layer: int, message: str
) -> None:
    folder, specs = tiny_folder(tmp_path / "teacher", family), (Hidden(layers=(layer,)),)
    with pytest.raises(ConfigError) as caught:
        process.submit(cases.score_once, folder, UNIT, specs, plan={"encodings": specs}).result()
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def behaviour(process: ProcessPoolExecutor, tiny_teacher: Path) -> cases.Behaviour:
    return process.submit(cases.observe_behaviour, tiny_teacher).result()


def test_a_second_units_requests_join_the_running_batch(behaviour: cases.Behaviour) -> None:
    assert behaviour.units_together == 2
    assert behaviour.steps_alone == 4  # twice 306 tokens, 256 a step
    assert behaviour.steps_together == 3
    assert behaviour.equal_together


def test_the_event_loop_runs_while_a_unit_is_scored(behaviour: cases.Behaviour) -> None:
    assert behaviour.ticks_while_scoring > 5


def test_a_unit_past_its_deadline_leaves_the_engine(behaviour: cases.Behaviour) -> None:
    assert "unit long" in behaviour.deadline_error
    assert behaviour.deadline_seen_after_s < 5.0
    assert behaviour.steps_of_aborted < cases.LONG / 2
    assert behaviour.scores_after_abort


def test_a_broken_engine_fails_every_unit_with_its_reason(behaviour: cases.Behaviour) -> None:
    assert len(behaviour.deaths) == 3
    for error in behaviour.deaths:
        assert isinstance(error, EngineDead)
        assert "this encoding is broken" in str(error)
    assert behaviour.still_alive_s < 30.0


def by_hf(folder: Path, requests: list[GenerationRequest]) -> list[Completion]:
    hf = HfEngine()
    generator = hf.start_generator(cases.engine_plan(hf, folder, role="generator"), "hf")
    completions = asyncio.run(generator.generate(requests, deadline_s=60))
    generator.close()
    return completions


def test_greedy_answers_equal_transformers_and_end_at_tokens_and_strings_alike(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    """One generator is asked in all of these ways at once."""
    free = by_hf(tiny_teacher, generation_requests(Sampling(12)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    ids = (int(free[0].token_ids[5]), int(free[1].token_ids[2]))
    strings = tuple(tokenizer.decode(one.token_ids[3:6])[1:] for one in free)
    assert all(strings)
    requests = [
        *generation_requests(Sampling(12)),
        *generation_requests(Sampling(12, stop_token_ids=ids)),
        *generation_requests(Sampling(12, stop=strings)),
    ]
    expected = by_hf(tiny_teacher, requests)
    assert [one.finish_reason for one in expected].count("stop") >= 4
    (completions,), num_tokens = process.submit(
        cases.generate_once, tiny_teacher, [requests], stop_strings=True
    ).result()
    assert [one.token_ids.tolist() for one in completions] == [one.token_ids.tolist() for one in expected]
    assert [one.finish_reason for one in completions] == [one.finish_reason for one in expected]
    assert all((one.author, one.versions) == ("teacher", ((0, "1"),)) for one in completions)
    assert all(one.token_ids.dtype == np.int32 for one in completions)
    assert num_tokens == 3 * 43 + sum(len(one.token_ids) for one in completions)
    check_logprobs(tiny_teacher, requests, completions)


def test_sampled_answers_are_drawn_as_asked_each_from_its_own_seed(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    ways = [
        Sampling(20, temperature=1.5, seed=5),
        Sampling(12, temperature=2.0, min_p=0.05, top_k=40, top_p=0.8, seed=5),
        Sampling(12),
    ]
    asked = [request for way in ways for request in generation_requests(way, n=2 if way.temperature else 1)]
    batches, _ = process.submit(cases.generate_once, tiny_teacher, [asked, asked[::-1], asked[1:2]]).result()
    check_logprobs(tiny_teacher, asked, batches[0])
    together, reversed_, alone = ([one.token_ids.tolist() for one in batch] for batch in batches)
    assert together == reversed_[::-1]
    assert together[1] == alone[0]
    assert together[0] != together[1], "two samples of one prompt"
    assert all(token < VOCABULARY for answer in together for token in answer)  # never a padded id


def test_a_generator_beside_the_scorer_changes_no_label_and_no_word(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    requests, spec = generation_requests(Sampling(60, temperature=1.0, seed=3)), TopK(k=8)
    ((_, alone),) = process.submit(cases.score_once, tiny_teacher, UNIT, (spec,)).result()
    ((written,), _) = process.submit(cases.generate_once, tiny_teacher, [requests]).result()
    both = process.submit(cases.score_beside_writing, tiny_teacher, UNIT, spec, requests).result()
    assert not both.unshared, "the weights are there once"
    for columns in both.columns:
        np.testing.assert_array_equal(columns["ids"], alone["ids"])
        np.testing.assert_allclose(columns["tail"], alone["tail"], atol=1e-5)
    for completions in both.completions:
        assert [one.token_ids.tolist() for one in completions] == [one.token_ids.tolist() for one in written]


def test_the_engine_thread_runs_what_it_is_given_between_two_steps(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    seen = process.submit(cases.run_in_engine, tiny_teacher, generation_requests(Sampling(60))).result()
    assert seen.result == seen.engine_thread
    assert seen.requests_inside == 3, "they stay while the engine is used"
    assert seen.equal_text
    assert "weights of another shape failed in the engine generator-0: RuntimeError: no weights" in seen.failure
    assert "InfrastructureError" in seen.failure
    assert "was not done in the engine" in seen.late
    assert not seen.late_call_ran
    assert "was closed" in seen.after_close


def test_a_cache_too_small_for_one_sequence_is_a_message(process: ProcessPoolExecutor, tiny_teacher: Path) -> None:
    started = process.submit(cases.score_once, tiny_teacher, UNIT, SPECS, kv_cache_bytes=2**16)
    with pytest.raises(ConfigError, match=r"kv_cache_bytes.*data\.max_length"):
        started.result()


@pytest.mark.parametrize("role", ["scorer", "generator"])
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_vllm_itself_accepts_the_arguments(
    process: ProcessPoolExecutor, tiny_teacher: Path, role: str, accelerator: str, tensor_parallel_size: int
) -> None:
    arguments = Engine().arguments(
        role=role,
        dtype="bfloat16",
        tensor_parallel_size=tensor_parallel_size,
        max_length=2048,
        accelerator=accelerator,
    )
    assert process.submit(cases.parse, tiny_teacher, arguments).result() == arguments


@pytest.mark.parametrize("damage", ["quantisation", "truncated", "shape", "head"])
def test_a_teacher_that_vllm_refuses_is_a_message_and_no_machines_fault(
    process: ProcessPoolExecutor, tmp_path: Path, damage: str
) -> None:
    """vLLM raises a validation error, an error of safetensors, an assertion, and at its first pass one of a kernel."""
    folder = tiny_folder(tmp_path / "teacher", **({"head_dim": 12} if damage == "head" else {}))
    config, file = folder / "config.json", folder / "model.safetensors"
    if damage == "quantisation":
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "nope"}})
        )
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    if damage == "shape":
        weights = load_file(file)
        name = next(name for name in weights if "q_proj" in name)
        save_file(weights | {name: weights[name][:8].contiguous()}, file, metadata={"format": "pt"})
    started = process.submit(cases.score_once, folder, UNIT, SPECS)
    with pytest.raises(ConfigError, match=rf"vLLM cannot run {folder} as a scorer \(float32, 256 tokens\): ") as caught:
        started.result()
    assert len(str(caught.value).splitlines()) == 1

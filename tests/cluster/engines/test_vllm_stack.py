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
from label_oracle import VOCABULARY, assert_labels_match, oracle_of, random_unit, teacher_head_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder

from cluster.engines.hf import Engine as HfEngine
from cluster.engines.plan import Sampling
from cluster.engines.vllm import Engine
from configs.labels import Dense, Hidden, Token, TopK
from trainer.errors import ConfigError, EngineDead
from trainer.types import Prompt

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

UNIT = random_unit("0:0", (60, [(5, 20), (31, 59)]), (90, [(60, 80)]), (7, [(0, 3)]), (12, []), (33, [(0, 32)]))
SPECS = (TopK(k=8), Dense(), Hidden(), Token())


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
    answers = process.submit(cases.score_once, folder, UNIT, SPECS, tensor_parallel_size=2).result()
    check(folder, answers)


def check(folder: Path, answers: list[tuple[object, dict[str, np.ndarray]]]) -> None:
    oracle, next_ids = oracle_of(folder, UNIT)
    head = teacher_head_of(folder)
    for spec, (report, columns) in zip(SPECS, answers, strict=True):
        assert_labels_match(spec.kind, columns, oracle, next_ids, head)
        assert report.unit_id == UNIT.id
        assert report.tokens_hash == UNIT.tokens_hash()
        assert (report.num_rows, report.num_tokens) == (UNIT.num_rows, UNIT.num_tokens)
        assert report.num_bytes == sum(column.nbytes for column in columns.values())
        assert report.num_non_finite == 0
        kept = {
            "topk": np.exp(-np.sort(-oracle, axis=1)[:, :8]).sum(1).mean(),
            "token": np.exp(oracle[np.arange(len(oracle)), next_ids]).mean(),
        }.get(spec.kind, 1.0)
        assert report.mean_mass == pytest.approx(kept, abs=1e-4)


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


def prompts(*lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [
        Prompt(f"0:{i}", rng.integers(3, VOCABULARY, n).astype(np.int32), None, f"test:{i}")
        for i, n in enumerate(lengths)
    ]


def test_greedy_answers_equal_transformers_and_keep_their_stop_token(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    asked = prompts(9, 30, 4)
    free = Sampling(max_new_tokens=12)
    hf = HfEngine()
    writer = hf.start_writer(cases.engine_plan(hf, tiny_teacher, role="writer", sampling=free), "hf")
    expected = asyncio.run(writer.write(asked, deadline_s=60))
    writer.close()
    stops = (int(expected[0][5]), int(expected[1][2]))
    ends = [next((i + 1 for i, token in enumerate(answer) if token in stops), 12) for answer in expected]
    cut = [list(answer[:end]) for answer, end in zip(expected, ends, strict=True)]

    (answers,), num_tokens = process.submit(
        cases.write_answers, tiny_teacher, [asked], Sampling(max_new_tokens=12, stop_token_ids=stops)
    ).result()
    assert [list(answer) for answer in answers] == cut
    assert answers[0][-1] in stops
    assert answers[1][-1] in stops
    assert all(answer.dtype == np.int32 for answer in answers)
    assert num_tokens == 43 + sum(len(answer) for answer in cut)


def test_a_sampled_answer_depends_on_its_prompt_and_seed_alone(
    process: ProcessPoolExecutor, tiny_teacher: Path
) -> None:
    asked = prompts(9, 30, 4)
    sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=5)
    batches, _ = process.submit(cases.write_answers, tiny_teacher, [asked, asked[::-1], asked[1:2]], sampling).result()
    together, reversed_, alone = ([list(answer) for answer in answers] for answers in batches)
    assert together == reversed_[::-1]
    assert together[1] == alone[0]
    assert together[0] != together[1]
    assert all(token < VOCABULARY for answer in together for token in answer)  # never a padded id


def test_a_cache_too_small_for_one_sequence_is_a_message(process: ProcessPoolExecutor, tiny_teacher: Path) -> None:
    started = process.submit(cases.score_once, tiny_teacher, UNIT, SPECS, kv_cache_bytes=2**16)
    with pytest.raises(ConfigError, match=r"kv_cache_bytes.*data\.max_length"):
        started.result()


@pytest.mark.parametrize("role", ["scorer", "writer"])
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
        kept_events=64,
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

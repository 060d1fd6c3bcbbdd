"""What vLLM is told per role and device; vLLM itself is not imported."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest

from cluster.engines.vllm import Engine


def arguments(engine: Engine | None = None, **changes: Any) -> dict[str, Any]:
    asked = {
        "role": "scorer",
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "max_length": 2048,
        "accelerator": "gpu",
    }
    return (engine or Engine()).arguments(**{**asked, **changes})


def test_cpu_settings_never_reach_a_gpu() -> None:
    for role, size in itertools.product(["scorer", "generator"], [1, 8]):
        given = arguments(role=role, tensor_parallel_size=size)
        assert given["enforce_eager"] is False
        assert not {"block_size", "kv_cache_memory_bytes"} & set(given)
        assert given["gpu_memory_utilization"] == 0.9


def test_a_cpu_engine_is_small_and_eager() -> None:
    given = arguments(accelerator="cpu", dtype="float32")
    assert given["enforce_eager"] is True
    assert given["block_size"] % 32 == 0
    assert given["kv_cache_memory_bytes"] <= 256 * 2**20
    assert "gpu_memory_utilization" not in given


@pytest.mark.parametrize(("size", "backend"), [(1, "uni"), (2, "mp"), (8, "mp")])
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_the_executor_is_named(size: int, backend: str, accelerator: str) -> None:
    given = arguments(tensor_parallel_size=size, accelerator=accelerator)
    assert given["distributed_executor_backend"] == backend


def test_a_scorer_pools_and_a_generator_generates() -> None:
    scorer, generator = arguments(role="scorer"), arguments(role="generator")
    assert (scorer["runner"], generator["runner"]) == ("pooling", "generate")
    assert (scorer["enable_prefix_caching"], generator["enable_prefix_caching"]) == (False, True)
    assert scorer["hf_overrides"] == {"head_dtype": "model"}
    assert generator["logprobs_mode"] == "processed_logprobs"


def test_a_tokenizer_is_loaded_only_to_stop_at_strings() -> None:
    assert all(arguments(role=role)["skip_tokenizer_init"] for role in ("scorer", "generator"))
    assert arguments(role="scorer", stop_strings=True)["skip_tokenizer_init"]
    assert not arguments(role="generator", stop_strings=True)["skip_tokenizer_init"]


def test_what_a_config_gives_wins() -> None:
    engine = Engine(kv_cache_bytes=2**30, max_num_seqs=7, max_num_batched_tokens=512, enforce_eager=False)
    for accelerator in ("cpu", "gpu"):
        given = arguments(engine, accelerator=accelerator)
        assert given["kv_cache_memory_bytes"] == 2**30
        assert (given["max_num_seqs"], given["max_num_batched_tokens"], given["enforce_eager"]) == (7, 512, False)


def test_a_step_holds_a_token_of_every_running_sequence() -> None:
    assert arguments(Engine(max_num_batched_tokens=16), accelerator="cpu")["max_num_seqs"] == 16


@pytest.mark.parametrize(
    "parameters", [{"gpu_memory_utilization": 1.5}, {"gpu_memory_utilization": 0}, {"max_num_seqs": 0}]
)
def test_impossible_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Engine(**parameters)


def test_engine_files_import_neither_vllm_nor_ray() -> None:
    program = "import sys, cluster.engines.vllm, cluster.engines.hf; sys.exit(bool({'vllm', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0

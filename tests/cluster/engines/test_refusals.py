"""Why engines do not start: one message, of the type and exit code that is due, whatever a library raises."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from cluster.engines.refusals import start_errors, start_failure
from trainer.errors import ConfigError, EngineDead, InfrastructureError, StillhouseError


class Judged(pydantic.BaseModel):
    length: int

    @pydantic.field_validator("length")
    @classmethod
    def _fits(cls, value: int) -> int:
        if value > 10:
            raise ValueError("the length 99 is over the model's 10")
        return value


def refused(cause: BaseException) -> StillhouseError:
    with (
        pytest.raises(StillhouseError) as caught,
        start_errors("vLLM cannot run m", hint="max_model_len is data.max_length"),
    ):
        raise cause
    return caught.value


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("no such quantisation: nope"),
        NotImplementedError("head size 12 has no kernel"),
        AssertionError(),
        KeyError("layers.0.foo.weight"),
        AttributeError("'Config' object has no attribute 'heads'"),
        RuntimeError("size mismatch for q_proj"),
        ImportError("fp8 needs the package marlin"),
        OSError("m does not appear to have a file named model.safetensors"),
        FileNotFoundError(errno.ENOENT, "no such file", "m/config.json"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_what_a_model_or_a_setting_is_refused_for_is_an_error_of_the_configuration(cause: Exception) -> None:
    error = refused(cause)
    assert type(error) is ConfigError
    assert error.exit_code == 2
    assert str(error).startswith("vLLM cannot run m: ")
    assert str(error).endswith("; max_model_len is data.max_length")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        RuntimeError("NCCL error: unhandled system error"),
        ValueError("Free memory on device (3.1/79.1 GiB) on startup is less than desired GPU memory utilization"),
        OSError(errno.ENOSPC, "No space left on device"),
        ConnectionResetError(errno.ECONNRESET, "reset by peer"),
        ImportError("libcudart.so.13: cannot open shared object file"),
        RuntimeError("Engine core initialization failed. See root cause above."),
    ],
    ids=lambda cause: str(cause)[:24],
)
def test_what_a_machine_fails_at_is_an_error_of_the_infrastructure(cause: Exception) -> None:
    error = refused(cause)
    assert type(error) is InfrastructureError
    assert error.exit_code == 4
    assert "data.max_length" not in str(error)


def test_validation_errors_are_said_without_the_arguments_they_judged() -> None:
    with pytest.raises(ConfigError, match=r"^x: the length 99 is over the model's 10$"), start_errors("x"):
        Judged(length=99)


def test_errors_of_ours_pass_unchanged() -> None:
    ours = EngineDead("died")
    assert refused(ours) is ours


@pytest.mark.parametrize(
    ("logged", "kind"),
    [
        ("ValueError: head size 12 has no kernel", ConfigError),
        ("torch.OutOfMemoryError: CUDA out of memory", InfrastructureError),
        ("", InfrastructureError),
    ],
)
def test_an_error_of_another_process_is_judged_by_what_that_one_logged(logged: str, kind: type) -> None:
    by_proxy = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert type(start_failure("did not start", cause=by_proxy, logged=logged)) is kind
    of_its_own = InfrastructureError("no answer after 600 s")
    assert type(start_failure("did not start", cause=of_its_own, logged=logged)) is InfrastructureError


@pytest.mark.parametrize("damage", ["truncated", "shape", "architecture"])
def test_a_teacher_that_transformers_cannot_load_is_one_message(tmp_path: Path, damage: str) -> None:
    folder = tiny_folder(tmp_path / "teacher")
    file, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "shape":
        weights = load_file(file)
        name = next(name for name in weights if "q_proj" in name)
        save_file(weights | {name: weights[name][:8].contiguous()}, file, metadata={"format": "pt"})
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "nope"}))
    with pytest.raises(ConfigError, match=rf"^transformers cannot load the teacher {folder}: "):
        Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")


def test_a_quantisation_that_transformers_would_skip_is_refused(tmp_path: Path) -> None:
    """transformers reads such weights as if they were not quantised, with a warning alone."""
    folder = tiny_folder(tmp_path / "teacher")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "nope"}}))
    with pytest.raises(ConfigError, match=r"is quantised in a way that transformers does not know .*nope"):
        Engine().start_scorer(engine_plan(Engine(), folder), "hf-0")

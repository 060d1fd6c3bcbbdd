"""Where a teacher's answer ends, and what of its generation settings no generator applies, as transformers has it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_folder
from tiny_runs import tiny_run
from transformers import AutoModelForCausalLM
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from configs.load import load_run
from configs.models import ModelSource
from trainer.errors import ConfigError
from trainer.loop.inputs import read_inputs
from trainer.model.generation_settings import end_ids, unused_settings
from trainer.types import GenerationRequest, Sampling

LENGTHS = (9, 30, 4, 17)


def settings(folder: Path, **values: object) -> ModelSource:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return ModelSource(path=str(folder))


def requests(stop_ids: tuple[int, ...] = ()) -> list[GenerationRequest]:
    rng = np.random.default_rng(7)
    sampling = Sampling(12, stop_token_ids=stop_ids)
    return [GenerationRequest(f"0:{n}", rng.integers(3, 283, n).astype(np.int32), sampling) for n in LENGTHS]


def by_transformers(folder: Path) -> list[list[int]]:
    """Greedy answers of at most 12 tokens, of `generate` with the folder's own settings."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = list(range(283, 320))  # a generator never writes padding
    answers = []
    for request in requests():
        ids = torch.from_numpy(request.token_ids).long()[None]
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, suppress_tokens=kept
        )
        answers.append(written[0, ids.shape[1] :].tolist())
    return answers


def written(folder: Path, stop_ids: tuple[int, ...]) -> list[list[int]]:
    generator = Engine().start_generator(engine_plan(Engine(), folder, role="generator"), "hf-0")
    completions = asyncio.run(generator.generate(requests(stop_ids), deadline_s=60))
    generator.close()
    return [completion.token_ids.tolist() for completion in completions]


def test_a_generator_ends_where_transformers_does(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "teacher", seed=1)
    free = by_transformers(folder)
    also = free[0][0]  # the first answer begins with it, so it ends there
    source = settings(folder, eos_token_id=[2, also], bos_token_id=1, pad_token_id=0)
    assert end_ids(source) == (2, also)
    expected = by_transformers(folder)
    assert expected[0] == [also]
    assert expected != free
    assert written(folder, end_ids(source)) == expected
    assert written(folder, (2,)) != expected  # the tokenizer's alone


@pytest.mark.parametrize(("eos", "ids"), [(5, (5,)), ([2, 5, 2], (2, 5)), (None, ())])
def test_end_ids_are_a_number_a_list_or_none(tmp_path: Path, eos: object, ids: tuple[int, ...]) -> None:
    assert end_ids(settings(tmp_path, eos_token_id=eos)) == ids


@pytest.mark.parametrize("wrong", ["</s>", [2.5], True, -1])
def test_an_end_id_that_is_no_number_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"is no token id; write a number or a list"):
        end_ids(settings(tmp_path, eos_token_id=wrong))


def test_without_the_file_the_model_configuration_says_where_texts_end(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "teacher", eos_token_id=[2, 7])
    (folder / "generation_config.json").unlink()
    assert end_ids(ModelSource(path=str(folder))) == (2, 7)
    assert unused_settings(ModelSource(path=str(folder)), temperature=1.0) == {}


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_file_is_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json.*remove it, or write one"):
        end_ids(ModelSource(path=str(tmp_path)))


def test_all_stations_of_a_run_stop_at_the_same_ids(tmp_path: Path) -> None:
    file = tiny_run(tmp_path)
    settings(tmp_path / "teacher", eos_token_id=[40, 2, 310])
    inputs = read_inputs(load_run(file, []).run)
    assert inputs.first.template.stop_ids == (2,)
    assert inputs.first.stop_ids == (2, 40)  # 310 is padding, which nobody writes


def test_settings_that_a_generator_does_not_apply_are_named_and_those_of_the_run_are_not(tmp_path: Path) -> None:
    usual = {
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": [2, 40],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 2048,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
    }
    source = settings(tmp_path, **usual)
    assert unused_settings(source, temperature=0.0) == {}
    assert unused_settings(source, temperature=0.7) == {"top_k": 20}
    assert unused_settings(source, temperature=0.7, decided={"top_k"}) == {}
    changing = {
        "repetition_penalty": 1.05,
        "suppress_tokens": [3],
        "bad_words_ids": [[5]],
        "forced_eos_token_id": 2,
        "stop_strings": ["\n\n"],
        "min_new_tokens": 4,
        "a_setting_of_tomorrow": 1,
    }
    assert unused_settings(settings(tmp_path, **usual | changing), temperature=0.0) == changing

"""A config.json that describes what no model is costs neither time nor memory, and gives one message."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
from tiny_models import tiny_folder

from configs.models import ModelSource
from launch.model_folder import read_facts
from trainer.errors import ConfigError
from trainer.model.load import load_config


def _with(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _facts(folder: Path) -> object:
    return read_facts(ModelSource(path=str(folder)), path_name="student.model.path", needs_weights=True)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 100_000},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 1e300},
        {"vocab_size": 10**12},
        {"hidden_size": 10**10},
        {"num_attention_heads": 10**30},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_experts": 10**9},
        {"num_key_value_heads": [1, 10**12]},
    ],
    ids=str,
)
def test_an_absurd_size_is_named_before_anything_is_built(change: dict[str, object], tmp_path: Path) -> None:
    folder = _with(tiny_folder(tmp_path), **change)
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=rf"config\.json says {next(iter(change.get('text_config', change)))}: "):
        _facts(folder)
    assert time.monotonic() - started < 5.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 100}, "lacks model.layers.10.input_layernorm.weight and 881 more"),
        ({"vocab_size": 2**31 - 1}, r"has the shape \[320, 64\]"),
        ({"hidden_size": 2**31 - 4}, "student.model.path: "),  # more elements than a number of 64 bits counts
        ({"num_hidden_layers": -1}, "config.json says num_hidden_layers: -1"),
        ({"hidden_size": 0}, "student.model.path: "),
        ({"num_hidden_layers": "many"}, "student.model.path: cannot read the configuration"),
    ],
    ids=str,
)
def test_a_size_within_bounds_is_held_against_the_weights(change: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        _facts(_with(tiny_folder(tmp_path), **change))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"model_type": "llama", "hidden_size": NaN}', "\x00"])
def test_a_config_that_is_none_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"teacher\.model: .*config"):
        load_config(ModelSource(path=str(tmp_path)), role="teacher.model")


def test_numbers_that_are_no_sizes_may_be_large(tmp_path: Path) -> None:
    large = {"rope_theta": 10**12, "seed": 2**40, "max_position_embeddings": 10**7}
    assert _facts(_with(tiny_folder(tmp_path), **large))

"""Preparing a packaged model: made once, verified on every later call, never on top of somebody's folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from launch.prepare import CATALOGUE, PackagedModel, prepare, prepare_source
from trainer.errors import ConfigError

PAYLOAD = b"weights as the package ships them"
MODEL = PackagedModel(
    distribution="some-package",
    file="weights.gguf",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    licence="apache-2.0",
    licence_note="see the card",
    eos_token_id=2,
    max_length=64,
)


class CountingConverter:
    """Stands for the GGUF conversion: writes two files, or dies between them."""

    def __init__(self, *, dies: bool = False) -> None:
        self.calls = 0
        self.dies = dies

    def __call__(self, source: Path, target: Path, model: PackagedModel) -> None:
        self.calls += 1
        (target / "config.json").write_text("{}")
        if self.dies:
            raise OSError("no space left on device")
        (target / "model.safetensors").write_bytes(source.read_bytes()[::-1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "weights.gguf"
    file.write_bytes(PAYLOAD)
    return file


def test_a_second_call_verifies_and_converts_nothing(source: Path, tmp_path: Path) -> None:
    convert = CountingConverter()
    for _ in range(2):
        prepare_source("some", MODEL, source, tmp_path / "cache" / "model", convert)
    assert convert.calls == 1
    assert (tmp_path / "cache" / "model" / "LICENCE_NOTE.md").read_text() == "see the card"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_missing_or_damaged_file_makes_the_folder_again(harm: str, source: Path, tmp_path: Path) -> None:
    convert = CountingConverter()
    target = prepare_source("some", MODEL, source, tmp_path / "model", convert)
    whole = (target / "model.safetensors").read_bytes()
    if harm == "missing":
        (target / "model.safetensors").unlink()
    else:
        (target / "model.safetensors").write_bytes(whole[:-1] + b"x")
    prepare_source("some", MODEL, source, target, convert)
    assert convert.calls == 2
    assert (target / "model.safetensors").read_bytes() == whole


def test_a_source_with_another_hash_is_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(PAYLOAD + b"!")
    convert = CountingConverter()
    with pytest.raises(ConfigError, match=r"has sha256 .* expected"):
        prepare_source("some", MODEL, source, tmp_path / "model", convert)
    assert convert.calls == 0
    assert not (tmp_path / "model").exists()


def test_a_conversion_that_dies_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"):
        prepare_source("some", MODEL, source, tmp_path / "cache" / "model", CountingConverter(dies=True))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_of_somebody_else_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by this command"):
        prepare_source("some", MODEL, source, tmp_path / "mine", CountingConverter())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m-instruct"):
        prepare("gpt-5", tmp_path / "model")
    assert set(CATALOGUE) == {"smollm2-135m-instruct"}

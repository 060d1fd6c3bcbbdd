"""Which pairs of teacher and student read the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import SMALL, tiny_tokenizer
from transformers import AutoConfig

from configs.models import ModelSource
from trainer.data.vocabulary import check_pair, fingerprint, load_tokenizer
from trainer.errors import ConfigError


def model_folder(folder: Path, *, rows: int = 320, change: Callable[[dict], None] | None = None) -> ModelSource:
    """A folder with configuration and tokenizer; `change` edits `tokenizer.json`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model("llama", **{**SMALL, "vocab_size": rows}).save_pretrained(folder)
    if change is not None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return ModelSource(path=str(folder))


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def rename_token(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["zzz"] = vocabulary.pop("Q")


def swap_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_special(content: dict) -> None:
    last = dict(content["added_tokens"][-1], id=len(content["model"]["vocab"]), content="<extra>")
    content["added_tokens"].append(last)


def lower_case(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def test_the_same_tokenizer_is_accepted_however_the_rows_are_padded(tmp_path: Path) -> None:
    shared = check_pair(model_folder(tmp_path / "a", rows=283), model_folder(tmp_path / "b", rows=320))
    size = len(tiny_tokenizer())
    assert (shared.size, shared.teacher_rows, shared.student_rows) == (size, 283, 320)
    assert shared.fingerprint == fingerprint(tiny_tokenizer())
    assert len(shared.fingerprint) == 16


def test_added_special_tokens_count_in_the_size(tmp_path: Path) -> None:
    teacher, student = (model_folder(tmp_path / name, change=add_special) for name in "ab")
    shared = check_pair(teacher, student)
    assert shared.size == len(tiny_tokenizer()) + 1
    assert shared.fingerprint != fingerprint(tiny_tokenizer())


def test_a_base_model_with_another_eos_and_template_is_the_same_tokenizer(tmp_path: Path) -> None:
    teacher, student = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    settings = tmp_path / "b" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "eos_token": "<pad>"}))
    (tmp_path / "b" / "chat_template.jinja").unlink()
    assert load_tokenizer(student).eos_token == "<pad>"
    check_pair(teacher, student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_merges, r"the merges differ from number 3 on"),
        (rename_token, r"2 token\(s\) differ, first 'Q' is id \d+ for the teacher and absent for the student"),
        (swap_ids, r"2 token\(s\) differ, first 'a' is id \d+ for the teacher and id \d+ for the student"),
        (add_special, r"1 token\(s\) differ, first '<extra>' is absent for the teacher and id \d+ for the student"),
        (lower_case, r"the same text 'The quick.* becomes"),
    ],
)
def test_a_different_tokenizer_is_refused_with_what_differs(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    teacher, student = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", change=change)
    with pytest.raises(ConfigError, match=message) as caught:
        check_pair(teacher, student)
    assert "Write align: overlap (by tokens that both have), align: chunks" in str(caught.value)
    assert f"({len(tiny_tokenizer())} tokens)" in str(caught.value)


def test_a_model_with_too_few_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 200 embedding rows .* ids up to \d+"):
        check_pair(model_folder(tmp_path / "a"), model_folder(tmp_path / "b", rows=200))


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model folder .*nowhere does not exist"):
        load_tokenizer(ModelSource(path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"cannot load the tokenizer of .* \(the folder\)"):
        load_tokenizer(ModelSource(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"cannot load the tokenizer of no-such-owner/model \(no such folder here"):
        load_tokenizer(ModelSource(path="no-such-owner/model"))
    source = model_folder(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the config.json of"):
        check_pair(source, source)

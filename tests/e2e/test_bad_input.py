"""What a user's mistake gets: one clear message, the documented exit code, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import chat_row, merged, stillhouse, tiny_run, write_rows

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows shared by all cases; each case writes its own YAML beside them."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_run(folder)
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "no_answer.jsonl", [chat_row(0), chat_row(1, answered=False)])
    write_rows(folder / "no_assistant.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    write_rows(folder / "wrong_field.jsonl", [{"question": "what"}])
    other = folder / "other_tokenizer"
    shutil.copytree(folder / "student", other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    first, second = [token for token, index in ids.items() if index in (100, 101)]
    ids[first], ids[second] = ids[second], ids[first]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


CASES: dict[str, tuple[Mapping[str, Any], int, list[str]]] = {
    "unknown key": ({"optimizer": {"learnig_rate": 1}}, 2, ["learnig_rate", "did you mean 'learning_rate'"]),
    "wrong type": ({"training": {"sequences_per_step": "many"}}, 2, ["training.sequences_per_step", "many"]),
    "zero steps": ({"training": {"steps": 0}}, 2, ["training.steps"]),
    "missing model": ({"teacher": {"model": {"path": "{place}/teachr"}}}, 2, ["teachr"]),
    "missing data": ({"prompts": {"path": "{place}/trian.jsonl"}}, 2, ["trian.jsonl"]),
    "empty dataset": ({"prompts": {"path": "{place}/empty.jsonl"}}, 3, ["empty.jsonl", "no rows"]),
    "row without answer": ({"prompts": {"path": "{place}/no_answer.jsonl"}}, 3, ["no_answer.jsonl:2"]),
    "no assistant turn": ({"prompts": {"path": "{place}/no_assistant.jsonl"}}, 3, ["no_assistant.jsonl:1"]),
    "row without field": ({"prompts": {"path": "{place}/wrong_field.jsonl"}}, 3, ["wrong_field.jsonl"]),
    "other tokenizer": (
        {"student": {"model": {"path": "{place}/other_tokenizer"}}},
        2,
        ["different tokenizers"],
    ),
    "more GPU ranks than GPUs": ({"accelerator": "gpu", "student": {"ranks": 9}}, 2, ["no GPU"]),
    "split that does not divide the heads": (
        {"teacher": {"scorer": {"engine": {"kind": "vllm"}, "tensor_parallel_size": 3}}},
        2,
        ["teacher.scorer.tensor_parallel_size: 3 does not divide", "attention heads"],
    ),
    "more nodes than there are": (
        {"student": {"placement": {"nodes": 2}}},
        2,
        ["student needs 2 nodes, and 1 of 1 registered can be used"],
    ),
    "label that no node has": (
        {"teacher": {"scorer": {"placement": {"node_labels": {"pool": "a"}}}}},
        2,
        ["scorer needs 1 node with labels pool=a, and 0 of 1 registered can be used"],
    ),
    "folder that cannot be made": ({"folder": "{place}/empty.jsonl/run"}, 2, ["empty.jsonl"]),
}


def placed(value: Any, place: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: placed(item, place) for key, item in value.items()}
    return value.replace("{place}", str(place)) if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_clear_message_before_anything_starts(place: Path, case: str) -> None:
    changes, code, said = CASES[case]
    config = tiny_run(place, merged({"folder": str(place / "run-of-mistake")}, placed(changes, place)))
    result = stillhouse("train", str(config), timeout_s=400)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for words in said:
        assert words in result.stderr, result.stderr
    assert not (place / "run-of-mistake" / "metrics.jsonl").exists()
    assert not (place / "run-of-mistake" / "checkpoints").exists()


def test_padded_vocabularies_of_one_tokenizer_are_accepted(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    wider = tmp_path / "wider"
    tiny_model(seed=5, num_hidden_layers=1, vocab_size=384).save_pretrained(wider)
    tiny_tokenizer().save_pretrained(wider)
    changes = {
        "student": {"model": {"path": str(wider)}, "ranks": 1},
        "runtime": "in_process",
        "training": {"steps": 3},
    }
    config = tiny_run(tmp_path, merged(changes, {"training": {"save_every": 0}, "optimizer": {"warmup_steps": 0}}))
    result = stillhouse("train", str(config))
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_engine_that_cannot_start_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    result = stillhouse("train", str(config), timeout_s=600)
    assert result.returncode in (2, 4), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "safetensors" in result.stderr.lower() or "header" in result.stderr.lower(), result.stderr

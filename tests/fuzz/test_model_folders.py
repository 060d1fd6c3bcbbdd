"""Model folders as they come: `check` finds what is wrong, or the folder is good; nothing else comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mutations import Damage, outcomes

from configs.schema import Run
from launch.check.run import examine
from trainer.errors import ConfigError

ROW = {"messages": [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "the quick fox"}]}


def run_of(teacher: Path, student: Path, rows: Path) -> Run:
    config: dict[str, Any] = {
        "name": "tiny",
        "folder": str(rows.parent / "out"),
        "student": {"model": {"path": str(student)}},
        "teacher": {"model": {"path": str(teacher)}, "scorer": {"engine": "hf"}},
        "prompts": {"path": str(rows)},
        "data": {"max_length": 64},
        "training": {"steps": 2, "micro_batch_tokens": 64},
    }
    return Run.model_validate(config)


def damage_folder(folder: Path, damage: Damage) -> None:
    """One file of a model folder changed as values or bytes, emptied, removed, or made into something else."""
    file = damage.random.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    if damage.random.random() < 0.5:
        file = folder / "config.json"
    choice = damage.random.random()
    if choice < 0.08:
        file.unlink()
    elif choice < 0.12:
        file.unlink()
        file.mkdir()
    elif file.suffix == ".json" and choice < 0.75:
        file.write_text(json.dumps(damage.tree(json.loads(file.read_text()), most=2)))
    elif file.suffix == ".safetensors" and choice < 0.6:
        file.write_bytes(with_another_header(file.read_bytes(), damage))
    else:
        file.write_bytes(damage.bytes(file.read_bytes()))


def with_another_header(content: bytes, damage: Damage) -> bytes:
    """A safetensors file whose table of tensors says something else."""
    length = int.from_bytes(content[:8], "little")
    table = json.dumps(damage.tree(json.loads(content[8 : 8 + length]), most=2)).encode()
    said = len(table) if damage.random.random() < 0.8 else damage.random.choice([0, 2**62, length, 2**63])
    return said.to_bytes(8, "little") + table + content[8 + length :]


def examine_damaged(models: dict[str, Path], folder: Path, seed: int) -> None:
    damage = Damage(seed)
    role = damage.random.choice(["teacher", "student"])
    here = folder / "damaged"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(models[role], here)
    damage_folder(here, damage)
    run = run_of(**(models | {role: here}), rows=folder / "rows.jsonl")
    findings = list(examine(run))
    for finding in findings:
        assert finding.text.strip()
        assert len(finding.text) < 5000, finding.text[:500]
        assert "Traceback" not in finding.text
    if problems := [finding.text for finding in findings if finding.fatal]:
        raise ConfigError(problems[0])


@pytest.fixture
def models(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return {"teacher": tiny_teacher, "student": tiny_student}


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": "a/b"}]}, "cannot load the tokenizer"),
        ("tokenizer_config.json", {"model_max_length": "a"}, "cannot encode a text"),
        ("tokenizer_config.json", {"model_max_length": {}}, "cannot encode a text"),
        ("config.json", {"hidden_size": {}}, "cannot read the configuration"),
        ("config.json", {"num_attention_heads": 0}, "student.model.path"),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": {}}}, "student.model.path"),
    ],
    ids=str,
)
def test_what_was_found_once_is_one_message(
    file: str, changes: dict[str, Any], said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    here = Path(shutil.copytree(models["student"], tmp_path / "here"))
    content = json.loads((here / file).read_text())
    (here / file).write_text(json.dumps(content | changes))
    findings = list(examine(run_of(models["teacher"], here, tmp_path / "rows.jsonl")))
    assert any(said in finding.text for finding in findings if finding.fatal), findings


def test_a_shape_that_no_memory_holds_is_one_message(models: dict[str, Path], tmp_path: Path) -> None:
    here = Path(shutil.copytree(models["student"], tmp_path / "here"))
    file = here / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    next(entry for name, entry in table.items() if name[0] != "_")["shape"] = [2**63 - 1, 64]
    text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    findings = list(examine(run_of(models["teacher"], here, tmp_path / "rows.jsonl")))
    assert any("cannot be made into" in finding.text for finding in findings if finding.fatal), findings


@pytest.mark.timeout(900)
def test_check_finds_what_is_wrong_with_damaged_model_folders(models: dict[str, Path], tmp_path: Path) -> None:
    ended = outcomes(lambda seed: examine_damaged(models, tmp_path, seed), range(60))
    assert min(ended["ok"], ended["ConfigError"]) >= 10, ended


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_check_finds_what_is_wrong_with_thousands_of_damaged_model_folders(
    models: dict[str, Path], tmp_path: Path
) -> None:
    outcomes(lambda seed: examine_damaged(models, tmp_path, seed), range(1000, 3000))

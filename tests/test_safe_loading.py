"""Nothing here loads a pickle that somebody else made: every place that reads weights or tensors says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [file for layer in ("configs", "trainer", "cluster", "launch") for file in sorted((ROOT / layer).rglob("*.py"))]
WITHOUT_WEIGHTS = {"AutoConfig", "AutoTokenizer", "GenerationConfig", "loader", "peft.PeftModel"}
"""No weights, or an adapter of the run folder, where `export` demands safetensors."""


def unsafe_calls(name: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loads_weights = called.endswith(".from_pretrained") and called.rpartition(".")[0] not in WITHOUT_WEIGHTS
        if loads_weights and keywords.get("use_safetensors") != "True" and "gguf_file" not in keywords:
            yield f"{name}:{node.lineno}: {called} without use_safetensors=True"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{name}:{node.lineno}: torch.load without weights_only=True"
        if called in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec"):
            yield f"{name}:{node.lineno}: {called}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_loads_no_pickle(file: Path) -> None:
    assert list(unsafe_calls(file.relative_to(ROOT).as_posix(), file.read_text())) == []


def test_the_check_finds_what_it_is_for() -> None:
    source = "AutoModel.from_pretrained(x)\ntorch.load(y)\npickle.loads(z)\nAutoConfig.from_pretrained(x)"
    assert [text.split(": ")[0] for text in unsafe_calls("x", source)] == ["x:1", "x:2", "x:3"]

"""A whole run in miniature: two tiny models of one tokenizer, a few dozen chat rows, and the YAML that names them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tiny_models import tiny_folder
from warm_command import run_warm

from trainer.run_folder import read_lines

# fmt: off
WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "a",
    "still", "turns", "large", "wash", "into", "small", "clear", "spirit", "drop", "by",
)
# fmt: on


SHARDED = {
    "teacher": {"scorer": {"engine": {"kind": "vllm", "kv_cache_bytes": 32 * 2**20}, "tensor_parallel_size": 2}},
}
"""A vLLM teacher in two shards: an engine with processes and shared memory of its own."""


def chat_row(index: int, *, answered: bool = True) -> dict[str, Any]:
    """Deterministic small talk; lengths differ from row to row."""
    pick = lambda offset, count: " ".join(WORDS[(index * 7 + offset + i) % len(WORDS)] for i in range(count))  # noqa: E731
    prompt = [{"role": "user", "content": pick(0, 3 + index % 5)}]
    answer = [{"role": "assistant", "content": pick(3, 4 + index % 9)}]
    return {"prompt": prompt, "completion": answer if answered else None}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def tiny_run(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Make models, rows and configuration under `folder`; returns the YAML's path. The run goes to `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").exists():
        tiny_folder(folder / "teacher", seed=1)
        tiny_folder(folder / "student", seed=2, num_hidden_layers=1)
        write_rows(folder / "train.jsonl", [chat_row(i) for i in range(40)])
        write_rows(folder / "held_out.jsonl", [chat_row(100 + i) for i in range(6)])
    base = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "student": {
            "model": {"path": str(folder / "student"), "licence": "apache-2.0"},
            "ranks": 2,
            "dtype": "float32",
            "zero_stage": 2,
        },
        "teacher": {
            "model": {"path": str(folder / "teacher"), "licence": "apache-2.0"},
            "scorer": {"engine": {"kind": "hf"}, "dtype": "float32"},
        },
        "prompts": {"path": str(folder / "train.jsonl")},
        "data": {
            "evaluation": {"path": str(folder / "held_out.jsonl")},
            "max_length": 128,
        },
        "labels": {"kind": "topk", "k": 16},
        "objective": [{"loss": "forward_kl"}],
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "training": {
            "steps": 8,
            "sequences_per_step": 8,
            "micro_batch_tokens": 256,
            "depth": 2,
            "save_every": 4,
        },
        "report": {"generate": 1, "generate_tokens": 8, "viewer_sequences": 1},
    }
    path = folder / "run.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(merged(base, changes or {}), file)
    return path


def run_of(folder: Path, changes: dict[str, Any]) -> Path:
    """A tiny run without the `teacher` of all others."""
    config = tiny_run(folder, changes)
    yaml = YAML(typ="safe")
    run = yaml.load(config.read_text())
    del run["teacher"]
    with config.open("w") as file:
        yaml.dump(run, file)
    return config


def stillhouse(*arguments: str, timeout_s: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, as a user types it (`warm_command` says how)."""
    ran = None if environment else run_warm(arguments, timeout_s=timeout_s)
    return ran or subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment},
        check=False,
    )


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind of a run's metrics.jsonl."""
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == kind]

"""docs/after-training.md as its reader goes through it: a run, exported by the command of the page, and every block."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from doc_blocks import Block, blocks_of
from tiny_models import tiny_folder
from tiny_runs import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import api

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "after-training.md"
BLOCKS = list(blocks_of(PAGE, PAGE.read_text()))
PYTHON = [block for block in BLOCKS if block.language == "python"]
QUESTION = "How does a sailing boat move against the wind?"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def imports(block: Block, name: str) -> bool:
    return f"\nfrom {name} import" in f"\n{block.text}"


PLAIN = [block for block in PYTHON if not imports(block, "vllm") and not imports(block, "openai")]
ENGINE = [block for block in PYTHON if imports(block, "vllm")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is read: a finished run, its student exported, and its teacher."""
    place = tmp_path_factory.mktemp("after")
    changes = {
        "name": "my-run",
        "folder": str(place / "runs" / "my-run"),
        "runtime": "in_process",
        "student": {"ranks": 1, "zero_stage": 1},
        "training": {"steps": 3},
    }
    config = tiny_run(place / "models", changes)
    for name, seed, layers in (("teacher", 1, 2), ("student", 2, 1)):
        tiny_folder(place / "models" / name, seed=seed, num_hidden_layers=layers, max_position_embeddings=4096)
    api.distil(config, log=lambda line: None)
    exports = [c for b in BLOCKS if not b.not_run for c in b.commands if c.startswith("stillhouse export")]
    assert len(exports) == 2
    for command in exports:
        run([sys.executable, "-m", "launch", *shlex.split(command)[1:]], place)
    return place


def run(command: list[str], place: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_block(block: Block, place: Path, **environment: str) -> str:
    """In a process of its own; what it prints."""
    file = place / f"block_{block.line}.py"
    file.write_text(block.text)
    return run([sys.executable, str(file)], place, PYTHONPATH=str(ROOT), **environment)


def greedy(folder: Path, max_new_tokens: int = 64) -> str:
    """The answer to the page's question, one token after the other: neither `generate` nor an engine."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": QUESTION}]
    ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    start = len(ids)
    stops = model.generation_config.eos_token_id
    with torch.no_grad():
        while len(ids) < start + max_new_tokens:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (stops if isinstance(stops, list) else [stops]):
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_python_of_the_page_runs_and_both_ways_to_ask_agree(place: Path) -> None:
    said = [run_block(block, place) for block in PLAIN]
    answer = greedy(place / "models" / "my-student")
    assert len(said) == 3
    assert said[0].rstrip("\n") == said[1].rstrip("\n") == answer.rstrip("\n")
    assert "3 steps, held-out KL" in said[2]
    assert "forward_kl" in said[2]
    assert "model in bfloat16" in said[2]
    assert (place / "models" / "from-python" / "config.json").exists()


@pytest.mark.stack
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("number", "model"), [(0, "my-student"), (1, "teacher")], ids=["alone", "with a draft"])
def test_an_engine_of_the_page_answers_as_transformers_does(place: Path, number: int, model: str) -> None:
    """With a draft model the text is the teacher's."""
    assert len(ENGINE) == 2
    said = run_block(ENGINE[number], place, **ENVIRONMENT)
    assert greedy(place / "models" / model).strip() in said


@contextmanager
def server(place: Path, port: int) -> Iterator[dict[str, str]]:
    """The commands of the page, on another port; gives the variables they set."""
    (block,) = [b for b in BLOCKS if b.language == "console" and "api_server" in b.text]
    settings, command = block.commands
    assert settings.startswith("export VLLM_API_KEY=")
    names = ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")
    values = run(["bash", "-c", f"{settings}; printenv {' '.join(names)}"], place).split()
    environment = dict(zip(names, values, strict=True))
    words = [sys.executable, *shlex.split(command.replace("8000", str(port)))[1:]]
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(
            words, cwd=place, env={**os.environ, **ENVIRONMENT, **environment}, stdout=log, stderr=log
        )
    try:
        wait_for(port, process, place / "server.log")
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer after {timeout_s:.0f} s: {log.read_text()}")


@pytest.mark.stack
@pytest.mark.timeout(1200)
def test_the_server_of_the_page_answers_as_transformers_does_and_only_with_the_key(place: Path) -> None:
    (client,) = [block for block in PYTHON if imports(block, "openai")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with server(place, port) as environment:
        block = Block(client.page, client.line, "python", client.text.replace("8000", str(port)), False)
        said = run_block(block, place, **environment)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30)
    assert greedy(place / "models" / "my-student").strip() in said
    assert said.rstrip().endswith(("length", "stop"))

"""The benchmarks as a person runs them, on tiny models: the real pipeline and the real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_folder, tiny_tokenizer
from tiny_runs import chat_row, write_rows
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a padded vocabulary, which the plain recipe takes for real tokens."""
    options = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 1024}
    return tiny_folder(tmp_path_factory.mktemp("models") / "teacher", seed=1, **options)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def test_pipeline_and_plain_recipe_learn_the_same_from_the_same_text(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "distil.json"
    size = ("--labels", "hidden", "--steps", "1", "--rounds", "2", "--sequences", "2")
    result = benchmark("distil", "--teacher", str(teacher), *size, "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    numbers = json.loads(out.read_text())
    segments = {(s["side"], s["round"]): s for s in numbers["segments"]}
    assert set(segments) == {(side, n) for side in ("hidden", "plain", "plain tuned") for n in (0, 1)}
    for number in (0, 1):
        loss = {side: segments[side, number]["loss"] for side in ("hidden", "plain", "plain tuned")}
        rounding = 3e-2 if torch.cpu._is_amx_tile_supported() else 1e-3  # bfloat16 there; both are exact
        assert loss["hidden"] == pytest.approx(loss["plain"], rel=rounding)
        assert loss["plain tuned"] == pytest.approx(loss["plain"], rel=rounding / 10)
        sizes = {(segments[side, number]["tokens"], segments[side, number]["loss_tokens"]) for side in loss}
        assert len(sizes) == 1
    for part in ("teacher", "student", "controller"):
        assert numbers["summary"]["hidden"]["parts_cpu_ms_per_token"][part]["median"] > 0
    assert numbers["summary"]["hidden"]["multiple_of_floor"].keys() == {"sum", "teacher", "student"}
    assert numbers["summary"]["plain"]["multiple_of_floor"]["sum"]["median"] > 1
    assert "amx" in " ".join(numbers["reasons"])
    assert "plain tuned" in result.stdout


def test_scoring_is_measured_with_and_without_labels(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "scoring.json"
    options = ("--teacher", str(teacher), "--batch", "4x64", "--rounds", "1", "--out", str(out))
    result = benchmark("scoring", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    ways = {row["way"]: row for row in json.loads(out.read_text())["summary"]}
    assert ways["bare prefill"]["ratio"] == 1.0
    of_dtypes = [pytest.approx(64 * width * 63 / 64) for width in (2, 4)]  # [L - 1, H], bfloat16 where there is AMX
    assert ways["hidden"]["label_bytes_per_token"] in of_dtypes
    kinds = {way.split(",")[0] for way in ways}
    assert {"hidden", "token", "given_ids", "topk", "sampled", "nucleus"} <= kinds
    assert ways["topk, 64"]["least_ratio"] > ways["hidden"]["least_ratio"] == 1.0
    assert all(row["multiple_of_floor"] > 1 for row in ways.values())
    answers, everything = (ways[f"topk, 64{rows}"] for rows in (", answer rows (two thirds)", ""))
    assert answers["label_bytes_per_token"] < 0.7 * everything["label_bytes_per_token"]
    assert all(row["ratio"] > 0 for row in ways.values())


def speculate(teacher: Path, student: Path, prompt: list[int], *, drafts: int, tokens: int) -> tuple[int, list[int]]:
    """Calls of the teacher, and tokens accepted at each place of a draft, by the definition of speculative decoding
    (arXiv 2211.17192) without an engine: both models of transformers, greedily, the whole text anew for each token."""
    models = {folder: AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (teacher, student)}

    def following(folder: Path, ids: list[int]) -> int:
        with torch.no_grad():
            return int(models[folder](torch.tensor([ids])).logits[0, -1].argmax())

    text, calls, accepted = [following(teacher, prompt)], 0, [0] * drafts
    while len(text) < tokens:
        calls += 1
        draft: list[int] = []
        for _ in range(drafts):
            draft.append(following(student, prompt + text + draft))
        for place, token in enumerate(draft):
            wanted = following(teacher, prompt + text)
            text.append(wanted)
            if token != wanted:
                break
            accepted[place] += 1
        else:
            text.append(following(teacher, prompt + text))
    return calls, accepted


def test_accepted_drafts_are_those_of_the_definition(teacher: Path, tmp_path: Path) -> None:
    """A student that is its teacher with a little noise: some of its tokens are accepted, and some are not."""
    noisy, rows, out = tmp_path / "noisy", tmp_path / "rows.jsonl", tmp_path / "draft.json"
    tiny_folder(noisy)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    model.save_pretrained(noisy)
    write_rows(rows, [chat_row(index) for index in range(3)])
    sizes = ("--draft-tokens", "3", "--max-new-tokens", "24", "--prompts", str(rows), "--out", str(out))
    result = benchmark("draft", str(noisy), str(teacher), *sizes)
    assert result.returncode == 0, result.stdout + result.stderr
    sides = json.loads(out.read_text())["sides"]
    assert sides["student"]["same_text"] == 3
    assert sides["teacher alone"]["accepted"] == 0
    assert sides["student"]["tokens"] == sides["teacher alone"]["tokens"] == 72  # none stopped: every call counts
    calls, accepted = 0, [0, 0, 0]
    for index in range(3):
        turns = chat_row(index)["prompt"]
        prompt = tiny_tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        more, found = speculate(teacher, noisy, prompt, drafts=3, tokens=24)
        calls, accepted = calls + more, [a + b for a, b in zip(accepted, found, strict=True)]
    assert (sides["student"]["calls"], sides["student"]["accepted_at"]) == (calls, accepted)
    assert sides["student"]["drafted"] == 3 * calls
    assert 0 < sum(accepted) < 3 * calls
    assert sides["student"]["tokens_per_call"] == pytest.approx(1 + sum(accepted) / calls)
    assert "who drafts" in result.stdout

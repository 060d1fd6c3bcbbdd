"""The benchmarks as a person runs them, on tiny models: the real pipeline and the real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_folder, tiny_tokenizer

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
        assert loss["hidden"] == pytest.approx(loss["plain"], rel=1e-3)  # both are exact
        assert loss["plain tuned"] == pytest.approx(loss["plain"], rel=1e-4)
        sizes = {(segments[side, number]["tokens"], segments[side, number]["loss_tokens"]) for side in loss}
        assert len(sizes) == 1
    for part in ("teacher", "student", "controller"):
        assert numbers["summary"]["hidden"]["parts_cpu_ms_per_token"][part]["median"] > 0
    assert "amx" in " ".join(numbers["reasons"])
    assert "plain tuned" in result.stdout


def test_scoring_is_measured_with_and_without_labels(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "scoring.json"
    options = ("--teacher", str(teacher), "--batch", "4x64", "--rounds", "1", "--out", str(out))
    result = benchmark("scoring", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    ways = {row["way"]: row for row in json.loads(out.read_text())["summary"]}
    assert ways["bare prefill"]["ratio"] == 1.0
    assert ways["hidden, all rows"]["label_bytes_per_token"] == pytest.approx(64 * 4 * 63 / 64)  # float32 [L - 1, H]
    answers, everything = (ways[f"top-64, {rows}"] for rows in ("answer rows (two thirds)", "all rows"))
    assert answers["label_bytes_per_token"] < 0.7 * everything["label_bytes_per_token"]
    assert all(row["ratio"] > 0 for row in ways.values())

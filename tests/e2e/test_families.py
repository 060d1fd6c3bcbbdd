"""What a run reports is what its student is: held-out KL against float64 runs of transformers, family by family.

Teacher and student are of one family, and the rows are longer than its window. All runs share one process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import WINDOW, architecture_folder, long_rope
from tiny_runs import WORDS, records, tiny_run, write_rows
from transformers import AutoModelForCausalLM

from configs.load import load_run
from trainer.loop.inputs import read_inputs
from trainer.loop.rows import held_out_rows

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

FAMILIES = {
    "llama": {},  # its config has a window, its code none
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},  # and a tokenizer class that adds a token
    "qwen2_moe": {},  # a window in the mask alone
    "qwen3": {},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {},
    "gemma4_text": {},
    "phi3": long_rope(128),
    "olmo": {},  # changes the products of its layers in place
    "olmoe": {},
    "granite": {"logits_scaling": 2.0},
    "cohere2": {},
    "nemotron": {},  # drops the arguments that it is given
    "opt": {},  # its head is narrower than its hidden states
    "deepseek_v3": {},  # keys and values of two widths
}

RUNS = """
import sys
from datetime import timedelta
from pathlib import Path
from torch import distributed
from launch.train import train

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(60))
for file in sys.argv[1:]:
    train(Path(file), [])
"""


def _rows(first: int, count: int) -> list[dict[str, object]]:
    """A question of a word and an answer of several windows."""
    texts = [
        " ".join(WORDS[(i * i * 7 + index) % len(WORDS)] for i in range(24)) for index in range(first, first + count)
    ]
    return [{"prompt": "go", "completion": text} for text in texts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps for each family."""
    folder = tmp_path_factory.mktemp("families")
    files = []
    for name, changes in FAMILIES.items():
        for role, seed in (("teacher", 1), ("student", 2)):
            architecture_folder(folder / name / role, name, seed=seed, **changes)
        write_rows(folder / name / "train.jsonl", _rows(0, 12))
        write_rows(folder / name / "held_out.jsonl", _rows(50, 4))
        settings = {
            "runtime": "in_process",
            "student": {"ranks": 1},
            "data": {"max_length": 128},
            "training": {"steps": 3, "sequences_per_step": 4, "save_every": 0},
            "report": {"generate": 0},
        }
        files.append(str(tiny_run(folder / name, settings)))
    done = subprocess.run([sys.executable, "-c", RUNS, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reported_kl_is_that_of_the_exported_student_in_float64(runs: Path, name: str) -> None:
    run = load_run(runs / name / "run.yaml").run
    inputs = read_inputs(run)
    held_out = held_out_rows(run, inputs)
    assert min(row.num_tokens for row in held_out) > 2 * WINDOW
    models = [
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        for folder in (runs / name / "teacher", runs / name / "run" / "student")
    ]
    total, count = 0.0, 0
    for row in held_out:
        ids, mask = torch.from_numpy(row.token_ids).long()[None], torch.from_numpy(row.loss_mask)
        with torch.no_grad():
            logits = (model(input_ids=ids).logits[0, mask, : inputs.vocabulary.size] for model in models)
            t, s = (rows.double().log_softmax(-1) for rows in logits)
        total += float((t.exp() * (t - s)).sum())
        count += int(mask.sum())
    before, after = (record["evaluation/forward_kl"] for record in records(runs / name / "run", "evaluation"))
    assert after == pytest.approx(total / count, rel=2e-4, abs=1e-9)
    assert after != before

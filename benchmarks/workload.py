"""What the benchmarks work on: text of a stated length, a student made on the spot, and the run that joins them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from configs.load import load_run
from configs.models import ModelSource
from configs.paths import ROOT
from configs.rules import teachers_by_place
from configs.schema import Run
from configs.section import MAIN
from trainer.answers.dataset import answers_of_dataset
from trainer.data.vocabulary import load_tokenizer
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.rows import open_stream
from trainer.types import Sequence

TEXT = ROOT / "configs" / "data" / "demo_train.jsonl"
"""Real text, so that labels are those of a teacher that knows what it reads."""

LABELS = {"topk": {"kind": "topk", "k": 64}, "hidden": {"kind": "hidden"}, "given_ids": {"kind": "given_ids", "k": 64}}
LEARNING_RATE = 1e-5


@dataclass(frozen=True, slots=True)
class Workload:
    """Off-policy text: every sequence has `min_tokens` to `max_tokens`, the last two thirds of them in the loss."""

    min_tokens: int = 150
    max_tokens: int = 270
    sequences_per_step: int = 8
    depth: int = 2
    seed: int = 0
    scorer_engine: str = "vllm"
    scorer_dtype: str = "auto"
    student_dtype: str = "auto"


def make_student(teacher: Path, folder: Path, *, seed: int) -> None:
    """Llama, 6 layers of 384 (6 heads, 2 of keys and values, MLP 1024), tied, with the teacher's tokenizer."""
    _make_llama(teacher, folder, seed=seed, layers=6, heads=6, kv_heads=2, width=384, inner=1024)


def small_models(config: Path, overrides: AbstractSequence[str], work: Path) -> list[str]:
    """Settings that put a Llama of one layer of 64 with the same tokenizer in place of every model of a run."""
    run = load_run(config, overrides).run
    teachers = {place: teacher.model for place, teacher in teachers_by_place(run).items()}
    tokens = Path(next(iter(teachers.values()), run.student.model).path)
    _make_llama(tokens, work / "small", seed=0, layers=1, heads=2, kv_heads=1, width=64, inner=128)
    return [f"{place}.model.path={work / 'small'}" for place in (*teachers, "student")]


def _make_llama(
    teacher: Path, folder: Path, *, seed: int, layers: int, heads: int, kv_heads: int, width: int, inner: int
) -> None:
    vocabulary = AutoConfig.from_pretrained(teacher).get_text_config()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(ModelSource(path=str(teacher))).save_pretrained(folder)


def corpus(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it each token stands."""
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    turns = [turn["content"] for row in rows for turn in [*row["prompt"], *(row["completion"] or [])]]
    text = "\n\n".join(turns)
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
    return text, offsets


def write_rows(path: Path, tokenizer: PreTrainedTokenizerBase, workload: Workload, *, count: int) -> None:
    """Windows of the text as prompt (a third) and completion, cut between words: lengths are nearly those asked."""
    text, offsets = corpus(tokenizer)
    spaces = np.array([match.start() for match in re.finditer(r"(?<=\w) (?=\w)", text)])
    draw = np.random.default_rng(workload.seed)
    rows = []
    while len(rows) < count:
        length = int(draw.integers(workload.min_tokens, workload.max_tokens + 1))
        start = int(draw.integers(0, len(offsets) - length))
        asked = [offsets[start + index][0] for index in (0, length // 3, length - 1)]
        edges = spaces[np.minimum(np.searchsorted(spaces, asked), len(spaces) - 1)]
        prompt, completion = (text[a:b] for a, b in pairwise(edges))
        if prompt and completion:
            rows.append(json.dumps({"prompt": prompt.strip(), "completion": completion}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")


def make_run(
    teacher: Path, student: Path, rows: Path, folder: Path, workload: Workload, *, labels: str, steps: int
) -> Run:
    """The configuration of one pipeline: one scorer, one rank, everything else as by default."""
    scorer = {"engine": workload.scorer_engine, "dtype": workload.scorer_dtype}
    settings: dict[str, Any] = {
        "name": f"bench-{labels}",
        "folder": folder,
        "seed": workload.seed,
        "teacher": {"model": {"path": str(teacher)}, "scorer": scorer},
        "student": {"model": {"path": str(student)}, "dtype": workload.student_dtype},
        "prompts": {"path": str(rows)},
        "data": {"max_length": workload.max_tokens + 32, "on_too_long": "truncate"},
        "answers": "dataset",
        "labels": LABELS[labels],
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
        "training": {
            "steps": steps,
            "sequences_per_step": workload.sequences_per_step,
            "depth": workload.depth,
        },
    }
    return Run.model_validate(settings)


def same_sequences(run: Run, inputs: Inputs | None = None) -> list[Sequence]:
    """What the run's stream will give, in its order, for all its steps."""
    stream = open_stream(run, run.resolved_tasks()[MAIN], inputs or read_inputs(run), quarantine=None)
    count = (run.training.steps or 0) * run.training.sequences_per_step
    return [row for prompt in stream.take(count) for row in answers_of_dataset(prompt)]

"""Terms on states of ranks over real DeepSpeed and gloo, against the same steps worked out by hand; and what is refused
before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_cases import OBJECTIVE, WIDE, feature_run
from rank_processes import run_cases
from safetensors.torch import load_file
from student_world import VOCABULARY_SIZE, adamw, make_models, sequences_of
from tiny_models import tiny_folder, tiny_model

from configs.schema import Run
from trainer.errors import ConfigError
from trainer.losses.features import features
from trainer.model.features import FeatureTerm, check_features, make_projectors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make_models(folder)
    tiny_folder(folder / "wide", seed=1, **WIDE)
    return folder


def by_hand(run: Run, rates: list[float]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """In float64 with transformers' own hidden states, one sequence at a time."""
    student, teacher = tiny_model("llama", seed=2).double(), tiny_model("llama", seed=1, **WIDE).double()
    terms = FeatureTerm.all_of(run)
    projectors = make_projectors(terms, dtype=torch.float64, seed=run.seed)
    optimizer = adamw(torch.nn.ModuleList([student, projectors]), run, student.config)
    records = []
    for step, rate in enumerate(rates, start=1):
        sequences = [s for s in sequences_of(step) if s.num_loss_tokens]
        count = sum(s.num_loss_tokens for s in sequences)
        kl, padding, sums = 0.0, 0.0, [0.0] * len(terms)
        for sequence in sequences:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
            rows = np.flatnonzero(sequence.loss_mask)
            own = student(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                told = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
            everything = own.logits[0, rows].softmax(-1)
            inside = everything[:, :VOCABULARY_SIZE].sum(1, keepdim=True)
            p = told.logits[0, rows, :VOCABULARY_SIZE].softmax(-1)
            kl = kl + (p * (p.log() - (everything[:, :VOCABULARY_SIZE] / inside).log())).sum()
            padding = padding - inside.log().sum()
            for index, one in enumerate(terms):
                state = own.hidden_states[one.term.student_layer][0, rows] @ projectors[index].weight.T
                target = told.hidden_states[one.term.teacher_layer][0, rows]
                sums[index] = sums[index] + features(state, target, **one.term.parameters()).sum()
        weighted = sum(one.term.weight * value for one, value in zip(terms, sums, strict=True))
        loss = (kl + padding + weighted) / count
        optimizer.zero_grad()
        loss.backward()
        everyone = [*student.parameters(), *projectors.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(everyone, run.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        names = ["train/features", "train/features_2", "train/features_3"]
        told = {name: value.item() / count for name, value in zip(names, sums, strict=True)}
        told |= {"train/loss": loss.item(), "train/forward_kl": kl.item() / count, "train/grad_norm": float(norm)}
        records.append(told)
    return {name: p.detach() for name, p in student.named_parameters()}, records


@pytest.mark.stack
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stages_micro_batches_and_checkpointing_train_what_is_worked_out_by_hand_and_go_on_bit_for_bit(
    world: Path, num_ranks: int
) -> None:
    found: dict[Any, Any] = run_cases("feature_cases", world=num_ranks, folder=world / f"{num_ranks}")[0]["steps"]
    for key, (once, resumed, (export, again)) in found.items():
        weights, records = by_hand(feature_run(world), [metrics["train/learning_rate"] for metrics in once])
        for ours, theirs in zip(once, records, strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=3e-4), key
        assert resumed == once[2:], "projectors and their optimizer states are in the checkpoint"
        first, second = (load_file(folder / "model.safetensors") for folder in (export, again))
        assert first.keys() == weights.keys(), "no projector is exported"
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name, weight in weights.items():
            torch.testing.assert_close(first[name].double(), weight, rtol=1e-3, atol=2e-5, msg=f"{key} {name}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_layer": 3}, r"objective.0.student_layer: 3, and .*llama has layers 0 to 2: write one of these"),
        ({"teacher_layer": 7}, r"objective.0.teacher_layer: 7, and .*wide has layers 0 to 2: write one of these, in "),
        (
            {"projector": "none"},
            r"objective.0: the student's states have 64 numbers, the teacher's 96: write ",
        ),
    ],
)
def test_layers_that_are_not_there_and_widths_that_differ_are_refused(
    world: Path, changes: dict[str, Any], message: str
) -> None:
    term = {**OBJECTIVE[1], **changes}
    labels = {"kind": "hidden", "layers": [term["teacher_layer"]]}
    run = feature_run(world).model_copy(update={})
    run = Run.model_validate({**run.model_dump(exclude_unset=True), "labels": labels, "objective": [term]})
    with pytest.raises(ConfigError, match=message):
        check_features(run)


def test_projectors_begin_equal_everywhere_and_keep_lengths(world: Path) -> None:
    terms = FeatureTerm.all_of(feature_run(world))
    first, second = (make_projectors(terms, dtype=torch.float32, seed=3) for _ in range(2))
    assert [tuple(p.weight.shape) for p in first] == [(96, 64)] * 3
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.weight, other.weight)
        torch.testing.assert_close(one.weight.T @ one.weight, torch.eye(64), atol=1e-5, rtol=0)
    assert not torch.equal(first[0].weight, first[1].weight)

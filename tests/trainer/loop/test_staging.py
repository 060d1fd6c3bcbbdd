"""What may enter a step: labels of this run, of these tokens, finite; and what the held-out batches look like."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from label_oracle import random_given_ids
from rank_processes import Place
from student_world import (
    HOST,
    VOCABULARY_SIZE,
    Teacher,
    Vocabulary,
    batch_of,
    labels_of,
    make_models,
    make_run,
    sequences_of,
)

from configs.labels import HELD_OUT, Labels, TopK
from trainer.errors import UnitRejected
from trainer.loop.staging import Staging
from trainer.types import RankBatch, SoftLabelBlock, Unit, hash_tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    return folder


@pytest.fixture
def staging(world: Path) -> Staging:
    return Staging(make_run(world), vocabulary=Vocabulary(), device=HOST)


def _batch(world: Path, spec: Labels | None = None) -> tuple[RankBatch, list[SoftLabelBlock]]:
    batch = batch_of(1, Place(0, 1, world), token_budget=48)
    spec = spec or labels_of(make_run(world))
    return batch, [Teacher().label(unit, spec) for unit in batch.units]


def test_a_staged_step_holds_every_row_once_and_is_taken_once(world: Path, staging: Staging) -> None:
    batch, blocks = _batch(world)
    staging.stage(batch, blocks)
    staging.stage(batch, blocks)
    step = staging.take(1)
    sequences = sequences_of(1)
    assert sum(len(micro.loss_rows) for micro in step.micro_batches) == step.num_loss_tokens
    assert step.num_tokens == sum(s.num_tokens for s in sequences)
    rows = torch.cat([part.labels["tail"] for micro in step.micro_batches for part in micro.parts])
    assert sorted(rows.flatten().tolist()) == sorted(np.concatenate([b.columns["tail"].ravel() for b in blocks]))
    assert staging.teacher_head("") is None
    with pytest.raises(KeyError):
        staging.take(1)


@pytest.mark.parametrize("field", ["teacher", "tokenizer_fingerprint"])
def test_labels_of_something_else_are_rejected(world: Path, staging: Staging, field: str) -> None:
    batch, blocks = _batch(world)
    other = dataclasses.replace(blocks[0].header, **{field: "another"})
    with pytest.raises(UnitRejected, match=f"unit {batch.units[0].id}.*another"):
        staging.stage(batch, [dataclasses.replace(block, header=other) for block in blocks])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: dataclasses.replace(b, tokens_hash="0"), "other tokens"),
        (lambda b: dataclasses.replace(b, header=dataclasses.replace(b.header, dtype="float16")), "others of this"),
        (lambda b: dataclasses.replace(b, columns={**b.columns, "tail": b.columns["tail"] * np.nan}), "not finite"),
        (lambda b: dataclasses.replace(b, columns={**b.columns, "tail": b.columns["tail"][1:]}), "rows, asked for"),
    ],
)
def test_a_block_that_is_not_what_was_asked_names_its_unit(world: Path, staging: Staging, change, words: str) -> None:
    batch, blocks = _batch(world)
    assert len(blocks) > 1
    blocks[-1] = change(blocks[-1])
    with pytest.raises(UnitRejected, match=f"unit {batch.units[-1].id}: .*{words}"):
        staging.stage(batch, blocks)


def test_labels_with_other_parameters_than_the_run_asks_for_are_rejected(world: Path, staging: Staging) -> None:
    batch, blocks = _batch(world, TopK(k=4))
    with pytest.raises(UnitRejected, match="this run needs TopK"):
        staging.stage(batch, blocks)


def test_held_out_batches_keep_order_and_bring_the_teachers_head(world: Path) -> None:
    run = make_run(world, training={"micro_batch_tokens": 48})
    staging = Staging(run, vocabulary=Vocabulary(), device=HOST)
    units = [Unit(id=s.id, sequences=(s,)) for s in sequences_of(100)]
    teacher = Teacher()
    staging.stage_held_out(units, [teacher.label(unit, HELD_OUT) for unit in units])
    members = [member for item in staging.held_out for member in item.members]
    assert sorted(position for position, _, _ in members) == list(range(len(units)))
    assert all(units[position] is unit for position, unit, _ in members)
    assert len(staging.held_out) > 1
    assert staging.teacher_head("").weight.shape == (283, 64)


def test_held_out_units_that_nobody_scores_have_batches_of_their_own_without_labels(world: Path) -> None:
    staging = Staging(make_run(world), vocabulary=Vocabulary(), device=HOST)
    first, *others = sequences_of(100)
    alone = Unit("alone", tuple(dataclasses.replace(s, task="sft") for s in others))
    scored = Unit("scored", (first,))
    staging.stage_held_out([alone, scored], [None, Teacher().label(scored, HELD_OUT)])
    labels = {part.task: sorted(part.labels) for item in staging.held_out for part in item.batch.parts}
    assert labels == {"sft": [], "main": ["hidden"]}
    positions = [position for item in staging.held_out for position, _, _ in item.members]
    assert sorted(positions) == list(range(len(others) + 1))


def test_a_rank_without_units_is_staged_too(staging: Staging) -> None:
    staging.stage(RankBatch(step=2, units=(), micro_batches=((), ()), totals={}), [])
    step = staging.take(2)
    assert [len(micro.loss_rows) for micro in step.micro_batches] == [0, 0]
    staging.stage_held_out([], [])
    assert staging.held_out == ()


@pytest.mark.parametrize("parameters", [{}, {"dtype": "auto", "temperature": 1.0}, {"temperature": 2.0}])
def test_hidden_labels_are_trained_on_beside_held_out_ones(world: Path, parameters: dict) -> None:
    """The held-out labels are hidden states too, of another specification."""
    staging = Staging(make_run(world, labels={"kind": "hidden", **parameters}), vocabulary=Vocabulary(), device=HOST)
    batch, blocks = _batch(world, HELD_OUT)
    staging.stage_held_out(batch.units, blocks)
    batch, blocks = _batch(world, labels_of(make_run(world, labels={"kind": "hidden", **parameters})))
    staging.stage(batch, blocks)
    staging.stage_held_out(batch.units, [Teacher().label(unit, HELD_OUT) for unit in batch.units])
    assert staging.take(1).num_tokens
    assert staging.teacher_head("") is not None


def test_labels_of_other_ids_than_this_rank_chose_are_rejected_and_name_the_row(world: Path) -> None:
    run = make_run(world, labels={"kind": "given_ids", "k": 4})
    batch = batch_of(1, Place(0, 1, world), token_budget=48)
    given = {unit.id: random_given_ids(unit, 5) for unit in batch.units}
    blocks = [Teacher().label(unit, run.labels, given[unit.id]) for unit in batch.units]
    staging = Staging(run, vocabulary=Vocabulary(), device=HOST)
    with pytest.raises(UnitRejected, match=f"unit {batch.units[0].id}: .*this rank has chosen none"):
        staging.stage(batch, blocks)
    chosen = {}
    for unit in batch.units:
        rows = iter(given[unit.id].of_sequences(unit))
        for sequence in unit.sequences:
            chosen[hash_tokens([sequence])] = next(rows) if sequence.num_loss_tokens else given[unit.id].ids[:0]
    staging.chosen.keep(1, chosen)
    staging.stage(batch, blocks)
    assert len(staging.take(1).micro_batches) == len(batch.micro_batches)
    other = blocks[0].columns["ids"].copy()
    other[2, 3] = (other[2, 3] + 1) % VOCABULARY_SIZE
    blocks[0] = dataclasses.replace(blocks[0], columns={**blocks[0].columns, "ids": other})
    with pytest.raises(
        UnitRejected, match=f"unit {batch.units[0].id}: .*other ids than were asked for, first in row 2"
    ):
        staging.stage(batch, blocks)

"""A scorer behind the label store: its blocks have the bytes of those that an engine makes, however units are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_oracle import random_unit
from tiny_models import tiny_folder
from vllm_process import engine_plan

from cluster.engines import store as engine_of_store
from cluster.engines.hf import Engine
from cluster.engines.plan import EnginePlan, StorePlan
from cluster.engines.store import StoredScorer, space_of
from cluster.model_files import model_contents
from cluster.teachers.actor import start_engine
from configs.labels import Dense, GivenIds, Hidden, Labels, Token, TopK
from trainer.errors import ConfigError, UnitRejected
from trainer.labels.store import LabelStore
from trainer.labels.store_shard import open_shard
from trainer.types import RowIds, SoftLabelBlock, Unit, UnitReport

UNIT = random_unit("0:0", (60, [(5, 20), (31, 59)]), (90, [(60, 80)]), (12, []), (33, [(0, 32)]))
ENCODINGS = [TopK(k=8), Dense(), Hidden(), Token()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("teacher") / "llama")


@dataclass
class Counting:
    """An engine, and the sequences that it was asked about."""

    engine: Any
    asked: list[str] = field(default_factory=list)
    non_finite: int = 0

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: object = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        self.asked += [sequence.id for sequence in unit.sequences]
        report, block = await self.engine.score(unit, encoding, deadline_s=deadline_s, given=given)
        return replace(report, num_non_finite=self.non_finite), block

    def close(self) -> None:
        self.engine.close()


def plan_of(teacher: Path, store: Path | None, *, writes: bool = True, **told: Any) -> EnginePlan:
    kept = None if store is None else StorePlan(str(store), 10**9, writes, {"files": {"w": "1"}} | told)
    return engine_plan(Engine(), teacher, store=kept)


class Started:
    """A scorer that starts and stops with each use, over an engine that is started once."""

    def __init__(self, teacher: Path) -> None:
        self.teacher = teacher
        self.hf = Engine().start_scorer(plan_of(teacher, None), "hf-0")

    def score(
        self, unit: Unit, labels: Labels, store: Path | None, engine: Counting | None = None, **plan: Any
    ) -> tuple[UnitReport, SoftLabelBlock]:
        if store is None:
            return asyncio.run(self.hf.score(unit, labels, deadline_s=60))
        scorer = StoredScorer(plan_of(self.teacher, store, **plan), "stored-0", engine=engine)
        try:
            return asyncio.run(scorer.score(unit, labels, deadline_s=60))
        finally:
            scorer.close_store()  # the engine is used again


@pytest.fixture(scope="module")
def started(teacher: Path) -> Iterator[Started]:
    made = Started(teacher)
    yield made
    made.hf.close()


def same_block(one: SoftLabelBlock, other: SoftLabelBlock) -> bool:
    return (
        one.header == other.header
        and one.tokens_hash == other.tokens_hash
        and np.array_equal(one.row_offsets, other.row_offsets)
        and one.row_offsets.dtype == other.row_offsets.dtype
        and list(one.columns) == list(other.columns)
        and all(
            column.dtype == other.columns[name].dtype
            and column.shape == other.columns[name].shape
            and column.tobytes() == other.columns[name].tobytes()
            for name, column in one.columns.items()
        )
    )


@pytest.mark.parametrize("labels", ENCODINGS, ids=lambda labels: labels.kind)
def test_blocks_have_the_bytes_of_the_engine_whether_nothing_some_or_all_is_there(
    started: Started, tmp_path: Path, labels: Labels
) -> None:
    _, wanted = started.score(UNIT, labels, None)
    engine = Counting(started.hf)
    first = replace(UNIT, id="1:0", sequences=UNIT.sequences[1:3])
    cold, block = started.score(first, labels, tmp_path, engine)
    assert same_block(block, started.score(first, labels, None)[1])
    assert (cold.store.hits, cold.store.misses, cold.store.num_bytes) == (0, 1, 0)
    some, block = started.score(UNIT, labels, tmp_path, engine)
    assert same_block(block, wanted)
    assert (some.store.hits, some.store.misses) == (1, 2)
    assert some.num_bytes > some.store.num_bytes > 0
    warm, block = started.score(UNIT, labels, tmp_path, engine)
    assert same_block(block, wanted)
    assert (warm.store.hits, warm.store.misses, warm.store.num_bytes) == (3, 0, warm.num_bytes)
    assert (warm.num_rows, warm.num_non_finite, warm.score_s) == (UNIT.num_rows, 0, 0.0)
    assert sorted(name for name in engine.asked if name != "0:0/2") == ["0:0/0", "0:0/1", "0:0/3"]


def test_units_are_cut_anew_and_their_blocks_follow(started: Started, tmp_path: Path) -> None:
    started.score(UNIT, TopK(k=8), tmp_path, Counting(started.hf))
    backwards = replace(UNIT, id="other", sequences=UNIT.sequences[::-1] + UNIT.sequences[:1])
    report, block = started.score(backwards, TopK(k=8), tmp_path, None)
    assert same_block(block, started.score(backwards, TopK(k=8), None)[1])
    assert (report.store.hits, report.store.misses) == (4, 0)


def test_a_sequence_that_is_there_twice_is_scored_once(started: Started, tmp_path: Path) -> None:
    twice = replace(UNIT, sequences=UNIT.sequences[:1] * 2)
    engine = Counting(started.hf)
    report, block = started.score(twice, TopK(k=8), tmp_path, engine)
    assert same_block(block, started.score(twice, TopK(k=8), None)[1])
    assert (report.store.misses, engine.asked) == (2, ["0:0/0"])


def test_labels_of_another_teacher_are_not_taken(started: Started, tmp_path: Path) -> None:
    started.score(UNIT, TopK(k=8), tmp_path, Counting(started.hf))
    for changed in ({"files": {"w": "2"}}, {"dtype": "bfloat16"}):
        engine = Counting(started.hf)
        started.score(UNIT, TopK(k=8), tmp_path, engine, **changed)
        assert len(engine.asked) == 3


def test_labels_that_are_not_finite_are_not_kept(started: Started, tmp_path: Path) -> None:
    started.score(UNIT, TopK(k=8), tmp_path, Counting(started.hf, non_finite=1))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_self_test_is_of_the_engine(started: Started, tmp_path: Path) -> None:
    started.score(UNIT, TopK(k=8), tmp_path, Counting(started.hf))
    engine = Counting(started.hf)
    report, _ = started.score(replace(UNIT, is_test=True), TopK(k=8), tmp_path, engine)
    assert (report.store, len(engine.asked)) == (None, 4)


def test_labels_on_ids_that_a_student_chose_are_not_kept(started: Started, tmp_path: Path) -> None:
    labels = GivenIds(k=2, add_target=False)
    ids = np.tile(np.array([[3, 5]], dtype=np.int32), (UNIT.num_rows, 1))
    engine = Counting(started.hf)
    scorer = StoredScorer(plan_of(started.teacher, tmp_path), "stored-0", engine=engine)
    given = RowIds(UNIT.tokens_hash(), ids)
    report, _ = asyncio.run(scorer.score(UNIT, labels, deadline_s=60, given=given))
    assert (report.store, len(engine.asked), list(tmp_path.iterdir())) == (None, 4, [])


def test_a_store_that_is_only_read_stays_as_it_is(started: Started, tmp_path: Path) -> None:
    report, _ = started.score(UNIT, TopK(k=8), tmp_path, Counting(started.hf), writes=False)
    assert (report.store.misses, list(tmp_path.iterdir())) == (3, [])


def test_a_damaged_shard_is_told_and_its_sequences_are_scored_again(started: Started, tmp_path: Path) -> None:
    started.score(UNIT, Dense(), tmp_path, Counting(started.hf))
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[open_shard(file).columns[0][1].start] ^= 4
    file.write_bytes(content)
    engine = Counting(started.hf)
    report, block = started.score(UNIT, Dense(), tmp_path, engine)
    assert same_block(block, started.score(UNIT, Dense(), None)[1])
    assert len(engine.asked) > 0
    (note,) = report.notes
    assert "labels in it do not match their checksum: its labels count as missing" in note
    again, block = started.score(UNIT, Dense(), tmp_path, None)
    assert (again.store.hits, again.notes) == (3, ())
    assert same_block(block, started.score(UNIT, Dense(), None)[1])


def test_without_a_teacher_missing_labels_say_what_to_run(started: Started, tmp_path: Path) -> None:
    started.score(replace(UNIT, sequences=UNIT.sequences[:1]), TopK(k=8), tmp_path, Counting(started.hf))
    with pytest.raises(UnitRejected, match=r"no labels for 2 of its sequences, .* run stillhouse label"):
        started.score(UNIT, TopK(k=8), tmp_path, None)


def test_every_engine_is_started_behind_the_store_of_its_plan(teacher: Path, tmp_path: Path) -> None:
    plan = plan_of(teacher, tmp_path)
    scorer = start_engine(plan, "hf-0")
    assert isinstance(scorer, StoredScorer)
    asyncio.run(scorer.score(UNIT, TopK(k=8), deadline_s=60))
    scorer.close()
    space = space_of(plan, TopK(k=8), hidden_size=scorer._hidden_size)
    assert [one.id for one in LabelStore(tmp_path, limits=None).spaces()] == [space.id]
    without = start_engine(replace(plan, engine=engine_of_store.Engine()), "stored-0")
    report, _ = asyncio.run(without.score(UNIT, TopK(k=8), deadline_s=60))
    without.close()
    assert (report.replica, report.store.hits) == ("stored-0", 3)


def test_the_files_of_a_teacher_tell_its_weights_and_nothing_of_its_name(teacher: Path, tmp_path: Path) -> None:
    before = model_contents(str(teacher), None, place="teacher.model")
    assert set(before) == {"config.json", "model.safetensors"}
    moved = tiny_folder(tmp_path / "moved")
    assert model_contents(str(moved), None, place="teacher.model") == before
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1
    weights.write_bytes(content)
    assert model_contents(str(moved), None, place="teacher.model") != before
    with pytest.raises(ConfigError, match="must know which weights"):
        model_contents("nobody/nothing", "main", place="teacher.model")
    assert model_contents("nobody/nothing", "a" * 40, place="teacher.model") == {"commit": "a" * 40}

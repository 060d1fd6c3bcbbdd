"""Several teachers on the same tokens, from units to packed rows: whose label is beside which row, who was picked, and
what happens when one of them is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rank_processes import Place
from student_world import HOST, Teacher, Vocabulary, batch_of, make_models, make_run, sequences_of
from tiny_models import tiny_folder, tiny_model

from configs.labels import HELD_OUT, Dense, GivenIds, Hidden, Labels, TopK
from configs.schema import Run
from configs.section import MAIN
from configs.tasks import Ensemble
from trainer.errors import InfrastructureError, LabelsLost, TeachersLost, UnitRejected
from trainer.labels.encoding import Column
from trainer.loop.packing import pack
from trainer.loop.scoring import UnitScorers, score_and_stage
from trainer.loop.staging import Staging
from trainer.loop.together import judged_of, packable, sequence_weights, weight_shares
from trainer.protocols import TeacherPools
from trainer.types import LabelHeader, RankBatch, Sequence, SoftLabelBlock, TaskTotals, Unit, UnitReport

NAMES = ("big", "code", "old")
LAYOUT = (Column("x", torch.float32, 1),)


def of_ensemble(sequences: AbstractSequence[Sequence], names: AbstractSequence[str] = NAMES) -> tuple[Sequence, ...]:
    return tuple(replace(sequence, teacher="+".join(names)) for sequence in sequences)


def mark(teacher: str, sequence: Sequence, row: int) -> float:
    """A number that no other row of another teacher or sequence has."""
    return NAMES.index(teacher) * 10_000 + int(sequence.id.split(":")[1]) * 100 + row


def block_of(unit: Unit) -> SoftLabelBlock:
    """Its label of each row is the row's mark."""
    header = LabelHeader(unit.kind[1], "1", TopK(k=1), "tiny", 283, 64, "float32")
    marks = [mark(unit.kind[1], s, row) for s in unit.sequences for row in range(s.num_loss_tokens)]
    offsets = np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)])
    return SoftLabelBlock(header, unit.tokens_hash(), {"x": np.array(marks, np.float32)[:, None]}, offsets)


def packed_of(units: AbstractSequence[Unit], ensemble: Ensemble, pick=None):
    asked = [one for unit in units for one in unit.asked()]
    ready = packable(
        units,
        {one.id: block_of(one) for one in asked},
        {one.kind: LAYOUT for one in asked},
        ensembles={MAIN: ensemble},
        pick=pick,
    )
    places = [(u, s) for u, unit in enumerate(units) for s in range(len(unit.sequences))]
    micro_batches = (places[::2], places[1::2])
    return [pack(ready.units, ready.moved(places), ready.blocks, layouts=ready.layouts) for places in micro_batches]


UNITS = [Unit(f"u{i}", of_ensemble(sequences_of(i + 10 * i)[1:])) for i in range(1, 3)]


def test_every_row_of_a_batch_has_the_label_that_each_teacher_gave_to_it() -> None:
    ensemble = Ensemble(teachers=NAMES, weights={"big": 1, "code": 2, "old": 1})
    by_tokens = {s.token_ids.tobytes(): s for unit in UNITS for s in unit.sequences}
    rows = 0
    for batch in packed_of(UNITS, ensemble):
        (part,) = batch.parts
        start = 0
        for first, last in zip(batch.sequence_offsets, batch.sequence_offsets[1:], strict=False):
            sequence = by_tokens[batch.token_ids[0, first:last].numpy().astype(np.int32).tobytes()]
            for row in range(sequence.num_loss_tokens):
                found = {name: float(part.labels[f"{name}/x"][start + row]) for name in NAMES}
                assert found == {name: mark(name, sequence, row) for name in NAMES}
            start += sequence.num_loss_tokens
        assert start == part.rows.stop
        assert part.labels["code/weight"].unique().tolist() == [0.5]
        rows += start
    assert rows == sum(unit.num_rows for unit in UNITS)


def test_a_picked_teachers_labels_are_beside_its_sequences_and_nobody_elses() -> None:
    ensemble = Ensemble(teachers=NAMES, how="min_ce")

    def pick(scored):
        return np.array([(i + len(scored[0][0].id)) % 3 for i in range(len(scored[0][0].sequences))])

    rows = 0
    for batch in packed_of(UNITS, ensemble, pick):
        assert len(batch.parts) > 1
        for part in batch.parts:
            sequences = part.labels["x"][:, 0] // 100 % 100
            assert sorted(part.labels) == ["x"]
            assert set((part.labels["x"][:, 0] // 10_000).tolist()) == {NAMES.index(part.teacher)}
            picked = [(int(s) - 1 + len("u1@big")) % 3 for s in sequences]
            assert set(picked) == {NAMES.index(part.teacher)}
            rows += part.rows.stop - part.rows.start
    assert rows == sum(unit.num_rows for unit in UNITS)


def test_weights_are_of_the_row_or_the_configuration_and_sum_to_one_over_the_teachers_that_are_there() -> None:
    rows = sequences_of(1)[:2]
    own = [rows[0], replace(rows[1], teacher_weights={"big": 3.0, "code": 1.0, "old": 0.0})]
    ensemble = Ensemble(teachers=NAMES, weights={"big": 1, "code": 2, "old": 5})
    assert sequence_weights(own, ensemble, NAMES).tolist() == [[0.125, 0.25, 0.625], [0.75, 0.25, 0.0]]
    assert sequence_weights(own, ensemble, NAMES[:2])[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="sequence 1:1 has no weight for any of old"):
        sequence_weights(own, ensemble, ["old"])


def test_the_mean_weight_of_each_teacher_is_over_all_loss_tokens_that_it_could_have_had() -> None:
    ensemble = Ensemble(teachers=NAMES, weights={"big": 1, "code": 2, "old": 1})
    judged = judged_of(packed_of(UNITS, ensemble), {MAIN: ensemble})
    rows = sum(unit.num_rows for unit in UNITS)
    assert {key: one.rows for key, one in judged.items()} == {(MAIN, name): rows for name in NAMES}
    shares = weight_shares(judged, {MAIN: rows})
    assert shares == {"teacher/big/weight": 0.25, "teacher/code/weight": 0.5, "teacher/old/weight": 0.25}
    lost = judged_of(packed_of([Unit("u", of_ensemble(UNITS[0].sequences, ["code"]))], ensemble), {MAIN: ensemble})
    assert weight_shares(lost, {MAIN: UNITS[0].num_rows})["teacher/big/weight"] == 0
    assert weight_shares(lost, {MAIN: UNITS[0].num_rows})["teacher/code/weight"] == 1


# --- on a rank, with real teachers ------------------------------------------------------------------------------------


SEEDS = {"big": 1, "code": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    tiny_folder(folder / "code", seed=4)
    return folder


def run_of(world: Path, labels: Labels, *, how: str, **changes: object) -> Run:
    teachers = {name: {"model": {"path": str(world / path)}} for name, path in (("big", "teacher"), ("code", "code"))}
    together = {"teachers": ["big", "code"], "how": how}
    given = {"teacher": None, "teachers": teachers, "ensemble": together, "labels": labels.model_dump()}
    return make_run(world, **given, **changes)


def scored_of(unit: Unit, labels: Labels) -> list[SoftLabelBlock]:
    return [Teacher(one.kind[1], seed=SEEDS[one.kind[1]]).label(one, labels) for one in unit.asked()]


def batch_of_both(world: Path) -> RankBatch:
    batch = batch_of(1, Place(0, 1, world), token_budget=96)
    units = tuple(Unit(unit.id, of_ensemble(unit.sequences, ["big", "code"])) for unit in batch.units)
    return replace(batch, units=units)


def cross_entropies(sequence: Sequence, *, temperature: float) -> dict[str, float]:
    """Of each teacher, float64, by transformers' own logits."""
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
    found = {}
    for name, seed in SEEDS.items():
        with torch.no_grad():
            logits = tiny_model("llama", seed=seed)(input_ids=ids[None]).logits[0, rows, :283].double()
        found[name] = -float((logits / temperature).log_softmax(1).gather(1, ids[rows + 1, None]).sum())
    return found


@pytest.mark.parametrize("labels", [TopK(k=8), Hidden(temperature=2.0), Dense()], ids=lambda one: one.kind)
def test_each_sequence_goes_to_the_teacher_with_the_lowest_cross_entropy_on_its_targets(
    world: Path, labels: Labels
) -> None:
    staging = Staging(run_of(world, labels, how="min_ce"), vocabulary=Vocabulary(), device=HOST)
    batch = batch_of_both(world)
    staging.stage(batch, [block for unit in batch.units for block in scored_of(unit, labels)])
    found: dict[int, str] = {}
    for micro in staging.take(1).micro_batches:
        for part in micro.parts:
            for sequence in part.row_sequences.unique().tolist():
                target_ids = micro.target_ids[part.rows][part.row_sequences == sequence]
                found[int(target_ids.sum())] = part.teacher
    expected = {}
    for sequence in (s for unit in batch.units for s in unit.sequences if s.num_loss_tokens):
        ces = cross_entropies(sequence, temperature=labels.temperature)
        expected[int(sequence.token_ids[1:][sequence.loss_mask[:-1]].sum())] = min(ces, key=ces.get)
    assert found == expected
    assert set(expected.values()) == {"big", "code"}, "the text tells them apart"


def test_held_out_rows_have_the_states_and_weights_of_all_teachers_also_where_one_is_picked(world: Path) -> None:
    run = run_of(world, TopK(k=8), how="min_ce", data={"max_length": 40, "evaluation": {"path": "seen.jsonl"}})
    staging = Staging(run, vocabulary=Vocabulary(), device=HOST)
    units = [Unit(s.id, of_ensemble([s], ["big", "code"])) for s in sequences_of(100) if s.num_loss_tokens]
    staging.stage_held_out(units, [block for unit in units for block in scored_of(unit, HELD_OUT)])
    for item in staging.held_out:
        (part,) = item.batch.parts
        assert sorted(part.labels) == ["big/hidden", "big/weight", "code/hidden", "code/weight"]
        for sequence, (_, unit, inside) in enumerate(item.members):
            ces = cross_entropies(unit.sequences[inside], temperature=1.0)
            picked = part.labels["big/weight"][part.row_sequences == sequence]
            assert picked.unique().tolist() == [float(ces["big"] < ces["code"])]
    assert staging.teacher_head("big") is not None


def test_labels_of_the_other_teacher_are_rejected(world: Path) -> None:
    staging = Staging(run_of(world, TopK(k=8), how="per_teacher"), vocabulary=Vocabulary(), device=HOST)
    batch = batch_of_both(world)
    blocks = [block for unit in batch.units for block in scored_of(unit, TopK(k=8))]
    blocks[0], blocks[1] = blocks[1], blocks[0]
    with pytest.raises(UnitRejected, match="@big: its labels are"):
        staging.stage(batch, blocks)


# --- a lost teacher ---------------------------------------------------------------------------------------------------


class Scorer:
    def __init__(self, *, lost: bool = False) -> None:
        self.lost = lost
        self.forgets = 0  # requests that find the labels of the first one gone
        self.asked: list[str] = []

    async def score(self, unit: Unit, encoding: Labels, given: tuple[str, ...] | None = None):
        self.asked.append(unit.id)
        await asyncio.sleep(0)
        if self.lost:
            raise TeachersLost("no scorer of it is left")
        if given and self.forgets:
            self.forgets -= 1
            raise LabelsLost([unit.id])
        report = UnitReport(unit.id, unit.tokens_hash(), "x", 1, 1, 1, 0, 1.0, 2.0, 0.0)
        return report, f"{encoding.kind} of {unit.id}" + (f" on {given}" if given else "")


def scorers_of(ensemble: Ensemble, *lost: str, join: bool = False) -> tuple[UnitScorers, dict[str, Scorer], list[str]]:
    pools = {name: Scorer(lost=name in lost) for name in ensemble.teachers}
    notes: list[str] = []
    teachers = {name: TeacherPools(pool, None) for name, pool in pools.items()}
    joined = {MAIN: GivenIds(ids="teachers")} if join else {}
    return UnitScorers(teachers, {MAIN: TopK()}, {MAIN: ensemble}, joined, note=notes.append), pools, notes


def scored_by(scorers: UnitScorers, units: AbstractSequence[Unit]) -> dict[str, object]:
    asked = [one for unit in units for one in scorers.asked(unit)]

    async def all_at_once() -> list[object]:
        return await asyncio.gather(*(scorers.score(one) for one in asked))

    return dict(zip([one.id for one in asked], asyncio.run(all_at_once()), strict=True))


def batch_with(units: AbstractSequence[Unit]) -> RankBatch:
    return RankBatch(1, tuple(units), ((),), {MAIN: TaskTotals(1, 1)})


def test_each_teacher_is_asked_about_the_same_tokens_under_an_id_of_its_own() -> None:
    scorers, pools, _ = scorers_of(Ensemble(teachers=NAMES))
    scored = scored_by(scorers, UNITS)
    assert {name: pool.asked for name, pool in pools.items()} == {n: [f"u1@{n}", f"u2@{n}"] for n in NAMES}
    assert {one.tokens_hash() for one in UNITS[0].asked()} == {UNITS[0].tokens_hash()}
    assert scorers.left(batch_with(UNITS), scored).units == tuple(UNITS)


def test_a_lost_teacher_ends_the_run_unless_it_may_go_on_without() -> None:
    scorers, _, _ = scorers_of(Ensemble(teachers=NAMES), "old")
    with pytest.raises(TeachersLost, match="no scorer of it is left"):
        scored_by(scorers, UNITS)


def test_the_rest_goes_on_is_named_by_the_units_and_told_once() -> None:
    scorers, _, notes = scorers_of(Ensemble(teachers=NAMES, on_lost="continue"), "big")
    left = scorers.left(batch_with(UNITS), scored_by(scorers, UNITS))
    assert [unit.kind for unit in left.units] == [(MAIN, "code+old")] * 2
    assert [one.id for unit in left.units for one in unit.asked()] == ["u1@code", "u1@old", "u2@code", "u2@old"]
    assert len(notes) == 1
    assert "teacher big is lost for good" in notes[0]


def test_the_last_one_of_an_ensemble_is_asked_for_under_the_id_it_was_scored_by() -> None:
    scorers, _, _ = scorers_of(Ensemble(teachers=NAMES, on_lost="continue"), "big", "old")
    left = scorers.left(batch_with(UNITS), scored_by(scorers, UNITS))
    assert [(unit.id, unit.kind[1]) for unit in left.units] == [("u1@code", "code"), ("u2@code", "code")]


def test_a_run_ends_where_every_teacher_is_lost_or_none_with_a_weight_is_left() -> None:
    scorers, _, _ = scorers_of(Ensemble(teachers=NAMES, on_lost="continue"), *NAMES)
    with pytest.raises(TeachersLost, match=r"every teacher of the ensemble is lost \(big, code, old\)"):
        scorers.left(batch_with(UNITS), scored_by(scorers, UNITS))
    scorers, _, _ = scorers_of(Ensemble(teachers=NAMES, on_lost="continue", weights_column="w"), "big")
    own = {"big": 1.0, "code": 0.0, "old": 0.0}
    weighted = [replace(u, sequences=tuple(replace(s, teacher_weights=own) for s in u.sequences)) for u in UNITS]
    with pytest.raises(TeachersLost, match="has no weight for any of code, old: the rest of the ensemble is lost"):
        scorers.left(batch_with(weighted), scored_by(scorers, weighted))


def test_teachers_whose_ids_are_joined_are_asked_for_theirs_once_and_then_on_those_of_all() -> None:
    scorers, pools, _ = scorers_of(Ensemble(teachers=NAMES), join=True)
    scored = scored_by(scorers, UNITS[:1])
    assert all(pool.asked == [f"u1@{name}"] * 2 for name, pool in pools.items())
    first = tuple(f"topk of u1@{name}" for name in NAMES)
    assert {key: one[1] for key, one in scored.items()} == {f"u1@{n}": f"given_ids of u1@{n} on {first}" for n in NAMES}
    assert {one[0].score_s for one in scored.values()} == {4.0}, "both requests are counted"


def test_a_lost_teacher_s_ids_are_not_joined() -> None:
    scorers, _, _ = scorers_of(Ensemble(teachers=NAMES, on_lost="continue"), "code", join=True)
    scored = scored_by(scorers, UNITS[:1])
    first = ("topk of u1@big", "topk of u1@old")
    assert [one and one[1] for one in scored.values()] == [
        f"given_ids of u1@big on {first}", None, f"given_ids of u1@old on {first}",
    ]  # fmt: skip


def staged(scorers: UnitScorers, *, lose: AbstractSequence[str] = ()) -> dict[str, object]:
    """What is scored when the ranks have it, after they have lost the labels of `lose` once."""
    scored: dict[str, object] = {}
    to_lose = list(lose)

    async def stage() -> None:
        if to_lose:
            raise LabelsLost([to_lose.pop()])

    asked = [one for unit in UNITS for one in scorers.asked(unit)]
    events = SimpleNamespace(event=lambda *args, **fields: None)
    run = score_and_stage("x", asked, scored, score=scorers.score, stage=stage, attempts=3, observer=events)
    asyncio.run(run)
    return scored


def test_labels_of_the_first_request_that_are_lost_are_asked_for_again_but_not_for_ever() -> None:
    scorers, pools, _ = scorers_of(Ensemble(teachers=NAMES), join=True)
    pools["code"].forgets = 1
    assert None not in staged(scorers).values()
    pools["code"].forgets = 9
    with pytest.raises(InfrastructureError, match="lost 3 times in a row"):
        staged(scorers)


def test_where_one_teachers_labels_are_lost_all_are_asked_again_about_that_unit_and_no_other() -> None:
    scorers, pools, _ = scorers_of(Ensemble(teachers=NAMES), join=True)
    assert list(staged(scorers, lose=["u1@code"])).count("u1@code") == 1
    for name, pool in pools.items():
        assert (pool.asked.count(f"u1@{name}"), pool.asked.count(f"u2@{name}")) == (4, 2), "two requests each time"

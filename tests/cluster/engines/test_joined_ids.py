"""A mixture of topk labels from the engines to the rank's pair: two teachers of transformers, both requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from label_oracle import VOCABULARY, oracle_of, random_unit
from tiny_models import tiny_folder
from vllm_process import engine_plan

from cluster.engines.hf import Engine
from cluster.in_process import InProcessTeacher
from configs.labels import GivenIds, TopK
from configs.section import MAIN
from configs.tasks import Ensemble
from trainer.errors import UnitRejected
from trainer.labels.encoding import load_encoding
from trainer.loop.packing import layout_of, pack
from trainer.loop.scoring import UnitScorers
from trainer.loop.together import packable
from trainer.losses.ensemble import Together
from trainer.protocols import TeacherPools
from trainer.types import PairedLogProbs, SoftLabelBlock, Unit

K = 8
JOINED = GivenIds(k=2 * K, ids="teachers", add_target=False)
SHARES = {"big": 3, "code": 1}
ENSEMBLE = Ensemble(teachers=tuple(SHARES), weights=SHARES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: tiny_folder(folder / name, seed=seed) for name, seed in (("big", 1), ("code", 3))}


def asked_of_both() -> Unit:
    unit = random_unit("0:0", (60, [(5, 20), (31, 59)]), (33, [(0, 32)]))
    return replace(unit, sequences=tuple(replace(s, teacher=ENSEMBLE.asked) for s in unit.sequences))


def scored_by(folders: dict[str, Path], unit: Unit) -> dict[str, SoftLabelBlock]:
    silent = SimpleNamespace(span=lambda *args: None, event=lambda *args, **fields: None)
    teachers = {
        name: InProcessTeacher(replace(engine_plan(Engine(), path), teacher=name), deadline_s=60, observer=silent)
        for name, path in folders.items()
    }
    for teacher in teachers.values():
        teacher.start()
    pools = {name: TeacherPools(teacher, None) for name, teacher in teachers.items()}
    scorers = UnitScorers(pools, {MAIN: TopK(k=K)}, {MAIN: ENSEMBLE}, {MAIN: JOINED})

    async def all_at_once() -> list[tuple[object, SoftLabelBlock]]:
        return await asyncio.gather(*(scorers.score(one) for one in scorers.asked(unit)))

    found = asyncio.run(all_at_once())
    for teacher in teachers.values():
        teacher.close()
    return {one.id: block for one, (_, block) in zip(unit.asked(), found, strict=True)}


def pair_of(unit: Unit, blocks: dict[str, SoftLabelBlock]) -> tuple[PairedLogProbs, torch.Tensor]:
    """The pair of a rank, and which of its events but the tail are ids."""
    encoding = load_encoding(JOINED)
    layouts = {one.kind: layout_of(encoding, blocks[one.id]) for one in unit.asked()}
    ready = packable([unit], blocks, layouts, ensembles={MAIN: ENSEMBLE}, pick=lambda scored: np.zeros(0))
    places = ready.moved([(0, index) for index in range(len(unit.sequences))])
    (part,) = pack(ready.units, places, ready.blocks, layouts=ready.layouts).parts
    logits = torch.zeros(unit.num_rows, VOCABULARY)
    pair = Together(encoding, tuple(SHARES), "probability_mean").align(logits, part.labels)
    given = pair.ids != pair.ids[:, :1]
    given[:, 0] = True
    return pair, given


def test_the_mixture_is_that_of_transformers_on_every_id_that_a_teacher_keeps(folders: dict[str, Path]) -> None:
    unit = asked_of_both()
    pair, given = pair_of(unit, scored_by(folders, unit))
    assert given.sum(1).double().mean() > 1.5 * K, "the teachers keep unlike ids"
    truth = [torch.from_numpy(oracle_of(path, unit)[0]).double().softmax(1) for path in folders.values()]

    def error(weights: tuple[float, float]) -> float:
        mixed = weights[0] * truth[0] + weights[1] * truth[1]
        kept = mixed.gather(1, pair.ids) * given
        tail = (1 - kept.sum(1)).log() - pair.teacher[:, -1]
        return float(
            torch.cat([((kept.log() - pair.teacher[:, :-1]) * given).nan_to_num(0, 0, 0), tail[:, None]], 1).abs().max()
        )

    assert error((0.75, 0.25)) < 0.005, "float16 log-probabilities"
    assert error((0.25, 0.75)) > 0.1, "negative control: swapped weights"


def test_labels_of_other_ids_than_another_teachers_are_refused(folders: dict[str, Path]) -> None:
    unit = asked_of_both()
    blocks = scored_by(folders, unit)
    first = unit.asked()[0].id
    ids = blocks[first].columns["ids"].copy()
    ids[0, :2] = ids[0, 1::-1]
    blocks[first] = replace(blocks[first], columns={**blocks[first].columns, "ids": ids})
    with pytest.raises(UnitRejected, match="its labels are of other ids than those of another teacher"):
        pair_of(unit, blocks)

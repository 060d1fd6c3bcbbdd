"""Several teachers with tokenizers of their own on the same rows of the student: mixtures over what all have in common,
terms of each over what it has in common with the student, against loops in float64."""

from __future__ import annotations

from dataclasses import replace

import loss_oracles as oracle
import numpy as np
import pytest
import torch
from student_world import sequences_of

from configs.alignment import ALIGNMENTS
from configs.labels import LABELS
from configs.section import MAIN
from configs.tasks import Ensemble
from trainer.align.aligner import SharedIds
from trainer.align.blocks import ALIGNED_COLUMN, to_student_rows
from trainer.checks.evaluate import StudentHead, TeacherStates, TeachersTogether, evaluation_rows
from trainer.labels.encoding import ALIGNED, Column, load_encoding
from trainer.loop.packing import pack
from trainer.loop.together import packable
from trainer.losses.ensemble import WEIGHT, Together
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape
from trainer.types import LabelHeader, Reading, SoftLabelBlock, Unit

N, H, V = 13, 16, 47
SIZES = {"same": 47, "other": 61}
CPU = torch.device("cpu")
G = torch.Generator().manual_seed(5)
HEADS = {name: Head(torch.randn(size, H, generator=G), None, HeadShape(), size) for name, size in SIZES.items()}
HIDDEN = {name: torch.randn(N, H, generator=G) for name in SIZES}
STUDENT = torch.randn(N, V, generator=G) * 2
TARGETS = torch.randint(V, (N,), generator=G)
TABLES = {"same": np.arange(47, dtype=np.int32), "other": np.full(61, -1, dtype=np.int32)}
TABLES["other"][torch.randperm(61, generator=G)[:30].numpy()] = torch.randperm(47, generator=G)[:30].numpy()
WEIGHTS = torch.rand(N, 2, generator=G, dtype=torch.float64)
WEIGHTS /= WEIGHTS.sum(1, keepdim=True)


def probabilities(name: str) -> torch.Tensor:
    return (HIDDEN[name] @ HEADS[name].weight.T).double().softmax(1)


def over_common(name: str, ids: list[int]) -> torch.Tensor:
    """float64 [N, S + 1]: a teacher's mass of these ids of the student, and of everything else."""
    p, table = probabilities(name), TABLES[name].tolist()
    kept = torch.stack([p[:, table.index(i)] for i in ids], 1)
    return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)


def labels_of(kind: str, weights: torch.Tensor = WEIGHTS, **parameters: object) -> tuple[object, dict]:
    encoding = load_encoding(LABELS.validate({"kind": kind, **parameters}))
    labels = {ALIGNED: torch.ones(N, 1)}
    for index, name in enumerate(SIZES):
        source = HIDDEN[name] if encoding.needs == "hidden" else HIDDEN[name] @ HEADS[name].weight.T
        columns = encoding.encode(source, torch.zeros(N, dtype=torch.int64)) | {ALIGNED: torch.ones(N, 1)}
        labels |= {f"{name}/{column}": values for column, values in columns.items()}
        labels[f"{name}/{WEIGHT}"] = weights[:, index : index + 1].float()
    return encoding, labels


def test_a_mixture_is_over_the_tokens_that_all_have_and_one_event_of_all_others() -> None:
    common = SharedIds.common(TABLES, num_student=V, device=CPU)
    ids = sorted(set(TABLES["other"].tolist()) - {-1})
    assert [one.student_ids.tolist() for one in common.values()] == [ids, ids]
    method = ALIGNMENTS.load(ALIGNMENTS.validate("overlap"))
    encoding, labels = labels_of("hidden")
    aligned = {name: method.encoding(encoding, one) for name, one in common.items()}
    together = Together(encoding, tuple(SIZES), "probability_mean", HEADS, aligned)
    objective = Objective.of((oracle.term("forward_kl"), oracle.term("reverse_kl")), encoding)
    logits, exact = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    found, _ = objective.rows(logits, together.prepare(labels), TARGETS, together)
    q = exact.softmax(1)
    q = torch.cat([q[:, ids], 1 - q[:, ids].sum(1, keepdim=True)], 1)
    p = sum(WEIGHTS[:, [index]] * over_common(name, ids) for index, name in enumerate(SIZES))
    wanted = torch.stack([oracle.forward_kl(a, b) + oracle.reverse_kl(a, b) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(one.sum(), leaf)[0] for one, leaf in ((found, logits), (wanted, exact))]
    torch.testing.assert_close(gradients[0].double(), gradients[1], atol=1e-4, rtol=1e-4)
    swapped = Together(encoding, tuple(SIZES), "probability_mean", HEADS, aligned)
    other, _ = objective.rows(STUDENT, swapped.prepare(labels_of("hidden", WEIGHTS.flip(1))[1]), TARGETS, swapped)
    assert (other.double() - wanted).abs().max() > 0.05


@pytest.mark.parametrize(("kind", "parameters"), [("topk", {"k": 9}), ("hidden", {})])
def test_terms_of_each_teacher_are_those_that_it_has_alone_times_its_weight(kind: str, parameters: dict) -> None:
    method = ALIGNMENTS.load(ALIGNMENTS.validate("overlap"))
    shared = {name: SharedIds.of(table, num_student=V, device=CPU) for name, table in TABLES.items()}
    encoding, labels = labels_of(kind, **parameters)
    labels[f"other/{ALIGNED}"][3:5] = 0
    aligned = {name: method.encoding(encoding, one) for name, one in shared.items()}
    together = Together(encoding, tuple(SIZES), "per_teacher", HEADS, aligned)
    terms = (oracle.term("forward_kl"),)
    objective = Objective.of(terms, encoding, teachers=tuple(SIZES))
    found, values = objective.rows(STUDENT, together.prepare(labels), TARGETS, together)
    alone = {}
    for name in SIZES:
        own = {column.removeprefix(f"{name}/"): v for column, v in labels.items() if column.startswith(f"{name}/")}
        prepared = aligned[name].prepare(own, HEADS[name])
        alone[name], _ = Objective.of(terms, encoding).rows(STUDENT, prepared, TARGETS, aligned[name], HEADS[name])
        torch.testing.assert_close(values[f"forward_kl/{name}"], alone[name])
    assert not values["forward_kl/other"][3:5].any()
    assert values["forward_kl/other"][[2, 5]].all()
    wanted = sum(alone[name] * WEIGHTS[:, index].float() for index, name in enumerate(SIZES))
    torch.testing.assert_close(found, wanted)


def test_with_the_students_own_tokenizer_an_aligned_mixture_is_the_plain_one() -> None:
    tables = {"same": TABLES["same"], "again": TABLES["same"][::-1].copy()}
    common = SharedIds.common(tables, num_student=V, device=CPU)
    assert [one.exhaustive for one in common.values()] == [True, True]
    assert [one.student_ids.tolist() for one in common.values()] == [list(range(V))] * 2
    larger = tables | {"more": np.append(TABLES["same"], -1).astype(np.int32)}
    assert {one.exhaustive for one in SharedIds.common(larger, num_student=V, device=CPU).values()} == {False}


def test_held_out_rows_are_compared_over_the_common_tokens_where_all_teachers_say_something() -> None:
    common = SharedIds.common(TABLES, num_student=V, device=CPU)
    ids = common["same"].student_ids.tolist()
    weight, hidden = torch.randn(V, H, generator=G), torch.randn(N, H, generator=G)
    states = tuple(TeacherStates(HIDDEN[name], HEADS[name], common[name]) for name in SIZES)
    aligned = torch.arange(N) != 4
    weights = tuple(WEIGHTS[:, [index]].float() for index in range(2))
    head = StudentHead.of(weight, None, HeadShape(), V)
    rows = evaluation_rows(hidden, head, TARGETS, TeachersTogether(states, weights, aligned=aligned), chunk_rows=5)
    q = (hidden @ weight.T).double().softmax(1)
    q = torch.cat([q[:, ids], 1 - q[:, ids].sum(1, keepdim=True)], 1)
    of_each = [over_common(name, ids) for name in SIZES]
    p = sum(WEIGHTS[:, [index]] * one for index, one in enumerate(of_each))
    kl = lambda a: (a * (a.log() - q.log())).sum(1)  # noqa: E731
    torch.testing.assert_close(rows.kl.double(), kl(p)[aligned], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        rows.kl_to_each.double(), torch.stack([*map(kl, of_each)], 1)[aligned], atol=1e-4, rtol=1e-4
    )
    first = torch.tensor([*ids, -1])[p.argmax(1)][aligned]
    assert rows.teacher_first.tolist() == first.tolist()
    assert len(rows.student_logprob) == N


# --- rows -------------------------------------------------------------------------------------------------------------


def block_of(unit: Unit, number: int) -> SoftLabelBlock:
    """Its label of each row is the row's number, and 1000 for each teacher before."""
    read = unit.as_read()
    counts = [sequence.num_loss_tokens for sequence in read.sequences]
    rows = np.arange(sum(counts), dtype=np.float32)[:, None] + 1000 * number
    header = LabelHeader(unit.kind[1], "1", LABELS.validate("topk"), "tiny", 283, 64, "float32")
    return SoftLabelBlock(header, read.tokens_hash(), {"x": rows}, np.cumsum([0, *counts]))


@pytest.mark.parametrize("how", ["probability_mean", "per_teacher"])
def test_each_teachers_rows_come_to_those_of_the_student_and_weigh_nothing_where_there_is_none(how: str) -> None:
    sequence = max(sequences_of(1), key=lambda one: one.num_loss_tokens)
    n = sequence.num_loss_tokens
    readings = {}
    for name, missing in (("same", 0), ("other", 1)):
        groups = np.where(np.arange(n) < missing, -1, np.arange(n) - missing)
        mask = np.zeros(n + 4, dtype=bool)
        mask[2 : 2 + n - missing] = True
        readings[name] = Reading(np.arange(n + 4, dtype=np.int32), mask, groups, np.arange(n - missing), n - missing)
    unit = Unit("0:0", (replace(sequence, teacher="same+other", readings=readings),))
    asked = unit.asked()
    assert [one.sequences[0].reading for one in asked] == [readings["same"], readings["other"]]
    blocks = {one.id: to_student_rows(one, block_of(one, number)) for number, one in enumerate(asked)}
    ready = packable(
        [unit],
        blocks,
        {one.kind: (Column("x", torch.float32, 1), ALIGNED_COLUMN) for one in asked},
        ensembles={MAIN: Ensemble(teachers=("same", "other"), how=how, weights={"same": 1, "other": 3})},
        pick=None,
    )
    (part,) = pack(ready.units, ready.moved([(0, 0)]), ready.blocks, layouts=ready.layouts).parts
    assert part.labels["same/x"][:, 0].tolist() == list(range(n))
    assert part.labels["other/x"][1:, 0].tolist() == [1000 + row for row in range(n - 1)]
    assert part.labels["other/aligned"][:, 0].tolist() == [0.0] + [1.0] * (n - 1)
    alone = 1.0 if how == "probability_mean" else 0.25
    assert part.labels["same/weight"][:, 0].tolist() == [alone] + [0.25] * (n - 1)
    assert part.labels["other/weight"][:, 0].tolist() == [0.0] + [0.75] * (n - 1)
    assert part.labels[ALIGNED].all()
    assert unit.sequences[0].aligned_rows.tolist() == [False] + [True] * (n - 1)

"""Evaluation rows against transformers' logits in float64, and sums over ranks against means over all rows."""

from __future__ import annotations

import math

import loss_oracles as oracle
import pytest
import torch
from tiny_models import tiny_model

from trainer.checks.evaluate import (
    EvaluationRows,
    EvaluationSums,
    StudentHead,
    TeacherStates,
    TeachersTogether,
    evaluation_rows,
)
from trainer.model.head import Head, HeadShape

V, T = 283, 40


def held_out(family: str, *, seed: int):
    """(logits [T, V] by transformers, final hidden states, weight, head shape)."""
    model = tiny_model(family, seed=seed)
    ids = torch.randint(3, V, (1, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states, logits = model.model(ids).last_hidden_state[0], model(ids).logits[0, :, :V]
    return logits, states, model.lm_head.weight.detach(), HeadShape.of_config(model.config)


def test_the_mass_beyond_the_vocabulary_is_that_of_the_softmax_over_all_rows():
    for family in ("llama", "gemma2"):
        model = tiny_model(family, seed=1)
        ids = torch.randint(3, V, (1, T), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = oracle.probabilities(model(ids).logits[0])[:, V:].sum(-1)
        student = held_out(family, seed=1)
        target_ids = torch.zeros(T, dtype=torch.int64)
        for chunk_rows in (512, 7):
            rows = rows_of(student, student, target_ids, chunk_rows=chunk_rows)
            torch.testing.assert_close(rows.padding_mass.double(), expected, atol=1e-7, rtol=1e-4)
        exact = (student[0], student[1], student[2][:V], student[3])
        assert (rows_of(exact, student, target_ids).padding_mass == 0).all()


def rows_of(student, teacher, target_ids: torch.Tensor, *, chunk_rows: int = 512) -> EvaluationRows:
    (_, states, weight, shape), (_, teacher_states, teacher_weight, teacher_shape) = student, teacher
    head = StudentHead.of(weight, None, shape, V)
    said = TeacherStates(teacher_states, Head(teacher_weight, None, teacher_shape, V))
    return evaluation_rows(states, head, target_ids, said, chunk_rows=chunk_rows)


@pytest.mark.parametrize("student_family", ["llama", "gemma2"])
def test_rows_equal_the_float64_distributions_of_both_models(student_family: str):
    student, teacher = held_out(student_family, seed=1), held_out("gemma2", seed=2)
    target_ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    rows = rows_of(student, teacher, target_ids)
    p, q = oracle.probabilities(teacher[0]), oracle.probabilities(student[0])
    torch.testing.assert_close(rows.kl.double(), oracle.forward_kl(p, q), atol=1e-4, rtol=1e-5)
    assert torch.equal(rows.agree, student[0].argmax(1) == teacher[0].argmax(1))
    for entropy, exact in ((rows.student_entropy, q), (rows.teacher_entropy, p)):
        torch.testing.assert_close(entropy.double(), -(exact * exact.log()).sum(1), atol=1e-4, rtol=1e-5)
    for actual, exact in ((rows.student_logprob, q), (rows.teacher_logprob, p)):
        torch.testing.assert_close(
            actual.double(), exact.gather(1, target_ids[:, None])[:, 0].log(), atol=1e-4, rtol=1e-5
        )


def test_rows_do_not_depend_on_the_chunk_and_rows_shifted_by_one_are_far_off():
    student, teacher = held_out("llama", seed=1), held_out("llama", seed=1)
    target_ids = torch.zeros(T, dtype=torch.int64)
    whole, parts = rows_of(student, teacher, target_ids), rows_of(student, teacher, target_ids, chunk_rows=7)
    torch.testing.assert_close(whole.kl, parts.kl, atol=1e-5, rtol=0.0)
    assert whole.kl.abs().max() < 1e-5
    assert whole.agree.all()
    shifted = (teacher[0], teacher[1].roll(1, 0), *teacher[2:])
    wrong = rows_of(student, shifted, target_ids)
    assert wrong.kl.mean() > 1
    assert wrong.agree.float().mean() < 0.5


def test_sums_of_uneven_ranks_give_the_means_over_all_rows():
    g = torch.Generator().manual_seed(3)
    kl, agree = torch.rand(30, generator=g), torch.rand(30, generator=g) > 0.4
    student, teacher = -torch.rand(30, generator=g), -torch.rand(30, generator=g)
    padding = torch.rand(30, generator=g)
    parts = (slice(0, 4), slice(4, 30), slice(0, 0))
    entropies = 2 * kl, 3 * kl
    ranks = [
        EvaluationRows(*(x[s] for x in (kl, agree, student, teacher, padding, *entropies, *[agree] * 4)), kl[s, None])
        for s in parts
    ]
    sums = EvaluationSums.combine(EvaluationSums.of(rows, ["big"]) for rows in ranks)
    result = sums.result(step=5)
    assert (result.step, result.num_rows) == (5, 30)
    assert result.forward_kl == pytest.approx(kl.mean().item())
    assert result.teachers == {"big": pytest.approx(kl.mean().item())}
    assert result.agreement == pytest.approx(agree.float().mean().item())
    assert result.perplexity == pytest.approx(math.exp(-student.mean().item()))
    means = [pytest.approx(entropy.mean().item()) for entropy in entropies]
    assert [result.student_entropy, result.teacher_entropy] == means
    assert result.padding_mass == pytest.approx(padding.mean().item())
    assert result.teacher_perplexity == pytest.approx(math.exp(-teacher.mean().item()))


def test_an_evaluation_of_nothing_is_an_error_and_a_hopeless_student_is_not():
    with pytest.raises(ValueError, match="got none"):
        EvaluationSums.combine([]).result(step=0)
    hopeless = EvaluationSums(
        num_rows=1.0,
        num_scored=1.0,
        kl=1e4,
        agree=0.0,
        student_logprob=-1e4,
        teacher_logprob=-1.0,
        padding_mass=0.0,
        student_entropy=0.0,
        teacher_entropy=0.0,
    )
    assert hopeless.result(step=0).perplexity == math.inf


def test_rows_that_no_teacher_scored_count_for_the_student_alone():
    student, teacher = held_out("llama", seed=1), held_out("llama", seed=2)
    target_ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    scored = rows_of(student, teacher, target_ids)
    alone = evaluation_rows(student[1], StudentHead.of(student[2], None, student[3], V), target_ids, None, chunk_rows=7)
    torch.testing.assert_close(alone.student_logprob, scored.student_logprob, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(alone.padding_mass, scored.padding_mass)
    result = EvaluationSums.of(alone).result(step=0)
    assert (result.forward_kl, result.agreement, result.teacher_perplexity) == (None, None, None)
    assert result.perplexity == pytest.approx(math.exp(-scored.student_logprob.mean().item()), rel=1e-5)
    assert result.is_finite

    both = EvaluationSums.combine([EvaluationSums.of(scored), EvaluationSums.of(alone)]).result(step=0)
    assert both.num_rows == 2 * T
    assert both.forward_kl == pytest.approx(scored.kl.mean().item()), "of the rows that have one"
    assert both.perplexity == pytest.approx(result.perplexity, rel=1e-5)


def test_teachers_together_are_one_teacher_and_each_by_itself():
    student, big, code = (held_out("llama", seed=seed) for seed in (1, 2, 3))
    target_ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    states = tuple(TeacherStates(one[1], Head(one[2], None, one[3], V)) for one in (big, code))
    weights = (torch.full((T, 1), 0.75), torch.full((T, 1), 0.25))
    head = StudentHead.of(student[2], None, student[3], V)
    found = evaluation_rows(student[1], head, target_ids, TeachersTogether(states, weights), chunk_rows=7)
    alone = [evaluation_rows(student[1], head, target_ids, one, chunk_rows=7) for one in states]
    torch.testing.assert_close(found.kl_to_each, torch.stack([one.kl for one in alone], 1))
    p = [one.head.logits(one.hidden).double().softmax(1) for one in states]
    q = head.inside.logits(student[1]).double().log_softmax(1)
    mixed = 0.75 * p[0] + 0.25 * p[1]
    torch.testing.assert_close(found.kl.double(), (mixed * (mixed.log() - q)).sum(1), atol=1e-4, rtol=1e-4)
    result = EvaluationSums.of(found, ["big", "code"]).result(step=0)
    assert result.teachers == {"big": pytest.approx(alone[0].kl.mean()), "code": pytest.approx(alone[1].kl.mean())}

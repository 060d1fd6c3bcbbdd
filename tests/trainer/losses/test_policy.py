"""Terms on text that the student wrote, against their definitions by enumeration of all texts of a toy vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import term_oracles as kit
import torch
import toy_rollouts as toy
from toy_rollouts import BEFORE, STUDENT, TEACHER, Estimator

from configs.labels import LABELS
from configs.losses import LOSSES
from trainer.labels.encoding import load_encoding
from trainer.losses.objective import Objective
from trainer.losses.returns import scopes_of, token_rewards

KINDS = sorted(toy.LABELS_OF)
WITH_DISTRIBUTION = [kind for kind in KINDS if kind != "token"]
NO_LIMIT = 1e4
"""Of the importance ratio: then it is exact."""


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """What labels hold is float32 at best."""
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=1e-5)


def test_every_term_on_text_of_the_student_is_held_to_its_definition_here():
    """A new one: add its average to this file."""
    assert [LOSSES.kind_of(one) for one in LOSSES.built_in if "rollouts" in one.needs] == [
        "policy_gradient", "minillm", "k2",
    ]  # fmt: skip
    for loss in ("policy_gradient", "minillm", "k2"):
        allowed = {kind for kind, other in kit.sampled_cells() if other == loss}
        assert allowed == set(KINDS)


def test_the_toy_is_a_distribution_over_texts():
    assert len(toy.TEXTS) == 40
    assert toy.chances(STUDENT).sum().item() == pytest.approx(1.0)
    assert toy.visits(STUDENT)[0].item() == pytest.approx(1.0)
    close(toy.discounted_gradient(1.0), toy.gradient(toy.text_reverse_kl), 1e-12)
    token_level = toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT))
    close(toy.discounted_gradient(0.0), token_level, 1e-12)
    assert (toy.discounted_gradient(1.0) - token_level).abs().max() > 0.01, "two different objectives"


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_at_discount_0_the_average_is_token_level_reverse_kl_over_the_vocabulary(kind: str, closed_form: bool):
    made = Estimator.of("policy_gradient", kind, closed_form=closed_form)
    close(made.mean(), toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT)))
    assert made.value() == pytest.approx(toy.token_reverse_kl(STUDENT, written=STUDENT).item(), rel=1e-5)


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_text_of_an_older_student_has_the_same_average_by_its_importance_ratio(kind: str, closed_form: bool):
    exact = toy.gradient(lambda z: toy.token_reverse_kl(z, written=BEFORE))
    made = Estimator.of("policy_gradient", kind, written=BEFORE, closed_form=closed_form, max_ratio=NO_LIMIT)
    close(made.mean(), exact)
    if not closed_form:
        truncated = Estimator.of("policy_gradient", kind, written=BEFORE, closed_form=False, max_ratio=1.0)
        assert (truncated.mean() - exact).abs().max() > 0.005, "a ratio that is cut off has its price"


@pytest.mark.parametrize("kind", ["topk", "nucleus", "given_ids"])
def test_what_lumped_labels_hide_is_made_up_for_where_the_divergence_alone_loses_it(kind: str):
    exact = toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT))
    bound = Estimator.of("reverse_kl", kind)
    assert (bound.mean() - exact).abs().max() > 0.005
    close(Estimator.of("policy_gradient", kind).mean(), exact)


def test_why_events_that_the_sampled_token_adds_have_no_closed_form():
    exact = toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT))
    made = replace(Estimator.of("policy_gradient", "given_ids"), labels={"add_target": True})
    assert (made.mean() - exact).abs().max() > 0.05
    sampled = replace(Estimator.of("policy_gradient", "given_ids", closed_form=False), labels={"add_target": True})
    close(sampled.mean(), exact)


@pytest.mark.parametrize("discount", [0.5, 1.0])
@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_answers_for_what_follows_it(kind: str, closed_form: bool, discount: float):
    made = Estimator.of("policy_gradient", kind, closed_form=closed_form, discount=discount)
    close(made.mean(), toy.discounted_gradient(discount))


@pytest.mark.parametrize("kind", KINDS)
def test_at_discount_1_the_average_is_the_gradient_of_reverse_kl_between_whole_texts(kind: str):
    made = Estimator.of("policy_gradient", kind, discount=1.0)
    close(made.mean(), toy.gradient(toy.text_reverse_kl))
    assert made.value() == pytest.approx(toy.text_reverse_kl(STUDENT).item(), rel=1e-5)


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("kind", WITH_DISTRIBUTION)
def test_the_closed_form_leaves_less_variance(kind: str, discount: float):
    sampled = Estimator.of("policy_gradient", kind, closed_form=False, discount=discount).variance()
    most = sampled if discount else 0.9 * sampled  # with a discount the rest of the text is sampled all the same
    assert Estimator.of("policy_gradient", kind, discount=discount).variance() < most


@pytest.mark.parametrize("kind", ["hidden", "dense"])
def test_with_the_whole_distribution_policy_gradient_is_reverse_kl(kind: str):
    ours, divergence = Estimator.of("policy_gradient", kind), Estimator.of("reverse_kl", kind)
    close(ours.of_texts(), divergence.of_texts(), 1e-9)
    close(ours.rows(STUDENT), divergence.rows(STUDENT), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_k2_has_the_average_gradient_of_reverse_kl_and_k1_and_k3_do_not(kind: str):
    exact = toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT))
    close(Estimator.of("k2", kind).mean(), exact)
    stale = Estimator.of("k2", kind, written=BEFORE, max_ratio=NO_LIMIT)
    close(stale.mean(), toy.gradient(lambda z: toy.token_reverse_kl(z, written=BEFORE)))


def test_why_k1_and_k3_are_refused():
    def of_tokens(estimate) -> torch.Tensor:
        weights = toy.chances(STUDENT)[toy.OF_TEXT]
        return toy.gradient(lambda z: (weights * estimate(toy.logprobs(z) - toy.logprobs(TEACHER))).sum())

    def forward(z: torch.Tensor) -> torch.Tensor:
        p = TEACHER.softmax(-1)
        return (toy.visits(STUDENT) * (p * (p.log() - z.log_softmax(-1))).sum(-1)).sum()

    assert of_tokens(lambda x: x).abs().max() < 1e-12, "k1: nothing"
    close(of_tokens(lambda x: x**2 / 2), toy.gradient(lambda z: toy.token_reverse_kl(z, written=STUDENT)), 1e-12)
    close(of_tokens(lambda x: (-x).exp() - 1 + x), toy.gradient(forward), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_minillm_is_the_single_step_part_and_the_mean_of_what_follows(kind: str):
    """Text by text in loops, over the whole vocabulary."""
    q, p = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    expected = torch.zeros_like(STUDENT)
    for text, chance in zip(toy.TEXTS, toy.chances(STUDENT), strict=True):
        places = [toy.BEGINNINGS.index(text[:i]) for i in range(len(text))]
        earned = [p[place, token] - q[place, token] for place, token in zip(places, text, strict=True)]
        for i, place in enumerate(places):
            later = earned[i + 1 :]
            mean = sum(later) / len(later) if later else 0.0
            kl = toy.gradient(lambda z, at=place: (z[at].softmax(-1) * (z.log_softmax(-1) - p)[at]).sum())
            score = toy.gradient(lambda z, at=place, token=text[i]: z.log_softmax(-1)[at, token])
            expected += chance * (kl - mean * score)
    close(Estimator.of("minillm", kind).mean(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_log_ratios_and_fixed_negatives_are_those_of_the_definition(kind: str):
    """By a loop over tokens: - w A d log q(y)."""
    made = Estimator.of(
        "policy_gradient", kind, written=BEFORE, closed_form=False, clip=0.5, fixed_negative=0.2, max_ratio=1.1
    )
    q, p, m = (model.log_softmax(-1) for model in (STUDENT, TEACHER, BEFORE))
    expected = torch.zeros_like(STUDENT)
    for text, chance in zip(toy.TEXTS, toy.chances(BEFORE), strict=True):
        for i, token in enumerate(text):
            at = toy.BEGINNINGS.index(text[:i])
            reward = float((p[at, token] - q[at, token]).clamp(-0.5, 0.5))
            weight = min(float((q[at, token] - m[at, token]).exp()), 1.1)
            score = toy.gradient(lambda z, at=at, token=token: z.log_softmax(-1)[at, token])
            expected -= chance * weight * (reward if reward >= 0 else -0.2) * score
    close(made.mean(), expected)


REWARDS = tuple(5.0 + sum(text) - 0.7 * len(text) for text in toy.TEXTS)
"""What a verifier might say: of one sign, so that without a baseline its size is noise."""


def of_reward(z: torch.Tensor) -> torch.Tensor:
    return (toy.chances(z) * torch.tensor(REWARDS, dtype=torch.float64)).sum()


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_a_verifiers_reward_is_raised_beside_reverse_kl(discount: float):
    made = Estimator.of("policy_gradient", "topk", discount=discount, reward_weight=0.3)
    made = replace(made, rewards=REWARDS)
    close(made.mean(), toy.discounted_gradient(discount) - 0.3 * toy.gradient(of_reward))
    kl = toy.text_reverse_kl(STUDENT).item()
    assert made.value() == pytest.approx(kl - 0.3 * of_reward(STUDENT).item(), rel=1e-5)


def pairs_of_texts(made: Estimator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the gradient of two texts that are drawn together and compared: [beginnings, V], [].

    All pairs stand in one batch: text a of pair (a, b) is row block a of the batch of all texts, with columns of its
    own, so that each is weighed by what the other was."""
    encoding = load_encoding(LABELS.validate({"kind": made.kind, **toy.LABELS_OF[made.kind]}))
    (returns,) = Objective.of((made.term,), encoding).returns
    rewards = token_rewards(made.rewards, None, toy.OF_TEXT)
    teacher, written = toy.logprobs(TEACHER), toy.logprobs(made.written)
    numbers = returns.numbers(written, teacher, rewards, toy.OF_TEXT, ["0:0"] * len(toy.TEXTS))
    chances, mean, square = toy.chances(made.written), torch.zeros_like(STUDENT), 0.0
    found = []
    for other in numbers:  # the gradient of every text beside this one
        scopes = [scopes_of([one, other]) for one in numbers]
        columns = [
            returns.columns([one], scope, rewards[i == toy.OF_TEXT], torch.zeros(len(toy.TEXTS[i]), dtype=torch.int64))
            for i, (one, scope) in enumerate(zip(numbers, scopes, strict=True))
        ]
        joined = {name: torch.cat([one[name] for one in columns]).double() for name in columns[0]}
        found.append(made.of_texts(columns=joined))
    for a, first in enumerate(chances):
        for b, second in enumerate(chances):
            both = (found[b][a] + found[a][b]) / 2
            mean += first * second * both
            square += float(first * second * both.square().sum())
    return mean, torch.tensor(square) - mean.square().sum()


@pytest.mark.parametrize("baseline", ["group", "batch"])
@pytest.mark.parametrize("closed_form", [True, False])
def test_a_baseline_over_the_other_answers_changes_no_average_and_leaves_less_variance(
    baseline: str, closed_form: bool
):
    parameters = {"discount": 1.0, "reward_weight": 1.0, "closed_form": closed_form}
    plain = replace(Estimator.of("policy_gradient", "topk", **parameters), rewards=REWARDS)
    ours = replace(Estimator.of("policy_gradient", "topk", baseline=baseline, **parameters), rewards=REWARDS)
    mean, variance = pairs_of_texts(ours)
    close(mean, toy.gradient(toy.text_reverse_kl) - toy.gradient(of_reward))
    assert variance < 0.5 * plain.variance() / 2, "of two texts that are drawn alone"


def test_minillm_has_the_same_average_with_a_baseline():
    mean, _ = pairs_of_texts(Estimator.of("minillm", "hidden", baseline="group"))
    close(mean, Estimator.of("minillm", "hidden").mean())

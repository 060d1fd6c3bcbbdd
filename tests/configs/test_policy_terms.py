"""Terms on text that the student wrote: what is refused before anything starts, and what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.losses import LOSSES
from configs.schema import Run
from configs.tasks import ResolvedTask

TERMS = ("policy_gradient", "minillm", "k2")


def problems(objective: list[Any], **changes: Any) -> str:
    """What is wrong with a run whose answers are the dataset's; empty where nothing is."""
    fields = {
        "name": "small",
        "student": {"model": {"path": "a/student"}},
        "teacher": {"model": {"path": "a/teacher"}},
        "prompts": {"path": "rows.jsonl"},
        "training": {"steps": 10},
        "objective": objective,
    }
    try:
        Run.model_validate(fields | changes)
    except ValidationError as error:
        return "\n".join(str(one["msg"]) for one in error.errors())
    return ""


@pytest.mark.parametrize("loss", TERMS)
def test_text_that_no_student_wrote_is_refused(loss: str) -> None:
    text = problems([loss])
    assert f"{loss} learns from text that the student wrote, and answers: dataset are of others" in text
    assert "write answers: student" in text
    assert problems(["reverse_kl"]) == ""


@pytest.mark.parametrize("loss", TERMS)
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ("sampled", "they do not hold the sampled token: write labels: token, topk, given_ids or hidden"),
        ("fakes.poisoned_labels", "they do not hold the sampled token"),
        ({"kind": "topk", "temperature": 2.0}, "at temperature 1, and labels: topk are at 2: remove temperature"),
        ("none", "needs labels of every token"),
    ],
)
def test_labels_that_do_not_judge_the_sampled_token_as_it_was_drawn_are_refused(
    loss: str, labels: Any, text: str
) -> None:
    assert text in problems([loss], labels=labels)


def test_events_that_the_sampled_token_adds_are_refused_with_both_ways_out() -> None:
    text = problems(["policy_gradient", "minillm", "k2"], labels="given_ids")
    assert text.count("write add_target: false there") == 2, "k2 takes no average over events"
    assert "or closed_form: false here" in text
    assert "or labels: topk" in text
    assert "add_target" not in problems(["policy_gradient"], labels={"kind": "given_ids", "add_target": False})


@pytest.mark.parametrize(
    ("loss", "text"),
    [("k1", "gradient of zero on average"), ("k3", "on average that of forward KL. Write k2 or policy_gradient")],
)
def test_estimators_that_are_no_losses_are_refused_with_the_reason(loss: str, text: str) -> None:
    assert text in problems([loss])


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"whiten": "all"}, "write baseline: group or batch"),
        ({"whiten": "reward", "baseline": "group", "discount": 1.0}, "reward_weight is 0: write a reward_weight"),
        ({"whiten": "all", "baseline": "group", "discount": 1.0}, "write closed_form: false"),
        ({"fixed_negative": 1.0}, "write closed_form: false"),
        ({"baseline": "batch"}, "nothing sampled is left"),
        ({"discount": 1.5}, "less than or equal to 1"),
        ({"max_ratio": 0.5}, "greater than or equal to 1"),
        ({"reward_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(parameters: dict[str, Any], text: str) -> None:
    assert text in problems([{"loss": "policy_gradient", **parameters}])


def test_one_teacher_gives_the_reward() -> None:
    teachers = {name: {"model": {"path": f"a/{name}"}} for name in ("big", "code")}
    text = problems(["k2"], teacher=None, teachers=teachers, ensemble={"teachers": ["big", "code"]})
    assert "k2 has its reward from one teacher: write teacher: big instead of ensemble" in text


def test_a_reward_is_given_where_a_term_raises_it_and_only_there() -> None:
    raising, reward = {"loss": "policy_gradient", "reward_weight": 0.5}, {"kind": "pattern", "pattern": "boxed"}
    assert "the task has none: write reward: package.module" in problems([raising])
    assert "reward" not in problems([raising], reward=reward)
    assert "no term raises it: write reward_weight" in problems(["reverse_kl"], reward=reward)
    text = problems([raising], reward=reward, prompts={"path": "rows.jsonl", "streaming": True})
    assert "which a stream does not have: write streaming: false" in text
    assert "is no regular expression of Python" in problems([raising], reward={"kind": "pattern", "pattern": "("})


def test_a_group_of_one_answer_has_no_baseline() -> None:
    def of_group(n: int) -> str:
        return problems([grouped], answers={"kind": "student", "n": n}, rollouts={})

    grouped = {"loss": "minillm", "baseline": "group"}
    assert "write n: 2 or more, or baseline: batch" in of_group(1)
    assert of_group(4) == ""
    assert problems([{"loss": "minillm", "baseline": "batch"}], answers="student", rollouts={}) == ""


@pytest.mark.parametrize("loss", TERMS)
def test_greedy_text_is_no_sample(loss: str) -> None:
    answers = {"kind": "student", "temperature": 0.0}
    assert "answers with temperature: 0 are greedy: write temperature: 1" in problems(
        [loss], answers=answers, rollouts={}
    )
    assert problems(["reverse_kl"], answers=answers, rollouts={}) == ""


def test_what_a_task_learns_is_known_from_its_terms() -> None:
    def task(*terms: Any) -> ResolvedTask:
        objective = tuple(LOSSES.validate(term) for term in terms)
        return ResolvedTask("main", None, None, None, objective, None, None)

    assert not task("reverse_kl").learns_rollouts
    assert task("reverse_kl", "k2").learns_rollouts
    assert not task("policy_gradient").raises_rewards
    assert task({"loss": "policy_gradient", "reward_weight": 0.5}).raises_rewards


@pytest.mark.parametrize(
    ("term", "exactness"),
    [
        ("policy_gradient", "unbiased"),
        ({"loss": "policy_gradient", "clip": 10.0}, "biased"),
        ({"loss": "policy_gradient", "reward_weight": 1.0, "baseline": "group", "whiten": "reward"}, "biased"),
        ({"loss": "policy_gradient", "closed_form": False, "fixed_negative": 1.0}, "biased"),
        ("minillm", "unbiased"),
        ({"loss": "k2", "clip": 10.0}, "biased"),
    ],
)
def test_parameters_that_bias_a_term_say_so(term: Any, exactness: str) -> None:
    run = Run.model_validate({
        "name": "small", "student": {"model": {"path": "s"}}, "teacher": {"model": {"path": "t"}},
        "prompts": {"path": "rows.jsonl"}, "training": {"steps": 1}, "labels": {"kind": "topk"},
    })  # fmt: skip
    assert LOSSES.validate(term).exactness_of(run.labels) == exactness

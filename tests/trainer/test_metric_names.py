"""The contract of names: every family once, and what belongs to which."""

from __future__ import annotations

import pytest

from trainer.metric_names import METRICS, metric_of

KNOWN = {
    "train/jsd": "train/<term>",
    "train/jsd_2": "train/<term>",
    "train/my_terms.gap": "train/<term>",
    "train/loss": "train/loss",
    "train/loss_tokens": "train/loss_tokens",
    "task/chat.v2/cross_entropy": "task/<task>/<term>",
    "task/chat/loss_tokens": "task/<task>/loss_tokens",
    "teacher/big/token_share": "teacher/<teacher>/token_share",
    "evaluation/task/chat/forward_kl": "evaluation/task/<task>/forward_kl",
}


@pytest.mark.parametrize(("name", "family"), KNOWN.items())
def test_a_name_belongs_to_one_family(name: str, family: str) -> None:
    assert [metric.name for metric in METRICS if metric.matches(name)] == [family]


@pytest.mark.parametrize("name", ["train/los", "loss", "train/forward", "task/chat", "evaluation/task/forward_kl/x"])
def test_other_names_are_none(name: str) -> None:
    assert metric_of(name) is None


def test_every_family_is_there_once_and_says_what_it_is() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.meaning for metric in METRICS)
    assert all(metric.unit == "s" for metric in METRICS if metric.name.endswith("_s") and "per" not in metric.name)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("train/taid_t", "train/<term>_<own>"),
        ("train/atkd_2_hard_share", "train/<term>_<own>"),
        ("train/cross_entropy_weight_position", "train/<term>_<own>"),
        ("task/code/reverse_kl_difficulty_keep", "task/<task>/<term>_<own>"),
        ("task/code/reverse_kl_weight_entropy", "task/<task>/<term>_<own>"),
        ("train/reverse_kl_else", None),
        ("train/hard_share", None),
    ],
)
def test_what_a_term_tells_is_a_family_of_its_own(name: str, family: str | None) -> None:
    found = metric_of(name)
    assert (None if found is None else found.name) == family

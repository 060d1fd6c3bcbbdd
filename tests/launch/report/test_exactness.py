"""What a run says about its losses: first line, manifest, report and model card, from the registry of terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.losses import LOSSES
from configs.schema import Run
from launch.report.exactness import exactness_of, losses_note, told_at_start
from launch.report.metrics import Records
from launch.report.model_card import model_card
from launch.report.page import write_report
from trainer.run_folder import RunFolder, write_json

BOUND = "a lower bound of the value over the whole vocabulary (labels: topk)"
DIVERGENCES = [
    LOSSES.kind_of(term) for term in LOSSES.built_in if "labels" in term.needs and "rollouts" not in term.needs
]


def run(**changes: Any) -> Run:
    fields: dict[str, Any] = {
        "name": "small-one",
        "student": {"model": {"path": "a/student"}},
        "teacher": {"model": {"path": "a/teacher"}},
        "prompts": {"path": "rows.jsonl"},
        "training": {"steps": 100},
    }
    return Run.model_validate(fields | changes)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("kind", ["topk", "hidden", "dense"])
def test_every_divergence_says_with_every_encoding_what_its_value_is(loss: str, kind: str) -> None:
    term = {"loss": loss, **({"beta": 0.5} if loss == "jsd" else {})}
    found = LOSSES.parameters_of(loss).exactness[kind]
    if found == "refused":
        with pytest.raises(ValidationError, match=f"{loss} cannot be computed from labels: {kind}"):
            run(labels=kind, objective=[term])
        return
    told = run(labels=kind, objective=[term, {"loss": "cross_entropy"}])
    words = {"exact": "exact", "lower_bound": BOUND, "biased": BOUND.replace("a lower bound", "a biased estimate")}[
        found
    ]
    assert exactness_of(told) == {loss: words, "cross_entropy": "exact"}
    lines = [] if found == "exact" else [f"{loss} is {words}. Held-out numbers are exact"]
    assert told_at_start(told) == lines


def test_terms_of_tasks_are_named_by_task_in_one_line() -> None:
    pairs = {"labels": "token", "objective": [{"loss": "dpo"}]}
    chat = {"objective": [{"loss": "forward_kl"}, {"loss": "reverse_kl"}]}
    told = run(tasks={"pairs": pairs, "chat": chat})
    assert exactness_of(told) == {"pairs/dpo": "exact", "chat/forward_kl": BOUND, "chat/reverse_kl": BOUND}
    (line,) = told_at_start(told)
    assert line == f"chat/forward_kl and chat/reverse_kl are each {BOUND}. Held-out numbers are exact"


def test_labels_of_a_user_are_not_declared() -> None:
    told = run(labels="fakes.poisoned_labels", objective=[{"loss": "forward_kl"}])
    assert exactness_of(told) == {"forward_kl": "not declared (labels: fakes.poisoned_labels)"}
    assert told_at_start(told) == []


def test_card_and_report_say_it(tmp_path: Path) -> None:
    told = run()
    card = model_card(told, manifest={}, records=Records(steps=(), evaluations=(), events=()))
    assert f"| training loss is | forward\\_kl: {BOUND} |" in card.splitlines()
    folder = RunFolder.create(tmp_path / "run")
    folder.config.write_text("name: small-one\n")
    write_json(folder.manifest, {"training_losses": exactness_of(told)})
    page = write_report(folder).read_text()
    assert "Training losses" in page
    assert losses_note(exactness_of(told)).startswith(f"Training loss: forward_kl is {BOUND}. Held-out numbers are ")
    assert [losses_note(odd) for odd in (None, {}, ["forward_kl"], {"forward_kl": 1})] == [""] * 4
    assert BOUND in page

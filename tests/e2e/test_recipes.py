"""Every recipe trains, with tiny models in place of the demo's, on the rows that it names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_models import tiny_folder, tiny_model
from tiny_runs import records, stillhouse
from two_tokenizers import digits_in_threes

from configs.document import read_document
from configs.labels import LABELS
from configs.paths import ROOT
from trainer.run_folder import read_json

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
TINY = (
    "runtime=in_process",
    "data.max_length=512",  # of the tiny tokenizer, whose tokens are characters
    "data.on_too_long=drop",
    "training.micro_batch_tokens=1536",
    "training.steps=2",
    "training.evaluate_every=0",
    "optimizer.warmup_steps=0",
    "report.generate=0",
)
OF_TINY_MODELS = {
    "features": (
        "labels.layers=[1]",
        *(f"objective.{term}.{whose}_layer=1" for term in (1, 2) for whose in ("student", "teacher")),
    ),
    "other_tokenizer": ("align.min_ratio=0.05",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "teacher", seed=1)
    tiny_folder(folder / "student", seed=2, num_hidden_layers=1)
    other = digits_in_threes()
    tiny_model(seed=3, vocab_size=len(other)).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, models: Path, tmp_path: Path) -> None:
    tree = read_document(recipe, ()).tree
    named = tree.get("teachers") or {None: tree.get("teacher")}
    places = [f"teachers.{name}" if name else "teacher" for name in named]
    student = "other" if tree["student"]["model"]["path"] == "models/other" else "student"
    sets = [*TINY, *OF_TINY_MODELS.get(recipe.stem, ()), f"folder={tmp_path / 'run'}"]
    sets += [f"student.model.path={models / student}"]
    sets += [
        text for place in places for text in (f"{place}.model.path={models / 'teacher'}", f"{place}.scorer.engine=hf")
    ]
    if "store" in tree:
        sets += [f"store.path={tmp_path / 'labels'}"]
    flags = [part for text in sets for part in ("--set", text)]
    result = stillhouse("train", str(recipe), "--skip-self-test", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = records(tmp_path / "run", "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["train/loss"]) and step["train/loss_tokens"] > 0 for step in steps)
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 0


def test_the_recipes_show_every_kind_of_labels_that_a_run_of_today_takes() -> None:
    """But for dense, which is for tests."""
    shown = set()
    for recipe in RECIPES:
        tree = read_document(recipe, ()).tree
        for labels in (one.get("labels") for one in (tree, *tree.get("tasks", {}).values())):
            shown.add(labels["kind"] if isinstance(labels, dict) else labels)
        shown |= {kind for kind in LABELS.kinds() if f"# labels: {{kind: {kind}," in recipe.read_text()}
    assert set(LABELS.kinds()) - shown == {"dense", "none"}
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert [recipe.name for recipe in RECIPES if f"(../configs/recipes/{recipe.name})" not in page] == []

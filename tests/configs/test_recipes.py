"""Every configuration that is shipped loads, and the schema's descriptions are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from configs.answers import ANSWERS
from configs.document import read_document
from configs.engines import ENGINES
from configs.keys import dotted, keys_of
from configs.labels import LABELS
from configs.load import dump_run, load_run
from configs.losses import LOSSES
from configs.paths import ROOT
from configs.schema import Run

RECIPES = sorted((ROOT / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_its_dump_loads_back(recipe: Path, tmp_path: Path) -> None:
    run = load_run(recipe).run
    assert run.name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_run(run))
    assert load_run(copy).run == run


def test_the_json_schema_offers_the_parameters_of_each_plugin() -> None:
    schema = json.loads(json.dumps(Run.model_json_schema()))
    forms = {form.get("title"): form for form in schema["properties"]["labels"]["anyOf"]}
    assert "k" in forms["topk"]["properties"]
    assert forms["topk"]["additionalProperties"] is False
    assert "required" not in forms["topk"]
    assert forms["dense"]["required"] == ["kind"]


def test_every_key_says_what_it_means() -> None:
    """By its own description, or by that of the section or the choice that it holds."""
    several: list[Any] = [{"loss": LOSSES.kind_of(one)} for one in LOSSES.built_in]
    tasks = {kind: {"labels": kind, "objective": several} for kind in LABELS.kinds()}
    tasks |= {kind: {"answers": kind} for kind in ANSWERS.kinds()}
    teachers = {kind: {"scorer": {"engine": kind}} for kind in ENGINES.kinds()}
    keys = list(keys_of(Run, {"tasks": tasks, "teachers": teachers}))
    holders = {key.path[:depth] for key in keys for depth in range(len(key.path))}
    silent = [
        dotted(key.path)
        for key in keys
        if not key.field.description and key.path[-1] not in ("kind", "loss") and key.path not in holders
    ]
    assert silent == []
    assert len(keys) > 300


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_json_schema_accepts_what_is_shipped_and_kinds_of_a_users_own(recipe: Path) -> None:
    validator = Draft202012Validator(Run.model_json_schema())
    tree = read_document(recipe, ()).tree
    assert not list(validator.iter_errors(tree))
    for good in ("topk", {"k": 8}, {"kind": "hidden"}, "house.labels", {"kind": "house.labels", "width": 3}):
        assert not list(validator.iter_errors({**tree, "labels": good})), good
    for bad in ("topkk", {"kind": "hidden", "k": 8}, {"kind": "house"}, {"k": 0}):
        assert list(validator.iter_errors({**tree, "labels": bad})), bad

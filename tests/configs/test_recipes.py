"""Every configuration that is shipped loads, and the schema's descriptions are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import dump_run, load_run
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

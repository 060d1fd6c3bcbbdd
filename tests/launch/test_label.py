"""What `stillhouse label` refuses before a teacher starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.label import label
from trainer.errors import ConfigError


def test_labels_of_ids_that_a_student_chooses_cannot_be_made_without_one(tmp_path: Path) -> None:
    config, model = tmp_path / "run.yaml", {"model": {"path": "x"}}
    given = {"name": "x", "student": model, "teacher": model, "prompts": {"path": "rows.jsonl"}}
    given |= {"store": {"path": "labels"}, "labels": "given_ids", "training": {"steps": 1}}
    config.write_text(json.dumps(given))
    with pytest.raises(ConfigError, match="labels: given_ids are of ids that the student"):
        label(config, [])

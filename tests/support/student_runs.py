"""Run folders as they are when a run has ended, for what is done with a student afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.load import dump_run
from configs.schema import Run
from trainer.run_folder import RunFolder

IDS = torch.tensor([[1, 40, 50, 60, 70]])


def write_run(path: Path, student: Path, **changes: Any) -> RunFolder:
    folder = RunFolder.create(path)
    run = Run.model_validate(
        {
            "name": "one",
            "student": {"model": {"path": str(student)}, **changes},
            "teacher": {"model": {"path": "owner/teacher"}},
            "prompts": {"path": "x.jsonl"},
            "training": {"steps": 2},
        }
    )
    folder.config.write_text(dump_run(run))
    return folder

"""`runtime: in_process`: what a person sees when a role of it cannot start."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from student_world import STEPS, Vocabulary, make_plan, make_run
from tiny_models import tiny_folder

from cluster.in_process import InProcessStudents
from cluster.students.group import StudentJob
from trainer.errors import ConfigError


@pytest.mark.stack
def test_a_student_that_cannot_be_built_is_closed_without_hiding_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder = tiny_folder(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run = make_run(tmp_path)
    job = StudentJob(run=run, plan=make_plan(run), vocabulary=Vocabulary(), total_steps=STEPS)

    async def start_and_close() -> None:
        students = InProcessStudents(job)
        try:
            await students.start(None)
        finally:
            await students.close()

    for _ in range(2):  # the process group was left too, so that the next one can join
        with pytest.raises(ConfigError, match=r"student\.model: .* lacks model\.norm\.weight"):
            asyncio.run(start_and_close())

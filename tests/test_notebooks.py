"""The notebooks of docs/, run by a real kernel from beginning to end, with tiny models in place of the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_runs import tiny_run
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def text_of(cell: nbformat.NotebookNode) -> str:
    """Everything that a cell has shown, as text."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs_and_opens_with_what_it_shows(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells(notebook, "code"))
    assert notebook.cells[0].source.startswith("# ")
    for cell in cells(notebook, "code"):
        compile(cell.source, path.name, "exec")
    for cell in cells(notebook, "markdown"):
        for link in (part.split(")")[0] for part in cell.source.split("](")[1:]):
            assert (path.parent / link).exists(), link


@pytest.mark.stack
@pytest.mark.timeout(1800)
def test_the_notebook_distils_compares_and_exports(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "distil.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    places = {"TEACHER": "teacher", "STUDENT": "student", "ROWS": "train.jsonl", "HELD_OUT": "held_out.jsonl"}
    lines = [f"{name} = Path({str(tmp_path / place)!r})" for name, place in {**places, "RUNS": "runs"}.items()]
    parameters.source = "\n".join(["from pathlib import Path", *lines, "STEPS = 6"])
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = {cell.source.splitlines()[0]: cell for cell in cells(notebook, "code")}
    assert "--set training.stepz=5" in text_of(shown["from launch.api import ConfigError, check, distil"])
    assert "ready" in text_of(shown["check(config)"])
    assert "step 6/6" in text_of(shown["result = distil(config)"])
    assert "forward_kl" in text_of(shown["result = distil(config)"])
    (curve,) = (cell for cell in shown.values() if ".plot(" in cell.source)
    assert any("image/png" in output.get("data", {}) for output in curve.outputs)
    assert "<iframe" in shown["result"].outputs[-1].data["text/html"]
    assert "model in bfloat16" in text_of(shown['folder = result.export(RUNS / "notebook-student", dtype="bfloat16")'])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "notebook-student").num_parameters() > 0
    measured = [json.loads(line) for line in (tmp_path / "runs/notebook/metrics.jsonl").read_text().splitlines()]
    kl = [record["evaluation/forward_kl"] for record in measured if record["kind"] == "evaluation"]
    assert kl[-1] < kl[0]

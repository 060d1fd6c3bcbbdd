"""The benchmarks of losses, on models that were made up: what they go through, count and find."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.cells import allowed, divergences, encodings
from benchmarks.exactness import ExactnessPlan, exactness, read_rows
from benchmarks.losses import LIGER, NAIVE, Batch, LossPlan, LossResult, Turn, losses
from configs.labels import LABELS


def test_losses_go_through_all_cells_in_turns_and_compare_within_a_round() -> None:
    notes: list[str] = []
    result = losses(LossPlan(rows=10, vocabulary=150, width=8, rounds=2, kinds=(), chunk_rows=4), note=notes.append)
    cells = {(labels.kind, term.loss) for labels in encodings() for term in divergences() if allowed(term, labels)}
    assert {side for side in result.sides if side[0] != LIGER} == cells | {(NAIVE, "forward_kl")}
    order = [(turn.kind, turn.loss) for turn in result.turns if turn.round == 0]
    assert order == [(turn.kind, turn.loss) for turn in result.turns if turn.round == 1] == list(result.sides)
    assert notes[-3:] == ["warmed up", "round 1 of 2", "round 2 of 2"]
    assert result.table().row_count == len(result.sides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_sides_from_hidden_states_compute_the_same_losses(dtype: str) -> None:
    batch = Batch.of(LossPlan(rows=10, vocabulary=150, width=8, rounds=1, kinds=("hidden",), chunk_rows=4, dtype=dtype))
    labels, tolerance = LABELS.validate("hidden"), 1e-5 if dtype == "float32" else 0.02
    columns = batch.labels(labels)
    ours = {term.loss: batch.side(labels, term, columns)().item() for term in divergences()}
    assert batch.naive().item() == pytest.approx(ours["forward_kl"], rel=tolerance)
    theirs = batch.liger(lambda text: None) if dtype == "float32" else {}  # in bfloat16 it has bfloat16 log-softmaxes
    for (_, loss), side in theirs.items():
        assert side().item() == pytest.approx(ours[loss], rel=tolerance)


def test_only_the_divergences_that_were_named_take_a_turn() -> None:
    plan = LossPlan(10, 150, 8, 1, ("topk", "hidden"), chunk_rows=4, losses=("forward_kl", "jsd"))
    sides = losses(plan, note=lambda text: None).sides
    assert {side for side in sides if side[0] != LIGER} == {
        (NAIVE, "forward_kl"),
        *((kind, loss) for kind in ("topk", "hidden") for loss in ("forward_kl", "jsd")),
    }


def test_ratios_are_medians_of_those_of_each_round() -> None:
    times = {"forward_kl": (1.0, 4.0, 2.0), "jsd": (2.0, 4.0, 2.4)}
    turns = [Turn("hidden", loss, n, cpu_s, 10 * n) for loss, own in times.items() for n, cpu_s in enumerate(own)]
    turns += [Turn(NAIVE, "forward_kl", n, 2.0, 5) for n in range(3)]
    result = LossResult(LossPlan(1, 2, 3, 3, ("hidden",)), tuple(turns))
    jsd = result.numbers()[1]
    assert jsd["to_forward_kl"] == pytest.approx(1.2)
    assert (jsd["cpu_s"], jsd["to_naive"], jsd["peak_bytes"]) == (2.4, 1.2, 20)


def _plan(tiny_teacher: Path, tiny_student: Path, folder: Path) -> ExactnessPlan:
    rows = folder / "rows.jsonl"
    said = [("user", "prompt", "How far is it?"), ("assistant", "completion", "It is seven miles by the road.")]
    row = {key: [{"role": role, "content": text}] for role, key, text in said}
    rows.write_text(f"{json.dumps(row)}\n" * 2)
    return ExactnessPlan(tiny_teacher, tiny_student, rows, num_texts=2, rows_per_text=5)


def test_rows_are_of_answers_and_the_head_gives_the_teacher_s_own_logits(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = _plan(tiny_teacher, tiny_student, tmp_path)
    rows = read_rows(plan)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_teacher), AutoModelForCausalLM.from_pretrained(tiny_teacher)
    row = json.loads(plan.rows.read_text().splitlines()[0])
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt", return_dict=False)
    with torch.no_grad():
        logits = model(ids).logits[0, -2, : len(tokenizer)]
    torch.testing.assert_close(rows.head.logits(rows.hidden[4:5])[0], logits, atol=1e-4, rtol=1e-4)
    assert rows.target_ids[4] == ids[0, -1]
    assert "seven miles" in tokenizer.decode(ids[0]), "the answer is what rows are of"


def test_exact_cells_have_no_bias_and_bounds_a_negative_one(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    found = exactness(_plan(tiny_teacher, tiny_student, tmp_path), note=lambda text: None)
    assert found["rows"] == 10
    for term in divergences():
        for labels in encodings():
            if not allowed(term, labels):
                assert term.loss not in found["cells"][labels.kind]
                continue
            cell, claim = found["cells"][labels.kind][term.loss], term.exactness_with(labels)
            if labels.kind in ("hidden", "dense"):
                assert abs(cell["value_bias"]) < 1e-3, (labels.kind, term.loss)
                assert cell["gradient_bias"] < 1e-3, (labels.kind, term.loss)
            elif claim == "lower_bound":
                assert cell["value_bias"] < 5e-3, (labels.kind, term.loss)
    assert found["cells"]["topk"]["forward_kl"]["value_bias"] < -0.01, "of 283 ids 64 are kept"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])

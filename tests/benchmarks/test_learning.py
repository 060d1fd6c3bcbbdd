"""The benchmark of what students learn: against the same steps by hand, and going on after it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning import Cell, LearningPlan, cells, interval, learning

HIDDEN = Cell({"kind": "hidden"}, {"loss": "forward_kl"})


@pytest.fixture
def plan(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> LearningPlan:
    row = {
        "prompt": [{"role": "user", "content": "How far is it?"}],
        "completion": [{"role": "assistant", "content": "It is seven miles by the road."}],
    }
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    return LearningPlan(
        teacher=tiny_teacher,
        student=tiny_student,
        train=tmp_path / "rows.jsonl",
        held_out=tmp_path / "rows.jsonl",
        steps=2,
        sequences_per_step=1,
        learning_rate=1e-2,
        warmup_steps=1,
        num_held_out=1,
        max_length=256,
        dtype="float32",
    )


def _by_hand(plan: LearningPlan) -> float:
    """Two steps of AdamW, with the schedule of a run, on the KL over the whole vocabulary, and the KL after them."""
    tokenizer = AutoTokenizer.from_pretrained(plan.teacher)
    row = json.loads(plan.train.read_text())
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)])
    teacher, student = (AutoModelForCausalLM.from_pretrained(path) for path in (plan.teacher, plan.student))

    def kl() -> torch.Tensor:
        rows = slice(len(asked) - 1, ids.shape[1] - 1)
        log_p = teacher(ids).logits[0, rows, : len(tokenizer)].detach().log_softmax(1)
        log_q = student(ids).logits[0, rows, : len(tokenizer)].log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    for module in (student.get_input_embeddings(), student.get_output_embeddings()):
        module.requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for share in (1.0, 0.1):  # of the rate: one step of warm-up, and the last of half a cosine, down to a tenth
        optimizer.param_groups[0]["lr"] = share * plan.learning_rate
        optimizer.zero_grad()
        kl().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return float(kl().detach())


def test_a_run_learns_what_the_same_steps_by_hand_do(plan: LearningPlan, tmp_path: Path) -> None:
    found = learning(plan, [0], [HIDDEN], tmp_path / "results.json", note=lambda text: None)
    assert found["cells"]["hidden, forward_kl"]["0"] == pytest.approx(_by_hand(plan), rel=1e-3)
    assert found["cells"]["hidden, forward_kl"]["0"] < 0.9 * found["before"]


def test_in_bfloat16_it_learns_about_the_same(plan: LearningPlan, tmp_path: Path) -> None:
    found = learning(replace(plan, dtype="bfloat16"), [0], cells()[6:7], tmp_path / "out.json", note=print)
    exact = _by_hand(plan)
    assert 0 < abs(found["cells"]["hidden, forward_kl"]["0"] - exact) < 0.02 * exact


def test_it_goes_on_where_it_was_and_keeps_to_its_plan(plan: LearningPlan, tmp_path: Path) -> None:
    out, notes = tmp_path / "results.json", []
    every = cells()
    assert len({cell.name for cell in every}) == len(every) == 14
    learning(plan, [0], every[:2], out, note=notes.append)
    first = json.loads(out.read_text())["cells"]
    found = learning(plan, [0, 1], every, out, note=notes.append)
    assert notes[2].startswith("1 of 26: ")
    assert {name: values["0"] for name, values in first.items()} == {n: found["cells"][n]["0"] for n in first}
    assert all(len(values) == 2 for values in found["cells"].values())
    drawn = found["cells"]["sampled, forward_kl"]
    assert drawn["0"] != drawn["1"], "a seed decides what is drawn"
    with pytest.raises(ValueError, match="another plan"):
        learning(LearningPlan(**{**_settings(plan), "steps": 3}), [0], every, out, note=notes.append)


def _settings(plan: LearningPlan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_intervals_are_those_of_student() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(2.484, abs=2e-3))
    assert interval([1.0])[1] == float("inf")

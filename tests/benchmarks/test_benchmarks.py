"""The benchmarks' own arithmetic: what is counted, on which text, against which recipe, and how it is summed up."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import torch
from label_oracle import random_unit
from student_runs import write_run
from tiny_models import tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm_process import engine_plan

from benchmarks import cpu_time, store, store_worker
from benchmarks.cpu_time import CpuTime
from benchmarks.distil_result import DistilResult
from benchmarks.draft import ALONE, BEFORE, STUDENT, DraftPlan, DraftResult, draft, students_of
from benchmarks.draft_worker import Drafted
from benchmarks.floor import Floor, FloorSetup, Shapes
from benchmarks.floor import prepare as prepare_floor
from benchmarks.pipeline import PARTS, Segment
from benchmarks.plain import PlainSetup, PlainSteps, Text, prepare
from benchmarks.scoring import Batch
from benchmarks.scoring_result import PREFILL, Measured, ScoringResult
from benchmarks.scoring_worker import Cost
from benchmarks.worker import Worker
from benchmarks.workload import Workload, make_run, make_student, same_sequences, write_rows
from cluster.engines.hf import Engine as HfEngine
from configs.labels import Hidden, TopK
from configs.models import ModelSource
from trainer.data.vocabulary import load_tokenizer
from trainer.errors import ConfigError, DeadlineExceeded, InfrastructureError

SUPPORT = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "support")}


def test_a_tree_is_counted_with_its_children_and_without_what_is_left_out() -> None:
    script = "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); c.wait()"
    burn = "import time\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True); time.sleep(60)"
    root = subprocess.Popen([sys.executable, "-c", script, burn], stdout=subprocess.PIPE, text=True)
    try:
        assert root.stdout is not None
        assert root.stdout.readline() == "done\n"
        (child,) = psutil.Process(root.pid).children()
        with_child = cpu_time.of_trees([root.pid]).total_s
        assert with_child >= 0.55
        assert cpu_time.of_trees([root.pid], without=[child.pid]).total_s <= with_child - 0.5
        assert cpu_time.of_trees([root.pid, child.pid]).total_s == pytest.approx(with_child, abs=0.05)
        child.kill()
        root.wait(10)
    finally:
        root.kill()
    assert cpu_time.of_trees([root.pid]) == CpuTime()


def test_this_process_counts_all_its_threads() -> None:
    before, began = cpu_time.of_this_process(), time.process_time()
    while time.process_time() - began < 0.2:
        pass
    assert (cpu_time.of_this_process() - before).total_s == pytest.approx(0.2, abs=0.1)


async def ask_calculator(log: Path, *questions: object, timeout_s: float = 60) -> list[object]:
    worker = await Worker.start("fakes.calculator", 40, environment={**SUPPORT, "MARK": "set"}, log=log)
    try:
        return [await worker.ask(question, timeout_s=timeout_s) for question in questions]
    finally:
        await worker.close()


def test_a_worker_answers_in_turn_with_its_own_environment_and_prints_to_its_log(tmp_path: Path) -> None:
    assert asyncio.run(ask_calculator(tmp_path / "log", 2, "MARK", 3)) == [42, "set", 43]
    assert "MARK" not in os.environ
    assert "asked for 2" in (tmp_path / "log").read_text()


def test_a_worker_that_dies_or_is_silent_says_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"log: .*/log"):
        asyncio.run(ask_calculator(tmp_path / "log", 2, None))
    with pytest.raises(DeadlineExceeded, match=r"its log is .*/log"):
        asyncio.run(ask_calculator(tmp_path / "log", 2, timeout_s=0.0))


def test_the_text_has_the_asked_lengths_and_two_thirds_of_it_count(tiny_teacher: Path, tmp_path: Path) -> None:
    workload = Workload(sequences_per_step=5, min_tokens=60, max_tokens=90)
    student, rows = tmp_path / "student", tmp_path / "rows.jsonl"
    make_student(tiny_teacher, student, seed=0)
    write_rows(rows, load_tokenizer(ModelSource(path=str(tiny_teacher))), workload, count=20)
    run = make_run(tiny_teacher, student, rows, tmp_path / "run", workload, labels="hidden", steps=4)
    sequences = same_sequences(run)
    assert len(sequences) == 20
    lengths = [sequence.num_tokens for sequence in sequences]
    # A window begins and ends at the next space: off by a word, which may be 15 tokens of the tiny tokenizer.
    assert 45 <= min(lengths) < 65 < median(lengths) < 85 < max(lengths) <= 105
    share = sum(sequence.num_loss_tokens for sequence in sequences) / sum(lengths)
    assert share == pytest.approx(2 / 3, abs=0.03)
    assert not (tmp_path / "run").exists()
    config = AutoModelForCausalLM.from_pretrained(student).config
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (384, 6, True)


def test_the_plain_recipe_minimises_the_full_forward_kl_whatever_the_padding(tmp_path: Path) -> None:
    teacher, student = tiny_folder(tmp_path / "t", seed=1), tiny_folder(tmp_path / "s", seed=2, num_hidden_layers=1)
    draw = np.random.default_rng(0)
    texts = []
    for length in (9, 17, 30):
        mask = np.arange(length) >= length // 3
        mask[-1] = False
        texts.append(Text(draw.integers(3, 280, length).astype(np.int32), mask))
    train = prepare(PlainSetup(teacher, student, "float32", "cpu", 1e-3))
    answer = train(PlainSteps((tuple(texts),) * 3, threads=1))
    assert answer.losses[0] == pytest.approx(brute_force_kl(teacher, student, texts), rel=1e-4)
    assert answer.losses[2] < answer.losses[0]
    assert answer.cpu.total_s > 0


def brute_force_kl(teacher: Path, student: Path, texts: list[Text]) -> float:
    models = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in (teacher, student)]
    total, rows = 0.0, 0
    for text in texts:
        ids = torch.from_numpy(text.token_ids).long()[None]
        with torch.no_grad():
            p, q = (model(ids).logits[0][text.loss_mask].log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
        rows += int(text.loss_mask.sum())
    return total / rows


def segment(side: str, number: int, *cpu_s: float, tokens: int = 1000) -> Segment:
    names = PARTS if len(cpu_s) == 4 else ("process",)
    cpu = {name: CpuTime(seconds * 0.75, seconds * 0.25) for name, seconds in zip(names, cpu_s, strict=True)}
    return Segment(side, number, cpu, steps=2, tokens=tokens, loss_tokens=tokens // 2, wall_s=1.0, loss=1.0)


def test_ratios_are_taken_within_a_round_before_the_median() -> None:
    # In the second round everything was three times as slow: a machine that drifts changes no ratio.
    segments = [
        *(segment("topk", 0, 1.0, 2.0, 0.5, 0.5), segment("plain", 0, 8.0)),
        *(segment("topk", 1, 3.0, 6.0, 1.5, 1.5), segment("plain", 1, 24.0)),
        *(segment("topk", 2, 1.0, 2.0, 0.5, 1.3, tokens=1200), segment("plain", 2, 9.6, tokens=1200)),
    ]
    floor = Floor(0.5e-3, 0.4e-3, 0.2e-3, 0.4e-3, 0.1e-3, 0.2e-3, optimizer=0.05)
    result = DistilResult(tuple(segments), floors=(floor,) * 3, plain_threads={"plain": 1}, reasons=())
    assert result.floors_ms("topk", "teacher")[0] == pytest.approx(0.5 + 0.4 / 2)
    assert result.floors_ms("topk", "student")[0] == pytest.approx(0.6 + 0.3 / 2 + 2 * 50 / 1000)
    assert result.floors_ms("plain")[0] == pytest.approx(0.5 + 0.6 + (0.3 + 0.4) / 2 + 0.1), "as hidden, role by role"
    assert result.multiples("topk", "teacher")[0] == pytest.approx(1.0 / 0.7)
    assert result.multiples("topk")[0] == pytest.approx(4 / (0.7 + 0.85))
    more = floor.student_s("given_ids", tokens=10, rows=5, steps=1) - floor.student_s(
        "topk", tokens=10, rows=5, steps=1
    )
    assert more == pytest.approx(10 * 0.2e-3 + 5 * 0.1e-3), "the pass that chooses the ids"
    assert result.per_token_ms("topk") == pytest.approx([4, 12, 4])
    assert result.per_token_ms("topk", "student") == pytest.approx([2, 6, 2 / 1.2])
    assert result.per_loss_token_ms("plain") == pytest.approx([16, 48, 16])
    assert result.ratios("topk", "plain") == pytest.approx([0.5, 0.5, 0.5])
    assert result.system_share("topk") == pytest.approx(0.25)
    summary = result.to_json()["summary"]
    assert summary["topk"]["ratio_to"]["plain"]["median"] == pytest.approx(0.5)
    assert set(summary["topk"]["parts_cpu_ms_per_token"]) == set(PARTS)
    assert result.table().row_count == 2


def test_the_floor_is_measured_at_the_shapes_of_both_models(tiny_teacher: Path) -> None:
    shapes = Shapes.of(tiny_teacher)
    config = AutoConfig.from_pretrained(tiny_teacher)
    assert shapes.head == (config.vocab_size, config.hidden_size)
    assert sum(count for _, _, count in shapes.layers) == 7 * config.num_hidden_layers
    floor = prepare_floor(FloorSetup(shapes, shapes, "float32", tokens=64, chunk_rows=32))(None)
    assert all(part > 0 for part in dataclasses.astuple(floor))
    assert floor.teacher_s("topk", tokens=10, rows=5) > floor.teacher_s("hidden", tokens=10, rows=5)
    alone = prepare_floor(FloorSetup(shapes, None, "float32", tokens=64, chunk_rows=32))(None)
    assert alone.teacher_body > 0
    assert alone.student_forward == 0


def test_scoring_is_a_ratio_to_the_bare_prefill_per_token() -> None:
    measured = []
    for number, pace in enumerate((1.0, 2.0, 1.5)):
        measured.append(Measured(PREFILL, "4x8", number, 32, 0, Cost(CpuTime(pace, 0), 1.0, 0)))
        measured.append(Measured("labels", "4x8", number, 32, 16, Cost(CpuTime(pace, 0.5 * pace), 1.0, 32 * 390)))
        measured.append(Measured("stock", "4x8", number, 8, 0, Cost(CpuTime(pace, 0), 1.0, 0)))
    floors = [Floor(pace / 64, pace / 80, 0, 0, 0, 0, 0) for pace in (1.0, 2.0, 1.5)]
    result = ScoringResult(tuple(measured), tuple(floors), reasons=())
    assert result.ratios("labels", "4x8") == pytest.approx([1.5, 1.5, 1.5])
    assert result.ratios("stock", "4x8") == pytest.approx([4, 4, 4])
    assert result.least_ratios("labels", "4x8") == pytest.approx([1.2, 1.2, 1.2])  # 16 rows of 1/80 over 1
    assert result.least_ratios(PREFILL, "4x8") == [1, 1, 1]
    assert result.multiples("labels", "4x8") == pytest.approx([1.5 / 0.7] * 3)  # 32 tokens of 1/64, 16 rows of 1/80
    assert result.bytes_per_token("labels", "4x8") == 390
    assert result.table().row_count == 3


@pytest.mark.parametrize("text", ["", "32", "32*256", "0x256", "4x2", "ax9"])
def test_a_batch_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="32x256"):
        Batch.parse(text)


def drafted(calls: int, accepted_at: tuple[int, ...], *answers: tuple[int, ...]) -> Drafted:
    return Drafted(answers, CpuTime(1.0, 0.0), 1.0, calls, calls * len(accepted_at), sum(accepted_at), accepted_at)


def test_acceptance_counts_what_was_drafted_and_a_call_gives_one_token_more() -> None:
    sides = {ALONE: drafted(0, (), (1, 2, 3), (4,)), STUDENT: drafted(10, (6, 3), (1, 2, 3), (5,))}
    result = DraftResult(sides, num_prompts=2, num_draft_tokens=2)
    numbers = result.to_json()["sides"]
    assert numbers[STUDENT]["acceptance"] == 9 / 20
    assert numbers[STUDENT]["tokens_per_call"] == 1.9
    assert numbers[STUDENT]["same_text"] == 1
    assert (numbers[ALONE]["acceptance"], numbers[ALONE]["tokens_per_call"], numbers[ALONE]["tokens"]) == (0, 1, 4)
    assert "answers" not in numbers[STUDENT]


def test_a_draft_model_is_a_folder_or_the_student_of_a_run_beside_what_it_was(tmp_path: Path) -> None:
    assert students_of(tmp_path / "model") == {STUDENT: tmp_path / "model"}
    before = tiny_folder(tmp_path / "before")
    folder = write_run(tmp_path / "run", before)
    with pytest.raises(ConfigError, match="holds no whole student: let it end"):
        students_of(folder.path)
    folder.student.mkdir()
    (folder.student / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--merge-adapter, and name my-student"):
        students_of(folder.path)
    (folder.student / "config.json").write_text("{}")
    assert students_of(folder.path) == {BEFORE: before, STUDENT: folder.student}


def test_a_draft_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher, student = tiny_folder(tmp_path / "teacher"), tiny_folder(tmp_path / "student")
    other = AutoTokenizer.from_pretrained(student)
    other.add_tokens(["<|mine|>"])
    other.save_pretrained(student)
    plan = DraftPlan(student, teacher, tmp_path / "rows.jsonl", 1, 1, 1)
    with pytest.raises(ConfigError, match=r"student: the tokenizer of .* is not that of"):
        draft(plan, tmp_path, note=pytest.fail)


def test_labels_that_are_read_from_the_store_are_those_that_were_scored_and_cost_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_worker, "Engine", HfEngine)
    take = store_worker.prepare(engine_plan(HfEngine(), tiny_folder(tmp_path / "llama")))
    unit = random_unit("0", *[(200, [(0, 199)])] * 8)
    measured = []
    for labels in store.ENCODINGS:
        encoding = TopK(k=8) if labels == "top-64" else Hidden()
        for way in store_worker.WAYS:
            cost = take(store_worker.Turn(way, unit, encoding, str(tmp_path / labels)))
            measured.append(store.Measured(labels, way, unit.num_tokens, cost))
    result = store.StoreResult(tuple(measured))
    for row in result.to_json()["summary"]:
        kept = row["way"] != store.SCORED
        assert (row["disk_bytes_per_token"] >= row["label_bytes_per_token"] > 0) == kept
    assert result.table().row_count == len(measured)

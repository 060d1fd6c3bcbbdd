"""Student ranks over real DeepSpeed and gloo: two processes, and one, against the same steps worked out by hand."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rank_processes import run_cases
from safetensors.torch import load_file
from student_world import (
    STEPS_OF_TASKS,
    VOCABULARY_SIZE,
    ByHand,
    make_models,
    make_run,
    make_run_of_tasks,
    sequences_of,
    train_by_hand,
    train_on_tasks_by_hand,
)
from transformers import AutoModelForCausalLM

from trainer.loop.manifest import TrainingState, read_manifest, write_manifest
from trainer.types import Cursor, Evaluation

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]  # the first test waits for all cases of both groups

LOOKS = [("llama", 2), ("gemma2", 2), ("untied", 3), ("llama", 3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def pair(world: Path) -> list[dict[str, Any]]:
    return run_cases("student_cases", world=2, folder=world / "two", timeout_s=500)


@pytest.fixture(scope="module")
def single(world: Path) -> dict[str, Any]:
    return run_cases("student_cases", world=1, folder=world / "one", timeout_s=300)[0]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _same_weights(first: Path, second: Path) -> bool:
    a, b = _weights(first), _weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _load(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config._attn_implementation = "eager"
    return model.eval()


def test_ranks_micro_batches_and_stages_all_train_what_one_process_works_out_by_hand(
    world: Path, pair: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    runs = {**{(2, *key): value for key, value in pair[0]["steps"].items()}}
    runs |= {(1, *key): value for key, value in single["steps"].items()}
    assert len(runs) == 8
    rates = [m["train/learning_rate"] for m in single["steps"][2, 4096][0]]
    weights, records = train_by_hand(make_run(world), 4, rates)
    for key, (metrics, folder) in runs.items():
        for ours, theirs in zip(metrics, records, strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-4), key
            assert ours["train/skipped"] == 0
        exported = _weights(folder)
        assert exported.keys() == weights.keys(), "a tied head is written once, as the embedding"
        for name, weight in weights.items():
            torch.testing.assert_close(exported[name].double(), weight, rtol=1e-3, atol=2e-5, msg=f"{key} {name}")
    several = pair[0]["steps"][2, 48][0]
    assert several[0]["train/micro_batches"] > 2
    assert several[2]["train/micro_batches"] == 1, "one rank trains an empty micro-batch here"


def test_ids_are_the_students_likeliest_and_steps_on_them_are_the_same_however_they_are_split_and_resumed(
    world: Path, pair: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    model = _load(world / "llama")
    ranks = [single["given_ids"], *(rank["given_ids"] for rank in pair)]
    for found in (case for rank in ranks for case in rank.values()):
        assert found["resumed"] == found["once"][2:]
        assert all(found["same"])
        assert found["once"] == [pytest.approx(m, rel=2e-4) for m in _comparable(ranks[0][2, 4096]["once"], found)]
    chosen = [entry for rank in ranks for case in rank.values() for step in (1, 2) for entry in case["first"][step]]
    for unit, given in chosen:
        rows = [row for s in unit.sequences for row in _likeliest(model, s.token_ids, np.flatnonzero(s.loss_mask), 6)]
        assert given.ids.tolist() == rows
        assert np.roll(given.ids, 1, axis=0).tolist() != rows or len(rows) < 2
    assert {len(case) for rank in ranks for case in rank.values()} == {4}


def _comparable(metrics: list[dict[str, float]], found: dict[str, Any]) -> list[dict[str, float]]:
    """But for the number of micro-batches, which splitting changes."""
    name = "train/micro_batches"
    return [{**ours, name: theirs[name]} for ours, theirs in zip(metrics, found["once"], strict=True)]


def _likeliest(model: torch.nn.Module, token_ids: np.ndarray, rows: np.ndarray, k: int) -> list[list[int]]:
    """Of each row the target id and the k likeliest others, by transformers."""
    ids = torch.from_numpy(token_ids.astype(np.int64))
    with torch.no_grad():
        ordered = model(input_ids=ids[None]).logits[0, :, :VOCABULARY_SIZE].argsort(dim=-1, descending=True)
    targets = [int(ids[row + 1]) for row in rows]
    return [[t, *[i for i in ordered[row].tolist() if i != t][:k]] for row, t in zip(rows, targets, strict=True)]


def test_training_moved_the_weights_and_both_ranks_tell_the_same_numbers(
    world: Path, pair: list[dict[str, Any]]
) -> None:
    before, after = _weights(world / "llama"), _weights(pair[0]["steps"][2, 4096][1])
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-2
    for key, (metrics, _) in pair[0]["steps"].items():
        assert metrics == pair[1]["steps"][key][0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", STEPS_OF_TASKS)
def test_compared_answers_and_weighted_rows_train_what_is_worked_out_by_hand(
    world: Path, pair: list[dict[str, Any]], single: dict[str, Any], name: str, world_size: int
) -> None:
    """dpo and row-weighted cross_entropy, at every stage and with activation checkpointing. Of a float32 student
    against float64: values to 2e-4 of themselves, weights after the step to 1e-3 of themselves or 2e-5."""
    runs = single["tasks"] if world_size == 1 else pair[0]["tasks"]
    number = list(STEPS_OF_TASKS).index(name)
    cases = {key: run for key, run in runs.items() if key != "moved"}
    assert {stage for stage, _ in cases} == {1, 2, 3}
    assert sum(checkpointing for _, checkpointing in cases) == 1
    expected = by_hand(world, world_size, _rates(single))[number]
    for key, steps in cases.items():
        metrics, folder = steps[number]
        assert metrics["train/micro_batches"] == STEPS_OF_TASKS[name][0]
        assert {one: metrics[one] for one in expected.values} == pytest.approx(expected.values, rel=2e-4), key
        _assert_trained(_weights(folder), expected, key)


def _assert_trained(weights: dict[str, torch.Tensor], expected: ByHand, key: Any) -> None:
    for name, exact in expected.weights.items():
        torch.testing.assert_close(weights[name].double(), exact, rtol=1e-3, atol=2e-5, msg=f"{key} {name}")


@functools.cache
def by_hand(world: Path, world_size: int, rates: tuple[float, ...]) -> list[ByHand]:
    return train_on_tasks_by_hand(make_run_of_tasks(world), list(rates), world=world_size)


def _rates(single: dict[str, Any]) -> tuple[float, ...]:
    return tuple(metrics["train/learning_rate"] for metrics, _ in single["tasks"][2, False])


def test_another_reference_order_or_weight_would_be_seen(world: Path, single: dict[str, Any]) -> None:
    exact, dpo, cross_entropy = by_hand(world, 1, _rates(single))[0], "task/pairs/dpo", "task/plain/cross_entropy"
    assert single["tasks"]["moved"][0][dpo] != pytest.approx(exact.values[dpo], rel=1e-2)
    for control, value in ({"swapped": True}, dpo), ({"weighted": False}, cross_entropy):
        (other,) = train_on_tasks_by_hand(make_run_of_tasks(world), [_rates(single)[0]], world=1, **control)
        assert other.values[value] != pytest.approx(exact.values[value], rel=1e-2)
        with pytest.raises(AssertionError):
            _assert_trained(other.weights, exact, control)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "lora", "lora3", "frozen", "frozen3"])
def test_four_steps_a_checkpoint_and_four_are_bit_equal_to_eight(pair: list[dict[str, Any]], name: str) -> None:
    case = pair[0]["resume"][name]
    assert case["step"] == 4
    assert case["resumed"] == case["once"][4:]
    assert _same_weights(*case["exports"])
    assert case["once"][-1]["train/loss"] < case["once"][0]["train/loss"]


@pytest.mark.parametrize("name", ["frozen", "frozen3"])
def test_frozen_weights_are_exported_as_they_came(world: Path, pair: list[dict[str, Any]], name: str) -> None:
    before, after = _weights(world / "llama"), _weights(pair[0]["resume"][name]["exports"][0])
    same = {key for key, weight in after.items() if torch.equal(weight, before[key])}
    assert same == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "lora", "lora3", "frozen", "frozen3"])
def test_what_two_ranks_write_is_a_checkpoint_of_two_ranks_and_not_of_three(
    pair: list[dict[str, Any]], name: str
) -> None:
    folder = pair[0]["resume"][name]["folder"]
    state = TrainingState(4, Cursor(0, 16, 0), config_hash="", world=3, non_finite_steps=0)
    with pytest.raises(OSError, match=r"the ranks wrote no rank_2\.pt"):
        write_manifest(folder, state)
    write_manifest(folder, replace(state, world=2))
    assert read_manifest(folder).state == replace(state, world=2)


def test_a_checkpoint_of_another_number_of_ranks_says_what_to_set(single: dict[str, Any]) -> None:
    assert "was written by 2 ranks, this run has 1: set student.ranks: 2" in single["other_world"]


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    pair: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    groups = [("two", s, [rank["not_finite"][s] for rank in pair]) for s in (1, 2, 3)]
    groups.append(("one", 2, [single["not_finite"][2]]))
    for group, stage, ranks in groups:
        for metrics, exports in ranks:
            assert [m["train/skipped"] for m in metrics] == [0, 1, 1, 0], (group, stage)
            assert [math.isfinite(m["train/loss"]) for m in metrics] == [True, False, False, True]
            assert not math.isfinite(metrics[1]["train/grad_norm"])
            assert _same_weights(exports[0], exports[1])
            assert _same_weights(exports[0], exports[2])
            assert not _same_weights(exports[0], exports[3])
            assert all(weight.isfinite().all() for weight in _weights(exports[3]).values())


def test_a_step_staged_twice_is_trained_once(single: dict[str, Any]) -> None:
    once = single["steps"][2, 4096][0]
    for twice, expected in zip(single["staging_twice"], once, strict=False):
        assert twice["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-6)


def _brute_force(
    model: torch.nn.Module, world: Path, names: dict[str, np.ndarray]
) -> tuple[float, float, float, float]:
    """Forward KL, agreement, perplexity and mass beyond the vocabulary of the held-out rows in float64; student
    log-probabilities go to `names`."""
    teacher = _load(world / "teacher").double()
    model = model.double()
    kl, agree, logprobs, padding = [], [], [], []
    for sequence in sequences_of(100):
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
        rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
        with torch.no_grad():
            p, q_of_all_rows = (m(input_ids=ids[None]).logits[0, rows] for m in (teacher, model))
        p, q = (logits[:, :VOCABULARY_SIZE].softmax(-1) for logits in (p, q_of_all_rows))
        padding.append(q_of_all_rows.softmax(-1)[:, VOCABULARY_SIZE:].sum(-1))
        kl.append((p * (p / q).log()).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        logprobs.append(q.gather(-1, ids[rows + 1][:, None])[:, 0].log())
        names[sequence.id] = logprobs[-1].numpy()
    perplexity = float(torch.cat(logprobs).mean().neg().exp())
    return (
        float(torch.cat(kl).mean()),
        float(torch.cat(agree).double().mean()),
        perplexity,
        float(torch.cat(padding).mean()),
    )


def _check_evaluation(evaluation: Evaluation, model: torch.nn.Module, world: Path) -> None:
    logprobs: dict[str, np.ndarray] = {}
    kl, agreement, perplexity, padding_mass = _brute_force(model, world, logprobs)
    assert evaluation.forward_kl == pytest.approx(kl, rel=1e-4)
    assert evaluation.agreement == pytest.approx(agreement, abs=1e-9)
    assert evaluation.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert evaluation.padding_mass == pytest.approx(padding_mass, rel=1e-4)
    assert [sample.id for sample in evaluation.samples] == ["100:0", "100:2", "100:3"]
    for sample in evaluation.samples:
        np.testing.assert_allclose(sample.student_logprob, logprobs[sample.id], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("look", LOOKS)
def test_evaluation_and_export_equal_brute_force_before_and_after_training(
    world: Path, pair: list[dict[str, Any]], single: dict[str, Any], look: tuple[str, int]
) -> None:
    found = pair[0]["look"][look]
    _check_evaluation(found["evaluation"], _load(world / look[0]), world)
    _check_evaluation(found["after"], _load(found["export"]), world)
    assert found["after"].forward_kl < found["evaluation"].forward_kl
    assert found["after"].padding_mass < found["evaluation"].padding_mass
    other = pair[1]["look"][look]["evaluation"]
    assert (other.forward_kl, other.agreement) == (found["evaluation"].forward_kl, found["evaluation"].agreement)
    assert other.samples == ()
    if look in single["look"]:
        assert single["look"][look]["evaluation"].forward_kl == pytest.approx(found["evaluation"].forward_kl, rel=1e-5)


@pytest.mark.parametrize("look", LOOKS)
def test_an_evaluation_shows_the_labels_of_the_step_before_it_beside_the_student_after_it(
    world: Path, pair: list[dict[str, Any]], look: tuple[str, int]
) -> None:
    found = pair[0]["look"][look]
    student, teacher = _load(found["export"]), _load(world / "teacher")
    assert found["evaluation"].trained == ()
    assert pair[1]["look"][look]["after"].trained == ()
    sequences = {sequence.id: sequence for sequence in sequences_of(2)}
    shown = found["after"].trained
    assert 1 < len(shown) == len({one.id for one in shown})
    for one in shown:
        ids = torch.from_numpy(sequences[one.id].token_ids.astype(np.int64))
        assert (one.step, one.labels, one.rows.tolist()) == (
            2,
            "topk",
            np.flatnonzero(sequences[one.id].loss_mask).tolist(),
        )
        with torch.no_grad():
            p, q = (
                m(input_ids=ids[None]).logits[0, one.rows, :VOCABULARY_SIZE].softmax(-1).numpy()
                for m in (teacher, student)
            )
        rows, places = np.nonzero(one.label.ids >= 0)
        kept = one.label.ids[rows, places]
        np.testing.assert_allclose(np.exp(one.label.teacher[rows, places]), p[rows, kept], rtol=5e-3)
        np.testing.assert_allclose(np.exp(one.label.student[rows, places]), q[rows, kept], rtol=1e-3)
    of_other_ranks = [one.id for one in found["resumed"]]
    assert of_other_ranks
    assert set(of_other_ranks) < {one.id for one in shown}


@pytest.mark.parametrize("look", LOOKS)
def test_generation_equals_that_of_transformers(world: Path, pair: list[dict[str, Any]], look: tuple[str, int]) -> None:
    model = _load(world / look[0])
    for sequence, ours in zip(sequences_of(7), pair[0]["look"][look]["generated"], strict=False):
        ids, answer = torch.from_numpy(sequence.token_ids.astype(np.int64))[None], []
        with torch.no_grad():
            while len(answer) < 70 and (not answer or answer[-1] != 2):
                following = int(model(input_ids=ids, use_cache=False).logits[0, -1, :VOCABULARY_SIZE].argmax())
                answer.append(following)
                ids = torch.cat([ids, torch.tensor([[following]])], 1)
        assert ours.tolist() == answer
        assert ours.dtype == np.int32
    generated = [rank["look"][look]["generated"] for rank in pair]
    assert all(np.array_equal(a, b) for a, b in zip(*generated, strict=True))


@pytest.mark.parametrize("look", LOOKS)
def test_self_tests_pass_on_a_sound_machine(pair: list[dict[str, Any]], look: tuple[str, int]) -> None:
    results = pair[0]["look"][look]["self_test"]
    assert results == pair[1]["look"][look]["self_test"]
    assert [result.name for result in results] == ["packing (sdpa)", "student logits", "loss kernel", "all-reduce"]
    assert all(result.passed for result in results), results


def test_what_was_built_is_told(world: Path, pair: list[dict[str, Any]]) -> None:
    total = sum(weight.numel() for weight in _weights(world / "llama").values())
    for stage in (2, 3):
        info = pair[0]["look"]["llama", stage]["info"]
        assert (info.parameters, info.trainable_parameters) == (total, total)
        assert (info.dtype, info.attention, info.zero_stage) == ("float32", "sdpa", stage)


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_export_alone_and_merged_as_what_they_were_in_training(
    world: Path, pair: list[dict[str, Any]], single: dict[str, Any], world_size: int
) -> None:
    case = single["adapters"] if world_size == 1 else pair[0]["adapters"]
    adapted = PeftModel.from_pretrained(_load(world / "llama"), case["adapter"])
    before = _load(world / "llama")
    for model in (adapted, _load(case["merged"])):
        _check_evaluation(case["evaluation"], model, world)
    with pytest.raises(AssertionError):
        _check_evaluation(case["evaluation"], before, world)
    assert not (case["adapter"] / "model.safetensors").exists()


def test_frozen_weights_are_neither_in_a_checkpoint_nor_in_the_optimizer(single: dict[str, Any]) -> None:
    shards = single["adapters"]["checkpoint"] / "zero"
    module = torch.load(shards / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert module
    assert all("lora_" in name for name in module)
    (optimizer,) = shards.glob("*optim_states.pt")
    state = torch.load(optimizer, weights_only=False)["optimizer_state_dict"]
    trained = sum(weight.numel() for weight in module.values())
    held = sum(partition.numel() for partition in state["single_partition_of_fp32_groups"])
    assert trained <= held <= trained + 64, "padding only"


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("bfloat16-1", 2e-2),
        ("bfloat16-2", 2e-2),
        ("bfloat16-3", 2e-2),
        ("checkpointing", 1e-5),
        ("offload", 1e-5),
        ("offload-all", 1e-5),
    ],
)
def test_precision_offload_and_activation_checkpointing_train_the_same(
    pair: list[dict[str, Any]], name: str, tolerance: float
) -> None:
    expected = [m["train/loss"] for m in pair[0]["steps"][2, 48][0]]
    assert [m["train/loss"] for m in pair[0]["variants"][name]] == pytest.approx(expected, rel=tolerance)


def test_at_stage_three_no_rank_holds_the_student_whole_while_it_loads(world: Path, pair: list[dict[str, Any]]) -> None:
    size = (world / "large" / "model.safetensors").stat().st_size
    for rank in pair:
        peaks = rank["loading_memory"]
        assert peaks["sharded"] < 0.7 * size, peaks
        assert peaks["whole"] > 0.9 * size, "the measure sees a whole student"


def test_float32_weights_are_their_own_master_weights_and_a_checkpoint_holds_each_once(
    pair: list[dict[str, Any]],
) -> None:
    for rank in pair:
        case = rank["master_weights"]
        assert (case["float32"], case["bfloat16"]) == (False, True)
        assert case["bytes"] < 3.5 * 4 * case["elements"], "master weights and two moments, each once"


def test_a_rank_that_hangs_ends_the_others_step_at_the_collective_timeout(pair: list[dict[str, Any]]) -> None:
    words, waited_s = pair[0]["the_last_one_a_rank_that_hangs"]
    assert "8000ms" in words
    assert 7.5 < waited_s < 40

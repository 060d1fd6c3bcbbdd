"""What student ranks do in tests of `tests/trainer/model/test_student.py`: each case runs on every rank of a group.

Results are compared with what one process works out by hand, with one another, and between a group of two and of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fakes.poisoned_labels import MARKS
from rank_processes import Place
from student_world import (
    HOST,
    LONELY_STEP,
    STEPS_OF_TASKS,
    VOCABULARY_SIZE,
    Teacher,
    batch_of,
    build,
    build_with_info,
    labels_of,
    make_plan,
    make_run,
    make_run_of_tasks,
    sequences_of,
    stage,
    train,
    train_on_given_ids,
    train_on_tasks,
)

from configs.labels import Hidden
from configs.schema import Run
from trainer.errors import ConfigError
from trainer.model.load import load_student
from trainer.model.student import StudentRank
from trainer.model.zero import sharded_loading, start_processes
from trainer.types import Unit

STAGES = (1, 2, 3)
LORA = {"rank": 4, "dropout": 0.2}
HELD_OUT = {"evaluation": {"path": "unused.jsonl"}}
SMALL_BUDGET = 48  # tokens: about four micro-batches
FORWARD = [{"loss": "forward_kl"}, {"loss": "cross_entropy", "weight": 0.25}]
WEIGHTS = ["difficulty", {"kind": "position", "half_life": 8}]
SCHEDULED = [
    *FORWARD,
    {"loss": "taid", "weight": 0.1},
    {"loss": "atkd", "weight": 0.1, "token_weights": WEIGHTS},
]


def _run(place: Place, **student: Any) -> Run:
    return make_run(place.folder.parent, student={**student})


def _export(rank: StudentRank, place: Place, name: str, **options: Any) -> Path:
    folder = place.folder / "exports" / name
    rank.export(folder, **options)
    return folder


def _checkpoint(place: Place, name: str) -> Path:
    folder = place.folder / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def case_steps(place: Place) -> dict[str, Any]:
    """Four steps at each stage, in one micro-batch and in several; on one rank only stage 2."""
    found = {}
    for zero_stage in STAGES if place.world == 2 else (2,):
        for budget in (4096, SMALL_BUDGET):
            run = _run(place, zero_stage=zero_stage)
            rank = build(run, place)
            metrics = train(rank, run, place, last=4, token_budget=budget)
            folder = _export(rank, place, f"stage{zero_stage}-{budget}")
            rank.close()
            found[zero_stage, budget] = (metrics, folder)
    return found


def case_tasks(place: Place) -> dict[Any, Any]:
    """A step of each packing and accumulation, of two tasks, at each stage and with activation checkpointing: metrics
    and the weights after each; and a control whose reference is moved."""
    found: dict[Any, Any] = {}
    for zero_stage, checkpointing in ((1, False), (2, False), (3, False), (1 if place.world == 1 else 3, True)):
        student = {"zero_stage": zero_stage, "activation_checkpointing": checkpointing}
        rank = build(make_run_of_tasks(place.folder.parent, **student), place)
        name = f"tasks{zero_stage}-{checkpointing}"
        found[zero_stage, checkpointing] = [
            (metrics, _export(rank, place, f"{name}-{number}"))
            for number, metrics in enumerate(train_on_tasks(rank, place, STEPS_OF_TASKS))
        ]
        rank.close()
    if place.world == 1:
        rank = build(make_run_of_tasks(place.folder.parent), place)
        found["moved"] = list(train_on_tasks(rank, place, ["packed x 1"], change=_moved))
        rank.close()
    return found


def _moved(unit: Unit) -> Unit:
    """The same rows, each about the token after its own."""
    moved = [dataclasses.replace(s, token_ids=np.roll(s.token_ids, -1)) for s in unit.sequences]
    return dataclasses.replace(unit, sequences=tuple(moved))


def case_resume(place: Place) -> dict[str, Any]:
    """Eight steps at once, and four, a checkpoint, a new rank, four."""
    if place.world == 1:
        return {}
    found = {}
    for name, student in (
        ("stage1", {"zero_stage": 1}),
        ("stage2", {"zero_stage": 2}),
        ("stage3", {"zero_stage": 3}),
        ("lora", {"zero_stage": 2, "lora": LORA}),
        ("lora3", {"zero_stage": 3, "lora": LORA}),
        ("frozen", {"zero_stage": 2, "freeze": ["embeddings"]}),
        ("frozen3", {"zero_stage": 3, "freeze": ["embeddings"]}),
    ):
        run = make_run(place.folder.parent, student=student, objective=SCHEDULED if name == "stage2" else FORWARD)
        folder = _checkpoint(place, name)
        rank = build(run, place)
        once = train(rank, run, place, last=4)
        rank.save(4, folder)
        once += train(rank, run, place, first=5)
        merge = {"merge_adapter": True} if "lora" in student else {}
        at_once = _export(rank, place, f"{name}-at-once", **merge)
        rank.close()
        rank = build(run, place)
        step = rank.load(folder)
        resumed = train(rank, run, place, first=step + 1)
        in_two = _export(rank, place, f"{name}-in-two", **merge)
        rank.close()
        found[name] = {"once": once, "resumed": resumed, "exports": (at_once, in_two), "step": step, "folder": folder}
    return found


def case_given_ids(place: Place) -> dict[Any, Any]:
    """Four steps on ids that the student chooses: in several micro-batches, of one rank in one; and two, a checkpoint,
    new ranks, two. Metrics, and the ids of the first steps."""
    found: dict[Any, Any] = {}
    for zero_stage, budget in ((2, SMALL_BUDGET), (3, SMALL_BUDGET)) if place.world == 2 else ((2, 4096),):
        labels = {"kind": "given_ids", "k": 6, "add_teacher_topk": 2}
        objective = [{"loss": "reverse_kl"}]
        run = make_run(place.folder.parent, student={"zero_stage": zero_stage}, labels=labels, objective=objective)
        folder = _checkpoint(place, f"given{zero_stage}-{budget}")
        rank = build(run, place)
        once, chosen = train_on_given_ids(rank, run, place, last=2, token_budget=budget)
        rank.save(2, folder)
        once += train_on_given_ids(rank, run, place, first=3, last=4, token_budget=budget)[0]
        rank.close()
        rank = build(run, place)
        rank.load(folder)
        resumed, again = train_on_given_ids(rank, run, place, first=3, last=4, token_budget=budget)
        rank.close()
        units = {step: batch_of(step, place, token_budget=budget).units for step in (1, 2)}
        found[zero_stage, budget] = {
            "once": once,
            "resumed": resumed,
            "first": {step: list(zip(of, chosen[step], strict=True)) for step, of in units.items()},
            "same": [np.array_equal(a.ids, b.ids) for a, b in zip(chosen[3], again[3], strict=True)],
        }
    return found


def case_other_world(place: Place) -> str:
    """On one rank: load what two wrote."""
    if place.world == 2:
        return ""
    rank = build(_run(place, zero_stage=2), place)
    checkpoint = _checkpoint(place, "of-two")
    torch.save({"step": 1, "world": 2, "random": {}}, checkpoint / "rank_0.pt")
    try:
        rank.load(checkpoint)
    except ConfigError as error:
        return str(error)
    finally:
        rank.close()
    return "loaded"


def case_not_finite(place: Place) -> dict[str, Any]:
    """Step 2 has a loss that is NaN, then one that is infinite, on the last rank only; steps 1 and 3 are sound."""
    found = {}
    for zero_stage in STAGES if place.world == 2 else (2,):
        run = make_run(
            place.folder.parent,
            student={"zero_stage": zero_stage},
            labels={"kind": "fakes.poisoned_labels"},
            objective=[{"loss": "forward_kl"}],
        )
        rank, teacher = build(run, place), Teacher()
        exports, metrics = [], []
        for number, (step, mark) in enumerate([(1, None), *((2, mark) for mark in MARKS), (4, None)]):
            batch = batch_of(step, place, token_budget=SMALL_BUDGET)
            blocks = [teacher.label(unit, labels_of(run)) for unit in batch.units]
            if mark is not None and place.rank == place.world - 1:
                blocks[0].columns["target"][0] = mark
            rank.stage(batch, blocks)
            metrics.append(dict(rank.step(step).values))
            exports.append(_export(rank, place, f"not-finite-{zero_stage}-{number}"))
        rank.close()
        found[zero_stage] = (metrics, exports)
    return found


def case_adapters(place: Place) -> dict[str, Any]:
    """Train adapters; what holds gradients, what a checkpoint holds, both exports, and the student's own numbers."""
    run = _run(place, zero_stage=2, lora={"rank": 4})
    rank = build(run, place)
    train(rank, run, place, last=3)
    checkpoint = _checkpoint(place, "adapters")
    rank.save(3, checkpoint)
    result = {
        "checkpoint": checkpoint,
        "adapter": _export(rank, place, "adapter"),
        "merged": _export(rank, place, "merged", merge_adapter=True),
        "evaluation": _evaluate(rank, place),
    }
    rank.close()
    return result


def _held_out(place: Place, world: int) -> list[Unit]:
    """Rank 0 has more sequences than the others, the last of three ranks would have none."""
    sequences = [s for s in sequences_of(100) if s.num_loss_tokens]  # of rows without any a run is never shown
    shares = [sequences] if world == 1 else [sequences[:4], sequences[4:]]
    return [Unit(id=f"held-{place.rank}-{i}", sequences=(s,)) for i, s in enumerate(shares[place.rank])]


def _evaluate(rank: StudentRank, place: Place) -> Any:
    teacher, units = Teacher(), _held_out(place, place.world)
    rank.stage_evaluation(units, [teacher.label(unit, Hidden()) for unit in units])
    return rank.evaluate(0, 3)


def case_look(place: Place) -> dict[str, Any]:
    """Everything that reads the student without training it, at stages 2 and 3 and on three architectures."""
    found = {}
    for model, zero_stage in (("llama", 2), ("gemma2", 2), ("untied", 3), ("llama", 3)):
        if place.world == 1 and zero_stage == 3:
            continue
        student = {"zero_stage": zero_stage, "model": {"path": str(place.folder.parent / model)}}
        training = {"micro_batch_tokens": SMALL_BUDGET, "evaluate_every": 2}
        run = make_run(place.folder.parent, student=student, training=training, data=HELD_OUT)
        rank, info = build_with_info(run, place)
        prompts = [s.token_ids for s in sequences_of(7)[:3]]
        found[model, zero_stage] = {
            "info": info,
            "evaluation": _evaluate(rank, place),
            "generated": rank.generate(prompts, max_new_tokens=70, stop_ids=(2,)),
            "self_test": rank.self_test(),
            "metrics": train(rank, run, place, last=2),
            "export": _export(rank, place, f"look-{model}-{zero_stage}"),
            "after": _evaluate(rank, place),
            "resumed": _resumed(rank),
        }
        rank.close()
    return found


def _resumed(rank: StudentRank) -> Any:
    """What an evaluation shows of training where one rank alone trained nothing since it was started."""
    rank._staging.shown = rank._staging.shown if rank._rank else None
    return rank.evaluate(2, 3).trained


def case_variants(place: Place) -> dict[str, Any]:
    """Losses of four steps under settings that must not change them (much)."""
    if place.world == 1:
        return {}
    found = {}
    for name, student, dtype in (
        ("bfloat16-1", {"zero_stage": 1}, "bfloat16"),
        ("bfloat16-2", {"zero_stage": 2}, "bfloat16"),
        ("bfloat16-3", {"zero_stage": 3}, "bfloat16"),
        ("checkpointing", {"zero_stage": 3, "activation_checkpointing": True}, "float32"),
        ("offload", {"zero_stage": 2, "offload": "optimizer"}, "float32"),
        ("offload-all", {"zero_stage": 3, "offload": "optimizer_and_parameters"}, "float32"),
    ):
        run = _run(place, **student)
        rank = build(run, place, dtype=dtype)
        found[name] = train(rank, run, place, last=4, token_budget=SMALL_BUDGET)
        rank.close()
    return found


def case_loading_memory(place: Place) -> dict[str, int]:
    """Private memory that loading 82 MB of weights takes at its highest, sharded and whole, in bytes."""
    if place.world == 1:
        return {}
    large = {"zero_stage": 3, "model": {"path": str(place.folder.parent / "large")}}
    run = make_run(place.folder.parent, student=large)
    start_processes(backend="gloo", timeout_s=60, rank=place.rank, world=place.world, device=HOST)
    peaks = {}
    for name, sharded in (
        ("warm", sharded_loading(make_plan(run).deepspeed)),
        ("sharded", sharded_loading(make_plan(run).deepspeed)),
        ("whole", contextlib.nullcontext()),
    ):
        source = run.student.model if name != "warm" else make_run(place.folder.parent).student.model
        with PrivateMemory() as memory:
            student = load_student(
                source, dtype=torch.float32, attention="sdpa", vocabulary_size=VOCABULARY_SIZE, sharded=sharded
            )
            # Unsharded weights are pages of the file until something writes to them, as DeepSpeed does at once.
            written = [p.detach().clone() for p in student.parameters()] if name == "whole" else []
        peaks[name] = memory.growth_bytes
        del student, written
        gc.collect()
    return peaks


class PrivateMemory:
    """Samples this process's anonymous memory; file pages that loading only maps do not count."""

    def __enter__(self) -> PrivateMemory:
        self._start = self._peak = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._peak = max(self._peak, _anonymous_bytes())
        self._stop.set()
        self._thread.join()

    @property
    def growth_bytes(self) -> int:
        return self._peak - self._start


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the kernel reports no anonymous memory")


def case_master_weights(place: Place) -> dict[str, Any]:
    """Whether the partition of this rank is memory of its own beside the weights, by dtype; and what a checkpoint of
    float32 weights holds of it: elements, and bytes of its file."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        run = _run(place, zero_stage=2)
        rank = build(run, place, dtype=dtype)
        optimizer = rank._zero._engine.optimizer
        weights, master = optimizer.bit16_groups_flat[0], optimizer.single_partition_of_fp32_groups[0]
        found[dtype] = weights.untyped_storage().data_ptr() != master.untyped_storage().data_ptr()
        if dtype == "float32":
            train(rank, run, place, last=1)
            folder = _checkpoint(place, "masters")
            rank.save(1, folder)
            (file,) = folder.rglob(f"*pp_rank_{place.rank}_*optim*")
            found |= {"elements": master.numel(), "bytes": file.stat().st_size}
        rank.close()
    return found


def case_staging_twice(place: Place) -> list[dict[str, float]]:
    """A step staged again, as after lost labels, is trained once and as if staged once."""
    if place.world == 2:
        return []
    run = _run(place, zero_stage=1)
    rank, teacher = build(run, place), Teacher()
    for _ in range(2):
        for step in (1, 2, LONELY_STEP):
            stage(rank, run, place, step, teacher)
    metrics = [dict(rank.step(step).values) for step in (1, 2, LONELY_STEP)]
    rank.close()
    return metrics


def case_the_last_one_a_rank_that_hangs(place: Place) -> tuple[str, float]:
    """The last case, since it breaks the process group: rank 1 misses a step, and rank 0 waits its deadline."""
    if place.world == 1:
        return "", 0.0
    run = _run(place, zero_stage=2)
    plan = dataclasses.replace(make_plan(run), collective_timeout_s=8.0)
    rank, _ = build_with_info(run, place, plan=plan)
    stage(rank, run, place, 1, Teacher())
    started, given_up = time.monotonic(), place.folder / "given-up"
    if place.rank == 1:  # a rank that ended would be noticed without any deadline
        while not given_up.exists() and time.monotonic() - started < 120.0:
            time.sleep(0.1)
        return "", 0.0
    said = "stepped alone"
    try:
        rank.step(1)
    except RuntimeError as error:
        said = str(error)
    waited_s = time.monotonic() - started
    given_up.touch()
    return said, waited_s

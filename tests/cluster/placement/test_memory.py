"""Memory of the roles as values: against the estimators of DeepSpeed and vLLM, and of shapes no laptop can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from hollow_models import LLAMA_1B, LLAMA_8B, LLAMA_70B
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.placement.choices import DtypeRule
from cluster.placement.hardware import Hardware, Node, gpu_memory_bytes
from cluster.placement.memory import verdict
from cluster.placement.memory.needs import KnownSizes, memory_needs
from cluster.placement.memory.parts import RoleMemory
from cluster.placement.memory.verdict import Offer
from cluster.placement.memory.zero import ZeroShare, largest_touch, zero_share
from configs.models import ModelSource, Student
from configs.schema import Optimizer, Run
from trainer.model.sizes import ModelSizes, sizes_of
from trainer.model.zero_config import deepspeed_config

GPUS = DtypeRule("gpu", True, "")
GIB = 2**30


def sizes(settings: Mapping[str, object]) -> ModelSizes:
    with torch.device("meta"):
        return sizes_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)))


BIG, MIDDLE, SMALL = sizes(LLAMA_70B), sizes(LLAMA_8B), sizes(LLAMA_1B)


def make_run(**changes: object) -> Run:
    """`student__ranks=2` sets a field of a section."""
    run: dict = {
        "name": "golden",
        "student": {"model": {"path": "m/student"}},
        "teacher": {"model": {"path": "m/teacher"}},
        "prompts": {"path": "rows.jsonl"},
        "data": {"max_length": 4096},
        "training": {"steps": 10},
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        holder = run
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[field] = value
    return Run.model_validate(run)


def known(student: ModelSizes = MIDDLE, teacher: ModelSizes = BIG) -> KnownSizes:
    """With the activations of the formula, which takes no time."""
    return KnownSizes(lambda run: student, lambda run, dtype: None, {"teacher": teacher}, {})


def needs(run: Run, **models: ModelSizes) -> dict[str, RoleMemory]:
    return {role.role: role for role in memory_needs(run, known(**models), GPUS)}


def shared(stage: int, *, ranks: int, dtype: str = "bfloat16", **student: object) -> ZeroShare:
    settings = Student(model=ModelSource(path="m"), zero_stage=stage, **student)
    config = deepspeed_config(
        student=settings, optimizer=Optimizer(), dtype=dtype, on_accelerator=True, hidden_size=4096
    )
    return zero_share(MIDDLE, config, width=2 if dtype == "bfloat16" else 4, ranks=ranks, micro_batches=4)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_agree_with_what_deepspeed_estimates(ranks: int) -> None:
    """At stage 2 it counts 2 bytes a weight for gradients in 16 bit, which are in a bucket here."""
    two, three = shared(2, ranks=ranks), shared(3, ranks=ranks)
    _, theirs = estimate_zero2_model_states_mem_needs(MIDDLE.all, num_gpus_per_node=ranks, cpu_offload=False)
    assert two.weights + two.optimizer + two.step == pytest.approx(theirs - 2 * MIDDLE.all / ranks, rel=1e-3)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(MIDDLE.all, 0, num_gpus_per_node=ranks, cpu_offload=False)
    gradients = 4 * MIDDLE.all / ranks
    assert three.weights + three.optimizer + gradients == pytest.approx(theirs, rel=0.01)
    assert three.gradients > gradients, "the buckets"


def test_offloaded_state_leaves_the_device_and_is_on_the_host() -> None:
    here, there = shared(2, ranks=8), shared(2, ranks=8, offload="optimizer")
    assert there.optimizer == 0
    assert there.host_optimizer >= here.optimizer
    everything = shared(3, ranks=8, offload="optimizer_and_parameters")
    assert everything.weights < 0.01 * here.weights
    assert everything.host_weights == pytest.approx(2 * MIDDLE.all / 8, rel=0.01)


def test_each_stage_needs_less_than_the_one_before() -> None:
    kept = []
    for stage in (1, 2, 3):
        share = shared(stage, ranks=8)
        kept.append(share.weights + share.optimizer + share.gradients + share.gathered)
    assert kept == sorted(kept, reverse=True)


def test_a_share_counts_the_parameters_at_its_edges_whole() -> None:
    assert largest_touch((10, 10, 10, 10), 2) == 20
    assert largest_touch((10, 10, 10), 2) == 20, "the middle one is at both"
    assert largest_touch((30, 1, 1), 3) == 32
    assert largest_touch((7, 5), 1) == 12


@pytest.mark.parametrize("shards", [1, 2, 8, 16])
def test_the_cache_of_one_sequence_is_that_of_vllm(shards: int) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    scorer = {"tensor_parallel_size": shards}
    parts = {part.name: part.num_bytes for part in needs(make_run(teacher__scorer=scorer))["scorer"].device}
    heads = max(1, LLAMA_70B["num_key_value_heads"] // shards)
    page = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=128, dtype=torch.bfloat16).page_size_bytes
    assert parts["key-value cache"] == LLAMA_70B["num_hidden_layers"] * 4096 // 16 * page
    assert parts["weights"] == -(-2 * BIG.all // shards)


def test_a_teacher_of_70b_needs_four_gpus_of_80_gb_and_a_student_of_8b_a_sharded_optimizer() -> None:
    offered = gpu_memory_bytes("H100")
    fits = {
        n: verdict.device_fit(needs(make_run(teacher__scorer={"tensor_parallel_size": n}))["scorer"], offered)
        for n in (1, 2, 4)
    }
    assert fits == {1: "cannot", 2: "close", 4: "fits"}
    alone = needs(make_run(student__ranks=1))["student"]
    assert verdict.device_fit(alone, offered) == "cannot", "16 bytes a weight"
    run = make_run(student__ranks=16, student__zero_stage=3, student__activation_checkpointing=True)
    assert verdict.device_fit(needs(run)["student"], offered) == "fits"


def test_settings_that_need_less_are_told_with_what_they_need() -> None:
    run = make_run(student__ranks=4, training__micro_batch_tokens=16384)
    found = dict(verdict.savings(run, known(), GPUS, "student"))
    assert list(found)[:3] == [
        "training.micro_batch_tokens: 4096",
        "student.activation_checkpointing: true",
        "student.zero_stage: 3",
    ]
    before = needs(run)["student"].device_bytes
    assert all(needed < before for needed in found.values())
    (*_, together) = found
    assert together.endswith("together")
    assert found[together] == min(found.values())
    of_scorer = dict(verdict.savings(make_run(), known(), GPUS, "scorer"))
    assert next(iter(of_scorer)) == "teacher.scorer.tensor_parallel_size: 2"


@pytest.mark.parametrize("role", ["scorer", None])
def test_a_cache_that_was_written_too_large_is_what_to_take_out(role: str | None) -> None:
    run = make_run(teacher__scorer={"engine": {"kind": "vllm", "kv_cache_bytes": 10**12}})
    rule = DtypeRule("cpu", False, "") if role is None else GPUS
    found = dict(verdict.savings(run, known(), rule, role))
    assert found["teacher.scorer.engine.kv_cache_bytes: null"] < 10**12


def test_hidden_labels_hold_the_teachers_head_and_its_products_on_the_student() -> None:
    topk, hidden = (needs(make_run(labels=kind), teacher=MIDDLE)["student"] for kind in ("topk", "hidden"))
    parts = {part.name: part.num_bytes for part in hidden.device}
    assert parts["teacher's head"] == 2 * MIDDLE.head
    assert "teacher's head" not in {part.name for part in topk.device}
    held_out = needs(make_run(data__evaluation={"path": "held.jsonl"}), teacher=MIDDLE)["student"]
    assert "teacher's head" in {part.name for part in held_out.device}, (
        "evaluation holds hidden labels, whatever the training has"
    )


def test_ranks_without_gpus_share_the_teachers_head_as_it_is_stored() -> None:
    run = make_run(labels="hidden", student__ranks=4, teacher__scorer={"dtype": "float32"})
    models = replace(known(SMALL, SMALL), stored={"teacher": 2})
    roles = memory_needs(run, models, DtypeRule("cpu", False, ""))
    student = next(role for role in roles if role.role == "student")
    (head,) = student.shared
    assert (head.name, head.num_bytes, head.certain) == ("teacher's head", 2 * SMALL.head, True)
    assert head.name not in {part.name for part in student.host}
    alone = verdict.host_bytes(roles)
    assert verdict.host_bytes(roles, machines=2) == alone + head.num_bytes, "once on each machine"
    assert verdict.host_bytes(roles, machines=9) == alone + 3 * head.num_bytes, "no more machines than ranks"
    assert verdict.sure_host_bytes(roles, machines=2) == verdict.sure_host_bytes(roles) + head.num_bytes


@pytest.mark.parametrize("projector", ["linear", "none"])
def test_terms_on_states_count_their_projectors_and_the_states(projector: str) -> None:
    term = {"loss": "features", "distance": "l2", "student_layer": 1, "teacher_layer": 2, "projector": projector}
    plain, compared = (
        needs(
            make_run(labels={"kind": "hidden", "layers": layers}, objective=[{"loss": "forward_kl"}, *more]),
            student=SMALL,
            teacher=MIDDLE,
        )
        for layers, more in (([], []), ([2], [term]))
    )
    parts = [{part.name: part.num_bytes for part in one["student"].device} for one in (plain, compared)]
    learnt = SMALL.hidden_size * MIDDLE.hidden_size if projector == "linear" else 0
    assert parts[1]["optimizer"] - parts[0]["optimizer"] == 12 * learnt, "master weights and both moments"
    assert parts[1]["weights"] - parts[0]["weights"] == 2 * learnt
    rows = 4096 * 4 * (SMALL.hidden_size + 3 * MIDDLE.hidden_size)
    assert parts[1]["activations"] - parts[0]["activations"] == rows


def test_a_run_in_one_process_has_one_interpreter() -> None:
    run = make_run(runtime="in_process", teacher__scorer={"engine": "hf"})
    (role,) = memory_needs(run, known(SMALL, SMALL), DtypeRule("cpu", False, ""))
    names = [part.name for part in role.host]
    assert names.count("process") == 1
    assert len(set(names)) == len(names), "each part says whose it is"
    assert {"weights of the student", "weights of the scorer"} <= set(names)
    assert role.host_bytes > 4 * 2 * SMALL.all


def test_a_generator_beside_the_scorer_needs_its_cache_and_buffers_alone() -> None:
    written = {"answers": {"kind": "teacher", "max_new_tokens": 96}}
    host = DtypeRule("cpu", False, "")
    apart, beside = (
        memory_needs(make_run(teacher__generator={"beside_scorer": value}, **written), known(SMALL, SMALL), host)
        for value in (False, True)
    )
    sizes_of_roles = [{role.role: role.host_bytes for role in roles} for roles in (apart, beside)]
    assert "generator" not in sizes_of_roles[1]
    weights = next(part.num_bytes for part in apart[1].host if part.name == "weights")
    saved = sum(sizes_of_roles[0].values()) - sum(sizes_of_roles[1].values())
    assert saved > weights, "weights and a process"
    assert sizes_of_roles[1]["scorer"] > sizes_of_roles[0]["scorer"]


def test_what_is_offered_is_that_of_the_machines() -> None:
    node = Node("a", num_cpus=8, gpus=("H100", "H100"), memory_bytes=100 * GIB)
    offer = Offer.of(Hardware((node, replace(node, name="b"))), "the cluster")
    assert offer.host_bytes == 200 * GIB
    assert offer.gpu_bytes == gpu_memory_bytes("H100")
    assert Offer.of(Hardware((replace(node, gpus=("Gaudi",)),)), "x").gpu_bytes is None
    assert Offer.of(Hardware((replace(node, gpu_memory_bytes=7),)), "x").gpu_bytes == 7
    old = replace(node, gpus=("V100",))
    rules = [Offer.of(Hardware((one,)), "x").rule(make_run()) for one in (node, old, replace(node, gpus=()))]
    assert [(rule.accelerator, rule.choose("student", "auto")) for rule in rules] == [
        ("gpu", "bfloat16"),
        ("gpu", "float32"),
        ("cpu", "float32"),
    ]


@pytest.mark.parametrize(
    ("kind", "gib"),
    [("H100", 79), ("h100", 79), ("A100-40G", 39), ("nvidia_a100_80gb_pcie", 78), ("L4", 22), ("mi300", None)],
)
def test_the_memory_of_a_gpu_follows_from_its_name(kind: str, gib: int | None) -> None:
    found = gpu_memory_bytes(kind)
    assert (None if found is None else found // GIB) == gib


def test_an_estimate_refuses_only_by_what_is_certain() -> None:
    assert verdict.fit(10, 5, 100) == "fits"
    assert verdict.fit(90, 5, 100) == "close"
    assert verdict.fit(110, 5, 100) == "over"
    assert verdict.fit(110, 101, 100) == "cannot"

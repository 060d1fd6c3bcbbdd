"""`resolve` on machines nobody here has, against golden files that a person has read.

After a change that is meant to change settings, write them again and read the difference:

    STILLHOUSE_WRITE_GOLDEN=1 python -m pytest tests/cluster/placement/test_resolve.py
    git diff tests/cluster/placement/golden
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture_config
from machines import machines
from transformers import Gemma4TextConfig, LlamaConfig, MistralConfig

from cluster.engines.vllm_limits import check_cache, check_split, kv_cache_bytes
from cluster.placement.facts import KnownModel, RunFacts
from cluster.placement.groups import Group
from cluster.placement.resolve import Resolved, resolve
from cluster.placement.roles import roles_of
from configs.answers import ANSWERS
from configs.schema import Run
from configs.stations import Choice
from trainer.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
HOST_ONLY_ARGUMENTS = {"block_size", "kv_cache_memory_bytes"}
ONE_B = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16}
EIGHT_B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}


def make_run(**changes: Any) -> Run:
    """A run whose model folders do not exist; a dotted key changes a nested field."""
    tree: dict[str, Any] = {
        "name": "golden",
        "teacher": {"model": {"path": "/models/teacher", "revision": "main"}},
        "student": {"model": {"path": "/models/student"}},
        "prompts": {"path": "/data/train.jsonl"},
        "data": {"max_length": 4096},
        "training": {"steps": 100},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = tree
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return Run.model_validate(tree)


GENERATOR = {"teacher__generator": {}, "answers": {"kind": "teacher", "max_new_tokens": 96, "temperature": 0.7}}
DEMO = make_run(student__ranks=2, data__max_length=512, **GENERATOR)

SCENARIOS: dict[str, tuple[Run, str, dict[str, int] | None]] = {
    "laptop": (DEMO, "2cpu", ONE_B),
    "laptop_amx": (DEMO, "2cpu+amx", ONE_B),
    "eight_h100_7b_to_1b": (make_run(student__ranks=4, teacher__scorer__replicas=4), "8xH100/96cpu/2048GiB", ONE_B),
    "two_nodes_70b_to_8b": (
        make_run(
            student__ranks=8,
            student__zero_stage=3,
            student__offload="optimizer_and_parameters",
            student__activation_checkpointing=True,
            teacher__scorer__tensor_parallel_size=8,
            labels={"kind": "hidden"},
        ),
        "8xH100/96cpu/2048GiB,8xH100/96cpu/2048GiB",
        EIGHT_B,
    ),
    "mixed_h100_a100": (
        make_run(student__ranks=8, teacher__scorer={"replicas": 2, "tensor_parallel_size": 2}, **GENERATOR),
        "8xH100/96cpu,8xA100/64cpu",
        EIGHT_B,
    ),
}


def resolved(
    run: Run,
    hardware: str,
    model: dict[str, int] | None = None,
    *,
    teacher_config: Any = None,
    teacher_bytes: int | None = None,
    student_bytes: int | None = None,
) -> Resolved:
    facts = RunFacts(
        vocabulary_size=128_256,
        tokenizer_fingerprint="0" * 16,
        student=KnownModel(LlamaConfig(**model) if model else None, student_bytes),
        teachers=dict.fromkeys(run.teachers_by_name(), KnownModel(teacher_config, teacher_bytes)),
    )
    return resolve(run, machines(hardware), facts)


def to_json(settings: Resolved) -> str:
    return json.dumps(dataclasses.asdict(settings), indent=2, sort_keys=True, default=Choice.flat) + "\n"


@pytest.mark.parametrize("name", SCENARIOS)
def test_settings_equal_the_golden_file(name: str) -> None:
    text = to_json(resolved(*SCENARIOS[name]))
    file = GOLDEN / f"{name}.json"
    if os.environ.get("STILLHOUSE_WRITE_GOLDEN") == "1":
        file.write_text(text)
    assert text == file.read_text(), "read the difference (how: docstring of this file)"


@pytest.mark.parametrize("mode", ["read_write", "only"])
def test_a_run_from_the_label_store_alone_starts_a_process_on_a_host_in_the_place_of_its_teacher(mode: str) -> None:
    run = make_run(teacher__scorer={"replicas": 2, "tensor_parallel_size": 2}, store={"path": "labels", "mode": mode})
    alone = mode == "only"
    found = resolved(run, "8xH100/96cpu/2048GiB", ONE_B)
    plan, groups = found.engines[0], found.placement.of_role("scorer")
    assert plan.engine.kind == ("store" if alone else "vllm")
    assert sum(group.num_gpus for group in groups) == (0 if alone else 4)
    assert plan.store is not None
    assert plan.store.writes != alone
    assert plan.store.path == str(Path("labels").absolute())
    assert plan.store.teacher["engine"] == {"kind": "vllm", "load_format": "safetensors"}
    assert plan.store.teacher["dtype"] == plan.dtype == "bfloat16"
    whole = resolved(make_run(store={"path": "labels", "mode": mode}), "8xH100/96cpu/2048GiB", ONE_B).engines[0]
    assert whole.store.teacher == plan.store.teacher, "labels of a teacher in shards are those of one that is whole"


def test_labels_are_told_apart_by_the_vocabulary_of_their_teacher() -> None:
    facts = RunFacts(10, "student", vocabularies={"teacher": (20, "own")}, teachers={"teacher": KnownModel()})
    plan = resolve(make_run(store={"path": "labels"}), machines("2cpu"), facts).engines[0]
    assert plan.store is not None
    assert (plan.store.teacher["vocabulary_size"], plan.store.teacher["tokenizer"]) == (20, "own")


def test_on_a_host_the_cache_of_a_scorer_follows_its_model() -> None:
    run, hardware = SCENARIOS["laptop"][:2]
    small = LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    unknown = resolved(run, hardware)
    plans = resolved(run, hardware, teacher_config=small).engines
    for plan, as_before in zip(plans, unknown.engines, strict=True):
        given, before = (p.arguments["kv_cache_memory_bytes"] for p in (plan, as_before))
        a_token = 2 * 30 * 3 * 64 * (4 if plan.dtype == "float32" else 2)
        if plan.role == "generator":
            assert given == before
            continue
        longest = plan.arguments["max_num_batched_tokens"] + plan.max_length
        assert a_token * longest <= given < before, "a step and a sequence that was begun fit"


@pytest.mark.parametrize("name", SCENARIOS)
def test_settings_for_hosts_and_for_gpus_never_mix(name: str) -> None:
    result = resolved(*SCENARIOS[name])
    on_gpu = result.accelerator == "gpu"
    engines = result.engines
    environments = [result.student_environment, *(plan.environment for plan in engines)]
    for plan in engines:
        assert plan.arguments["enforce_eager"] == (not on_gpu)
        assert set(plan.arguments) >= HOST_ONLY_ARGUMENTS or on_gpu
        assert not HOST_ONLY_ARGUMENTS & set(plan.arguments) or not on_gpu
        assert ("gpu_memory_utilization" in plan.arguments) == on_gpu
    for table in environments:
        assert ("MALLOC_TOP_PAD_" in table) == (not on_gpu)
        assert ("OMP_WAIT_POLICY" in table) == (not on_gpu)
        assert table.get("OMP_NUM_THREADS") != "1" or not on_gpu
    assert "torch_adam" not in json.dumps(result.student.deepspeed)
    assert result.student.backend == ("nccl" if on_gpu else "gloo")
    assert {group.accelerator for group in result.placement.groups} == {result.accelerator}


def test_dtype_follows_the_capability_and_says_why() -> None:
    cases = {"2cpu": "float32", "2cpu+amx": "bfloat16", "2xH100": "bfloat16", "2xV100": "float32"}
    for hardware, dtype in cases.items():
        result = resolved(make_run(), hardware)
        assert (result.student.dtype, result.teachers["teacher"].scorer.dtype) == (dtype, dtype), hardware
        assert any(dtype in reason for reason in result.reasons)
        assert result.student.deepspeed["bf16"]["enabled"] == (dtype == "bfloat16")
    assert any("no amx_bf16" in reason for reason in resolved(make_run(), "2cpu").reasons)


def test_a_named_dtype_is_kept_refused_or_warned_about() -> None:
    run = make_run(student__dtype="bfloat16", teacher__scorer={"dtype": "float32"})
    result = resolved(run, "2cpu")
    assert (result.student.dtype, result.teachers["teacher"].scorer.dtype) == ("bfloat16", "float32")
    assert any("slower" in warning for warning in result.warnings)
    with pytest.raises(ConfigError, match=r"student: dtype: bfloat16, and V100 has no bfloat16"):
        resolved(run, "2xV100")


def test_the_accelerator_is_chosen_or_refused() -> None:
    assert resolved(make_run(), "2xH100").accelerator == "gpu"
    assert resolved(make_run(accelerator="cpu"), "2xH100").accelerator == "cpu"
    with pytest.raises(ConfigError, match="no GPU"):
        resolved(make_run(accelerator="gpu"), "2cpu")
    with pytest.raises(ConfigError, match=r"needs 3 GPUs .*2 GPUs registered, 2 free"):
        resolved(make_run(student__ranks=2), "2xH100")


def test_more_processes_than_cores_is_a_warning_and_one_thread_each() -> None:
    result = resolved(make_run(student__ranks=2), "2cpu")
    assert any("3 processes share 2 cores" in warning for warning in result.warnings)
    assert result.student_environment["OMP_NUM_THREADS"] == "1"
    assert threads_on("12cpu", ranks=2) == ("6", "4")
    assert not resolved(make_run(student__ranks=2), "12cpu").warnings


def test_the_core_of_an_engine_that_mostly_waits_serves_the_ranks_too() -> None:
    assert threads_on("2cpu", ranks=1) == ("2", "1")
    assert threads_on("4cpu", ranks=1, replicas=3) == ("2", "1"), "one engine's core, not all"
    assert threads_on("1cpu", ranks=1) == ("1", "1")


def threads_on(machine: str, *, ranks: int, replicas: int = 1) -> tuple[str, str]:
    """OpenMP threads of a rank and of a scorer."""
    result = resolved(make_run(student__ranks=ranks, teacher__scorer={"replicas": replicas}), machine)
    scorer = result.teachers["teacher"].scorer.environment
    return result.student_environment["OMP_NUM_THREADS"], scorer["OMP_NUM_THREADS"]


def test_the_offloaded_optimizer_gets_the_cores_of_its_gpu() -> None:
    run = make_run(student__offload="optimizer")
    assert resolved(run, "8xH100/96cpu").student_environment["OMP_NUM_THREADS"] == "12"
    assert "OMP_NUM_THREADS" not in resolved(make_run(), "8xH100/96cpu").student_environment
    assert "OMP_NUM_THREADS" not in resolved(run, "8xH100/96cpu").teachers["teacher"].scorer.environment


def test_a_replica_larger_than_a_node_takes_the_ray_executor_and_no_other_does() -> None:
    large = make_run(teacher__scorer={"tensor_parallel_size": 16, "may_span_nodes": True})
    result = resolved(large, "8xH100,8xH100,8xH100")
    assert result.teachers["teacher"].scorer.arguments["distributed_executor_backend"] == "ray"
    assert {group.executor for group in result.placement.of_role("scorer")} == {"ray"}
    whole = resolved(make_run(teacher__scorer={"tensor_parallel_size": 8}), "8xH100,8xH100")
    assert whole.teachers["teacher"].scorer.arguments["distributed_executor_backend"] == "mp"


def test_the_scorer_is_asked_for_training_labels_and_for_exact_evaluation() -> None:
    encodings = resolved(make_run(labels={"kind": "topk", "k": 16}), "2cpu").teachers["teacher"].scorer.encodings
    assert [encoding.kind for encoding in encodings] == ["topk", "hidden"]
    assert encodings[0].k == 16
    warm = (
        resolved(make_run(labels={"kind": "hidden", "temperature": 2.0}), "2cpu").teachers["teacher"].scorer.encodings
    )
    assert [encoding.temperature for encoding in warm] == [2.0, 1.0]
    assert len(resolved(make_run(labels="hidden"), "2cpu").teachers["teacher"].scorer.encodings) == 1


def test_a_generator_is_started_where_the_teacher_writes_and_reads_text_only_to_stop_at_strings() -> None:
    assert resolved(make_run(), "2cpu").teachers["teacher"].generator is None
    assert resolved(DEMO, "2cpu").teachers["teacher"].generator.arguments["skip_tokenizer_init"]
    answers = ANSWERS.validate({"kind": "teacher", "stop": ["\n\n"]})
    stopping = resolved(DEMO.model_copy(update={"answers": answers}), "2cpu").teachers["teacher"]
    assert not stopping.generator.arguments["skip_tokenizer_init"]
    assert stopping.scorer.arguments["skip_tokenizer_init"]


def test_in_process_runs_need_no_placement() -> None:
    run = make_run(runtime="in_process", teacher__scorer={"engine": {"kind": "hf"}})
    result = resolved(run, "1xH100")
    assert result.placement.groups == ()
    assert result.student.device_type == "cuda"


def test_attention_is_decided_by_the_device_where_the_model_is_known() -> None:
    assert resolved(make_run(), "2cpu", ONE_B).student.attention == "sdpa"
    assert resolved(make_run(), "2xH100", ONE_B).student.attention == "varlen"
    assert resolved(make_run(), "2xH100").student.attention == "auto"


def test_resolving_twice_gives_the_same_text() -> None:
    for scenario in SCENARIOS.values():
        assert to_json(resolved(*scenario)) == to_json(resolved(*scenario))


def test_every_role_of_a_run_has_its_groups() -> None:
    run, hardware, _ = SCENARIOS["mixed_h100_a100"]
    result = resolved(run, hardware)
    assert sum(role.count for role in roles_of(run, "gpu")) == 8 + 2 + 1
    assert isinstance(result.placement.groups[0], Group)
    assert result.placement.num_gpus == 8 + 2 * 2 + 1


def test_a_generator_beside_the_scorer_has_no_process_of_its_own_but_on_gpus() -> None:
    beside = {**GENERATOR, "teacher__generator": {"beside_scorer": True}}
    run = make_run(**beside)
    assert [role.role for role in roles_of(run, "cpu")] == ["student", "scorer"]
    on_host = resolved(run, "2cpu").teachers["teacher"]
    assert on_host.scorer.beside == on_host.generator
    assert [role.role for role in roles_of(run, "gpu")] == ["student", "scorer", "generator"]
    on_gpus = resolved(run, "8xH100")
    assert on_gpus.teachers["teacher"].scorer.beside is None
    assert any("not beside the scorer: on GPUs each has its own" in reason for reason in on_gpus.reasons)
    unscored = make_run(**{**beside, "labels": "none", "objective": [{"loss": "cross_entropy"}]})
    assert [role.role for role in roles_of(unscored, "cpu")] == ["student", "generator"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"replicas": 2}, "there are 2 scorers and 1 generators"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is more than 1"),
        ({"placement": {"strategy": "spread"}}, "their placement differs"),
    ],
)
def test_a_generator_that_cannot_lie_beside_the_scorer_has_its_own_process_and_that_is_said(
    change: dict[str, Any], why: str
) -> None:
    beside = {**GENERATOR, "teacher__generator": {"beside_scorer": True}}
    apart = resolved(make_run(**beside, teacher__scorer=change), "8cpu")
    assert apart.teachers["teacher"].scorer.beside is None
    assert any(why in reason for reason in apart.reasons)


@pytest.fixture(scope="module")
def teacher_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a large teacher, without its weights."""
    folder = tmp_path_factory.mktemp("teacher-70b")
    shape = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
    LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=8192, **shape).save_pretrained(folder)
    return folder


@pytest.mark.stack
@pytest.mark.parametrize("name", SCENARIOS)
def test_vllm_makes_its_whole_configuration_of_the_engine_arguments(
    name: str, teacher_70b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = pytest.importorskip("vllm")
    from cluster.engines import vllm_labels

    monkeypatch.setenv(vllm_labels.ARCHITECTURE_VARIABLE, "LlamaForCausalLM")
    vllm_labels.register()
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    (teacher,) = golden["teachers"].values()
    for plan in filter(None, (teacher["scorer"], teacher["generator"])):
        made = vllm.EngineArgs(model=str(teacher_70b), **plan["arguments"]).create_engine_config()
        assert made.model_config.runner_type == {"scorer": "pooling", "generator": "generate"}[plan["role"]]
        assert str(made.model_config.dtype) == f"torch.{plan['dtype']}"
        assert made.model_config.max_model_len == plan["max_length"]
        assert made.parallel_config.tensor_parallel_size == plan["tensor_parallel_size"]
    with pytest.raises(TypeError):
        vllm.EngineArgs(model=str(teacher_70b), **teacher["scorer"]["arguments"], no_such_argument=1)


@pytest.mark.stack
@pytest.mark.parametrize("name", SCENARIOS)
def test_deepspeed_reads_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    golden = json.loads((GOLDEN / f"{name}.json").read_text())["student"]["deepspeed"]
    parsed = DeepSpeedConfig(golden)
    assert parsed.gradient_clipping == golden["gradient_clipping"] == 1.0
    assert parsed.zero_config.stage == golden["zero_optimization"]["stage"]
    assert parsed.bfloat16_config.enabled == golden["bf16"]["enabled"]
    assert parsed.gradient_accumulation_steps == 1
    for field, value in golden["zero_optimization"].items():
        if not isinstance(value, dict):
            assert getattr(parsed.zero_config, ALIASES.get(field, field)) == value, field
    offload = golden["zero_optimization"].get("offload_param")
    assert (parsed.zero_config.offload_param is not None) == (offload is not None)
    with pytest.raises(ValueError, match="no_such_setting"):
        DeepSpeedZeroConfig(stage=2, no_such_setting=1)


ALIASES = {
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save": "gather_16bit_weights_on_model_save",
}


def test_the_plan_of_a_role_survives_a_trip_between_processes() -> None:
    import pickle

    result = resolved(*SCENARIOS["laptop"])
    assert pickle.loads(pickle.dumps(result)) == result
    assert dataclasses.is_dataclass(result)


def test_deadlines_grow_with_the_weights_unless_they_are_given() -> None:
    run = make_run()
    small = resolved(run, "2xH100", teacher_bytes=2 * 10**9, student_bytes=10**8)
    assert (small.teachers["teacher"].scorer.start_timeout_s, small.student.start_timeout_s) == (620, 601)
    large = resolved(run, "2xH100", teacher_bytes=140 * 10**9)
    assert (large.teachers["teacher"].scorer.start_timeout_s, large.student.start_timeout_s) == (2000, 600)
    copied = make_run(teacher__model={"path": "/models/teacher", "local_copy": "/scratch"})
    plan = resolved(copied, "2xH100", teacher_bytes=140 * 10**9).teachers["teacher"].scorer
    assert (plan.start_timeout_s, plan.local_copy) == (3400, "/scratch")
    given = make_run(faults={"start_timeout_s": 45})
    assert resolved(given, "2xH100", teacher_bytes=140 * 10**9).teachers["teacher"].scorer.start_timeout_s == 45


@pytest.mark.parametrize(
    ("heads", "shared", "shards", "said"),
    [
        (32, 8, 8, None),
        (32, 8, 16, None),  # each key-value head on two shards
        (9, 3, 3, None),
        (9, 3, 2, r"tensor_parallel_size: 2 does not divide the teacher's 9 attention heads; write one of \[1, 3, 9\]"),
        (12, 4, 6, r"tensor_parallel_size: 6 neither divides the teacher's 4 key-value heads nor is a multiple"),
        (32, 8, 64, "does not divide"),
    ],
)
def test_a_split_that_does_not_divide_the_heads_is_refused(
    heads: int, shared: int, shards: int, said: str | None
) -> None:
    run = make_run(teacher__scorer={"tensor_parallel_size": shards})
    config = LlamaConfig(hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=shared)
    if said is None:
        assert (
            resolved(run, "64xH100,8xH100", teacher_config=config).teachers["teacher"].scorer.tensor_parallel_size
            == shards
        )
        return
    with pytest.raises(ConfigError, match=said):
        resolved(run, "64xH100,8xH100", teacher_config=config)


def test_the_line_between_splits_is_that_of_vllm() -> None:
    """Against the two assertions of its attention layers, for every split of a few shapes."""
    for heads, shared in ((32, 8), (12, 4), (9, 3), (16, 16), (24, 2)):
        config = LlamaConfig(hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=shared)
        for shards in range(2, heads + 1):
            allowed = heads % shards == 0 and (shared % shards == 0 if shared >= shards else shards % shared == 0)
            run = make_run(teacher__scorer={"tensor_parallel_size": shards})
            if allowed:
                check_split(run, "teacher", config)
            else:
                with pytest.raises(ConfigError):
                    check_split(run, "teacher", config)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 2 * 2 * 4 * 8 * 4 * 64), ("auto", 2 * 2 * 4 * 8 * 2 * 64)])
def test_a_cache_that_holds_no_sequence_is_refused(dtype: str, least: int) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)

    def resolve_with(size: int) -> None:
        engine = {"kind": "vllm", "kv_cache_bytes": size}
        scorer = {"engine": engine, "dtype": dtype}
        resolved(make_run(teacher__scorer=scorer, data__max_length=64), "8xH100", teacher_config=config)

    resolve_with(least)
    with pytest.raises(ConfigError, match=rf"teacher.scorer.engine.kv_cache_bytes: .* take {least} bytes"):
        resolve_with(least - 1)


def test_a_cache_of_layers_that_differ_is_not_counted() -> None:
    config = Gemma4TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert kv_cache_bytes(config, num_tokens=64, dtype="float32") is None
    scorer = {"engine": {"kind": "vllm", "kv_cache_bytes": 1}}
    check_cache(make_run(teacher__scorer=scorer), "teacher", config)


def test_vllm_sees_as_far_back_as_transformers_does() -> None:
    ignored = resolved(make_run(), "8xH100", teacher_config=LlamaConfig(**ONE_B, sliding_window=64))
    assert ignored.teachers["teacher"].scorer.arguments["hf_overrides"] == {
        "head_dtype": "model",
        "sliding_window": None,
    }
    assert "teacher: attends without a window: llama has none" in "\n".join(ignored.reasons)
    wider = resolved(make_run(), "8xH100", teacher_config=architecture_config("cohere2"))
    assert wider.teachers["teacher"].scorer.arguments["hf_overrides"] == {
        "head_dtype": "model",
        "sliding_window": 23,
    }, "vLLM adds one"
    assert not [reason for reason in wider.reasons if "window" in reason]
    used = resolved(make_run(), "8xH100", teacher_config=MistralConfig(**ONE_B, sliding_window=64))
    assert used.teachers["teacher"].scorer.arguments["hf_overrides"] == {"head_dtype": "model"}


def test_a_teacher_whose_rotation_changes_within_the_rows_is_refused_for_vllm_alone() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = LlamaConfig(**ONE_B, max_position_embeddings=1000, rope_parameters=rope)
    with pytest.raises(ConfigError, match=r"data.max_length: 1001 .* teacher's rotary embedding \(dynamic\).*vLLM"):
        resolved(make_run(data__max_length=1001), "8xH100", teacher_config=config)
    resolved(make_run(data__max_length=1000), "8xH100", teacher_config=config)
    hf = make_run(data__max_length=1001, teacher__scorer={"engine": {"kind": "hf"}})
    resolved(hf, "8xH100", teacher_config=config)


def test_a_teacher_whose_windows_vllm_does_not_know_is_refused() -> None:
    config = architecture_config("qwen2_moe")  # measured with vLLM 0.32: 9 nats off beyond its window of 24
    with pytest.raises(ConfigError, match=r"data.max_length: 25 is over the window of 24 .*qwen2_moe.*kind: hf"):
        resolved(make_run(data__max_length=25), "8xH100", teacher_config=config)
    resolved(make_run(data__max_length=24), "8xH100", teacher_config=config)
    resolved(make_run(data__max_length=99), "8xH100", teacher_config=architecture_config("gemma2"))


def test_a_placement_of_the_configuration_reaches_every_role() -> None:
    run = make_run(
        student={"model": {"path": "/models/student"}, "ranks": 4, "placement": {"nodes": 2}},
        teacher__scorer={"replicas": 2, "placement": {"strategy": "spread", "accelerator_type": "H100"}},
    )
    placement = resolved(run, "8xH100,8xH100").placement
    student, scorer = placement.of_role("student")[0], placement.of_role("scorer")[0]
    assert (student.strategy, student.bundle_of_actor) == ("STRICT_SPREAD", (0, 0, 1, 1))
    assert (scorer.strategy, scorer.bundle_of_actor) == ("SPREAD", (0, 1))
    assert "accelerator_type:H100" in scorer.bundles[0]

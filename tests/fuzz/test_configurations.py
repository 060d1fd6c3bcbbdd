"""Configurations as nobody meant them: a run or one message, and what loads loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mutations import Damage, outcomes
from ruamel.yaml import YAML

from configs.load import config_hash, dump_run, load_run, load_section
from launch.targets import load_target

WHOLE = """\
name: whole
folder: runs/whole
seed: 3
runtime: ray
accelerator: cpu
student:
  model: {path: models/student, licence: mit, local_copy: /scratch}
  ranks: 2
  zero_stage: 3
  offload: optimizer
  lora: {rank: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj]}
  placement: {strategy: spread, node_labels: {pool: a}, nodes: 2}
teacher:
  model: {path: models/teacher}
  chat_template: template.jinja
  scorer: {engine: {kind: vllm, kv_cache_bytes: 33554432}, replicas: 2, tensor_parallel_size: 2}
  generator: {engine: {kind: hf}}
prompts: {path: rows.jsonl, format: prompt, max_rows: 10}
data:
  evaluation: {path: held_out.jsonl}
  max_length: 256
  on_too_long: drop
answers: {kind: teacher, max_new_tokens: 16, temperature: 0.7}
labels: {kind: topk, k: 8}
objective: [{loss: forward_kl, weight: 0.5}, {loss: jsd, beta: 0.5}]
optimizer: {learning_rate: 1e-3, betas: [0.9, 0.95], schedule: linear, warmup_steps: 1}
training: {steps: 8, sequences_per_step: 4, micro_batch_tokens: 256, save_every: 2, evaluate_every: 2}
faults: {score_timeout_s: 30.5, max_unit_attempts: 2}
report: {generate: 1, viewer_sequences: 1}
"""
PLACES = ["seed", "labels", "labels.k", "student.lora", "objective.0", "objective.9.x", "faults.ping_timeout_s", ""]
TREE: dict[str, Any] = YAML(typ="safe", pure=True).load(WHOLE)


def as_yaml(tree: Any) -> str:
    """JSON, which YAML is a superset of, but for the names of what is no number."""
    text = json.dumps(tree, ensure_ascii=False)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


def load_damaged(file: Path, seed: int) -> None:
    damage = Damage(seed)
    overrides = []
    match damage.random.randrange(4):
        case 0:
            file.write_bytes(damage.bytes(WHOLE.encode()))
        case 1:
            file.write_text(WHOLE)
            for _ in range(damage.random.randint(1, 3)):
                path = damage.random.choice(
                    ["seed", "labels", "labels.k", "student.lora", "objective.0", "objective.9.x"]
                )
                overrides.append(f"{path}={as_yaml(damage.value())}")
            overrides.append(damage.bytes(b"training.steps=7", most=1).decode("utf-8", "replace"))
        case _:
            file.write_text(as_yaml(damage.tree(TREE)), errors="surrogatepass")
    run = load_run(file, overrides).run
    again = file.with_name("again.yaml")
    again.write_text(dump_run(run))
    assert config_hash(load_run(again).run) == config_hash(run)


def load_damaged_options(file: Path, seed: int) -> None:
    damage = Damage(seed)
    target = load_target(damage.random.choice(["local", "ray", "slurm", "kuberay", "skypilot"]))
    fields = {name: damage.value() for name in damage.random.sample(sorted(target.Options.model_fields), k=1)}
    file.write_text(as_yaml(fields), errors="surrogatepass")
    load_section(target.Options, file, [], title="options", option="--with")


def test_the_undamaged_configuration_loads(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(as_yaml(TREE))
    assert load_run(tmp_path / "run.yaml").run.labels.k == 8


@pytest.mark.timeout(600)
def test_damaged_configurations_load_or_are_one_message(tmp_path: Path) -> None:
    ended = outcomes(lambda seed: load_damaged(tmp_path / "run.yaml", seed), range(300))
    assert min(ended["ok"], ended["ConfigError"]) >= 20, ended


@pytest.mark.timeout(600)
def test_damaged_options_of_a_target_load_or_are_one_message(tmp_path: Path) -> None:
    outcomes(lambda seed: load_damaged_options(tmp_path / "options.yaml", seed), range(60))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_damaged_configurations_load_or_are_one_message(tmp_path: Path) -> None:
    outcomes(lambda seed: load_damaged(tmp_path / "run.yaml", seed), range(1000, 5000))
    outcomes(lambda seed: load_damaged_options(tmp_path / "options.yaml", seed), range(1000, 2000))

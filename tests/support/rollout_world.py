"""Steps on text that the student wrote, for tests of real ranks: seeded answers in groups, and the steps by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_processes import Place
from student_world import VOCABULARY_SIZE, Teacher, adamw, build, make_run, sequences_of
from tiny_models import tiny_model

from configs.losses import LOSSES
from configs.schema import Run
from trainer.loop.plan import cut_units, plan_step
from trainer.types import Sequence

STEPS = 2
BUDGETS = (4096, 48)  # tokens: one micro-batch, and about four
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "batch": ("hidden", {
        "discount": 1.0, "baseline": "batch", "reward_weight": 0.5, "whiten": "reward", "max_ratio": 1.3,
    }),
    "group": ("token", {"discount": 0.5, "baseline": "group", "whiten": "all", "closed_form": False}),
}  # fmt: skip
"""Kind of labels and parameters of policy_gradient."""


def run_of(folder: Path, case: str, **student: Any) -> Run:
    kind, parameters = CASES[case]
    run = make_run(folder, student=student, labels={"kind": kind}, objective=["cross_entropy"])
    # what `check` would ask of answers is not asked: these are written here
    return run.model_copy(update={"objective": (LOSSES.validate({"loss": "policy_gradient", **parameters}),)})


def answers_of(step: int) -> list[Sequence]:
    """Two answers to each prompt, of one of which nothing is learnt; written by a student that is another by now."""
    random, made = np.random.default_rng(100 + step), []
    for index, sequence in enumerate(sequences_of(step)):
        written = random.normal(-5.5, 0.4, sequence.num_tokens).astype(np.float32)
        made.append(
            replace(
                sequence,
                prompt_id=f"{step}:{index // 2}",
                sample=index % 2,
                author="student",
                reward=float(random.normal(1.0, 2.0)),
                columns={"rollout_logprobs": written},
            )
        )
    return made


def train_on_rollouts(case: str, place: Place, *, budget: int, name: str) -> tuple[list[dict[str, float]], Path]:
    """Metrics of each step, and the exported student."""
    run = run_of(place.folder.parent, case, zero_stage=2)
    rank, teacher, metrics = build(run, place), Teacher(), []
    for step in range(1, STEPS + 1):
        sequences = answers_of(step)
        plan = plan_step([s.num_tokens for s in sequences], world=place.world, token_budget=budget)
        batch = cut_units(sequences, plan, step=step, units_per_rank=2)[place.rank]
        rank.stage(batch, [teacher.label(unit, run.labels) for unit in batch.units])
        metrics.append({k: v for k, v in rank.step(step).values.items() if not k.startswith("student/")})
    folder = place.folder / "exports" / name
    rank.export(folder)
    rank.close()
    return metrics, folder


def train_by_hand(
    folder: Path, case: str, rates: list[float], **changes: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The same steps in float64 with transformers, one answer at a time, and the formulas written out in loops.
    `changes` of the parameters, for controls."""
    run, parameters = run_of(folder, case), {**CASES[case][1], **changes}
    model, teacher = (tiny_model("llama", seed=seed).double() for seed in (2, 1))
    optimizer, records = adamw(model, run, model.config), []
    for step in range(1, STEPS + 1):
        answers = [_Answer(model, teacher, sequence, parameters) for sequence in answers_of(step)]
        answers = [one for one in answers if one.num_rows]
        count = sum(one.num_rows for one in answers)
        total = torch.zeros((), dtype=torch.float64)
        for one in answers:
            total = total + one.surrogate(answers, parameters) - one.inside
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rates[step - 1]
        optimizer.step()
        value = sum(one.value for one in answers)
        records.append({
            "train/policy_gradient": value / count,
            "train/loss": (value - sum(one.inside.item() for one in answers)) / count,
            "train/grad_norm": float(norm),
            "train/policy_gradient_truncated": sum(one.truncated for one in answers) / count,
        })  # fmt: skip
    return {name: p.detach() for name, p in model.named_parameters()}, records


class _Answer:
    """What the formulas need of one answer."""

    def __init__(
        self, model: torch.nn.Module, teacher: torch.nn.Module, sequence: Sequence, parameters: dict[str, Any]
    ) -> None:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
        rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
        targets = ids[rows + 1][:, None]
        whole = model(input_ids=ids[None], use_cache=False).logits[0, rows].softmax(-1)
        kept = whole[:, :VOCABULARY_SIZE].sum(1, keepdim=True)
        self.inside, log_q = kept.log().sum(), (whole[:, :VOCABULARY_SIZE] / kept).log()
        with torch.no_grad():
            log_p = teacher(input_ids=ids[None], use_cache=False).logits[0, rows, :VOCABULARY_SIZE].log_softmax(-1)
        self.kl = (log_q.exp() * (log_q - log_p)).sum(1)
        self.log_q, self.log_p = log_q.gather(1, targets)[:, 0], log_p.gather(1, targets)[:, 0]
        self.written = torch.from_numpy(sequence.columns["rollout_logprobs"]).double()[rows]
        self.num_rows, self.group, self.reward = len(rows), sequence.group, sequence.reward
        self.gamma, self.closed = parameters["discount"], parameters.get("closed_form", True)
        self.as_written = self.returns(self.log_p - self.written)

    def returns(self, earned: torch.Tensor) -> list[float]:
        """Of each token what is sampled of its return."""
        own = [0.0 if self.closed else float(one) for one in earned]
        return [
            own[t] + sum(self.gamma ** (u - t) * float(earned[u]) for u in range(t + 1, self.num_rows))
            for t in range(self.num_rows)
        ]

    def surrogate(self, answers: list[_Answer], parameters: dict[str, Any]) -> torch.Tensor:
        """What has the gradient of the answer's rows; keeps their value."""
        members = [one for one in answers if one.group == self.group] if parameters["baseline"] == "group" else answers
        members = members if len(members) > 1 else answers
        others = [one for one in members if one is not self]
        baseline = float(np.mean([np.mean(one.as_written) for one in others]))
        weight = parameters.get("reward_weight", 0.0)
        advantage = weight * (self.reward - float(np.mean([one.reward for one in others])))
        if parameters["whiten"] != "none":
            advantage /= float(np.std([one.reward for one in members])) + 1e-6
        scale = 1.0
        if parameters["whiten"] == "all":
            mean = np.mean([np.mean(one.as_written) for one in members])
            square = np.mean([np.mean(np.square(one.as_written)) for one in members])
            scale = 1.0 / (float(np.sqrt(square - mean**2)) + 1e-6)
        ratios = (self.log_q.detach() - self.written).exp()
        most = parameters.get("max_ratio", 2.0)
        self.truncated = int((ratios > most).sum())
        total, self.value = torch.zeros((), dtype=torch.float64), -weight * self.reward
        for t, of_now in enumerate(self.returns((self.log_p - self.log_q).detach())):
            ratio = min(float(ratios[t]), most)
            total = total - ratio * ((of_now - baseline) * scale + advantage) * self.log_q[t]
            if self.closed:
                total, self.value = total + self.kl[t], self.value + self.kl[t].item()
            else:
                self.value += ratio * (self.log_q[t] - self.log_p[t]).item()
        return total

"""A small world for student ranks: a run, a teacher, seeded sequences with their labels, and the same steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_processes import Place
from tiny_models import tiny_folder, tiny_model

from configs.labels import Labels, Token
from configs.schema import Run
from trainer.labels.encoding import load_encoding
from trainer.loop.plan import cut_units, plan_step
from trainer.model.student import StudentRank
from trainer.model.zero_config import deepspeed_config
from trainer.protocols import StudentInfo
from trainer.types import LabelHeader, RankBatch, RowIds, Sequence, SoftLabelBlock, StepPlan, StudentPlan, Unit

VOCABULARY_SIZE = 283
HOST = torch.device("cpu")
STEPS = 8
LONELY_STEP = 3  # has one sequence only, so every rank but one trains an empty micro-batch


@dataclass(frozen=True)
class Vocabulary:
    size: int = VOCABULARY_SIZE
    fingerprint: str = "tiny"

    def of_teacher(self, name: str) -> Vocabulary:
        return self


def make_models(folder: Path) -> None:
    """teacher/ and student/ under a folder; once, before ranks start."""
    tiny_folder(folder / "teacher", seed=1)
    for family in ("llama", "gemma2"):
        tiny_folder(folder / family, family, seed=2, tied=True)
    tiny_folder(folder / "untied", "qwen2", seed=2, tied=False)
    tiny_folder(folder / "large", hidden_size=512, intermediate_size=1536, num_hidden_layers=8)  # 82 MB


def make_run(folder: Path, **changes: Any) -> Run:
    """A run on these models; `changes` are laid over its sections."""
    sections: dict[str, Any] = {
        "name": "small",
        "seed": 5,
        "student": {"model": {"path": str(folder / "llama")}, "ranks": 1, "loss_chunk_rows": 16},
        "teacher": {"model": {"path": str(folder / "teacher")}},
        "prompts": {"path": "unused.jsonl"},
        "data": {"max_length": 40},
        "labels": {"kind": "topk", "k": 8},
        "objective": [{"loss": "forward_kl"}, {"loss": "cross_entropy", "weight": 0.25}],
        # A large eps: Adam otherwise turns the sign of rounding noise into a full step.
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 2},
        "training": {"steps": STEPS, "micro_batch_tokens": 4096},
    }
    for name, change in changes.items():
        section = sections.get(name)
        merged = isinstance(section, Mapping) and isinstance(change, Mapping) and name != "labels"
        sections[name] = {**section, **change} if merged else change
    return Run.model_validate(sections)


def make_plan(run: Run, *, dtype: str = "float32") -> StudentPlan:
    config = deepspeed_config(
        student=run.student, optimizer=run.optimizer, dtype=dtype, on_accelerator=False, hidden_size=64
    )
    if run.student.zero_stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard even what is tiny
    return StudentPlan(
        dtype=dtype,
        device_type=HOST.type,
        backend="gloo",
        attention="auto",
        deepspeed=config,
        collective_timeout_s=60.0,
    )


def build(run: Run, place: Place, *, dtype: str = "float32") -> StudentRank:
    return build_with_info(run, place, dtype=dtype)[0]


def build_with_info(
    run: Run, place: Place, *, dtype: str = "float32", plan: StudentPlan | None = None
) -> tuple[StudentRank, StudentInfo]:
    rank = StudentRank(
        run,
        plan or make_plan(run, dtype=dtype),
        rank=place.rank,
        world=place.world,
        device=HOST,
        vocabulary=Vocabulary(),
        total_steps=STEPS,
    )
    return rank, rank.build()


def sequences_of(step: int, count: int = 6) -> list[Sequence]:
    """Seeded token rows with one or two answers each; one row has no loss at all."""
    random = np.random.default_rng(step)
    sequences = []
    for index in range(1 if step == LONELY_STEP else count):
        length = int(random.integers(8, 40))
        mask = np.zeros(length, dtype=bool)
        if index != 1:
            mask[length // 3 : length // 2] = True
            mask[length // 2 + 2 : length - 1] = True
        ids = random.integers(3, VOCABULARY_SIZE, length).astype(np.int32)
        sequences.append(Sequence(f"{step}:{index}", ids, mask, author="dataset"))
    return sequences


class Teacher:
    """Makes label blocks with transformers."""

    def __init__(self, name: str = "teacher", *, seed: int = 1, **changes: object) -> None:
        self._name = name
        self._model = tiny_model("llama", seed=seed, **changes)

    @torch.no_grad()
    def label(self, unit: Unit, spec: Labels, given: RowIds | None = None) -> SoftLabelBlock:
        encoding = load_encoding(spec)
        parts, asked = [], iter(() if given is None else given.of_sequences(unit))
        for sequence in unit.sequences:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
            rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
            output = self._model(input_ids=ids[None], output_hidden_states=True)
            source = (
                output.hidden_states[-1][0] if encoding.needs == "hidden" else output.logits[0, :, :VOCABULARY_SIZE]
            )
            extra = {}
            if layers := getattr(encoding, "layers", ()):
                extra["states"] = torch.stack([output.hidden_states[layer][0, rows] for layer in layers], dim=1)
            if encoding.takes_ids:
                none = np.zeros((0, encoding.num_given), dtype=np.int32)
                extra["given_ids"] = torch.from_numpy(next(asked) if len(rows) else none)
            parts.append(encoding.encode(source[rows], ids[rows + 1], **extra))
        columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        header = LabelHeader(
            teacher=self._name,
            weights_version="1",
            encoding=spec,
            tokenizer_fingerprint="tiny",
            vocabulary_size=VOCABULARY_SIZE,
            hidden_size=self._model.config.hidden_size,
            dtype="float32",
        )
        offsets = np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)])
        return SoftLabelBlock(header=header, tokens_hash=unit.tokens_hash(), columns=columns, row_offsets=offsets)


def batch_of(step: int, place: Place, *, token_budget: int) -> RankBatch:
    sequences = sequences_of(step)
    plan = plan_step([s.num_tokens for s in sequences], world=place.world, token_budget=token_budget)
    return cut_units(sequences, plan, step=step, units_per_rank=2)[place.rank]


def labels_of(run: Run) -> Labels:
    return run.labels


def stage(rank: StudentRank, run: Run, place: Place, step: int, teacher: Teacher, *, token_budget: int = 4096) -> None:
    batch = batch_of(step, place, token_budget=token_budget)
    rank.stage(batch, [teacher.label(unit, labels_of(run)) for unit in batch.units])


def train(
    rank: StudentRank,
    run: Run,
    place: Place,
    *,
    first: int = 1,
    last: int = STEPS,
    token_budget: int = 4096,
    teacher: Teacher | None = None,
) -> list[dict[str, float]]:
    """Stage and step; the metrics without what depends on the clock."""
    teacher, metrics = teacher or Teacher(), []
    for step in range(first, last + 1):
        stage(rank, run, place, step, teacher, token_budget=token_budget)
        metrics.append({k: v for k, v in rank.step(step).values.items() if not k.startswith("student/")})
    return metrics


def train_on_given_ids(
    rank: StudentRank, run: Run, place: Place, *, first: int = 1, last: int = STEPS, token_budget: int = 4096
) -> tuple[list[dict[str, float]], dict[int, tuple[RowIds, ...]]]:
    """Choose ids, stage and step as the loops do, each step on ids of the weights before the step before it; metrics,
    and what was chosen."""
    teacher, metrics, chosen = Teacher(), [], {}
    batches = {step: batch_of(step, place, token_budget=token_budget) for step in range(first, last + 2)}
    for step in range(first, last + 1):
        for ahead in (step, step + 1):
            if ahead not in chosen:
                chosen[ahead] = rank.propose(batches[ahead])
        units = zip(batches[step].units, chosen[step], strict=True)
        rank.stage(batches[step], [teacher.label(unit, run.labels, ids) for unit, ids in units])
        metrics.append({k: v for k, v in rank.step(step).values.items() if not k.startswith("student/")})
    return metrics, chosen


def make_run_of_tasks(folder: Path, **student: Any) -> Run:
    """A task that compares answers with a reference, and one of weighted hard labels that asks no teacher."""
    pairs = {"labels": "token", "objective": [{"loss": "dpo", "beta": 0.5}], "weight": 0.7}
    plain = {"labels": "none", "objective": [{"loss": "cross_entropy", "weight": 0.5}], "teacher": "teacher"}
    return make_run(folder, student=student, tasks={"pairs": pairs, "plain": plain})


STEPS_OF_TASKS = {
    "packed x 1": (1, "ppqqpq"),
    "packed x 4": (4, "ppqqppqqqqppqqpp"),
    "unpacked x 4": (4, "pqqp"),
    "unpacked x 1, compared": (1, "p"),
    "unpacked x 1, weighted": (1, "q"),
}
"""Micro-batches of every rank, and what a step holds: pairs of answers (p) and weighted sequences (q), those of an
unpacked step once for each rank, so that a micro-batch holds one of them."""


def groups_of_tasks(name: str, *, world: int) -> list[list[Sequence]]:
    """Seeded pairs and weighted sequences of a step of `STEPS_OF_TASKS`."""
    number, (_, kinds) = list(STEPS_OF_TASKS).index(name), STEPS_OF_TASKS[name]
    if name.startswith("unpacked"):
        kinds = kinds * world
    drawn = iter([s for s in sequences_of(number + 200, count=30) if s.num_loss_tokens])
    groups = []
    for place, kind in enumerate(kinds):
        prompt = f"{number}:{place}"
        if kind == "p":
            answers = [replace(next(drawn), prompt_id=prompt, sample=sample, task="pairs") for sample in (0, 1)]
            groups.append(answers)
        else:
            weight = (1.0, 0.5, 2.0)[place % 3]
            groups.append([replace(next(drawn), prompt_id=prompt, task="plain", weight=weight)])
    return groups


def batch_of_tasks(name: str, place: Place) -> RankBatch:
    """This rank's share of a step, in exactly as many micro-batches as the step says."""
    groups = groups_of_tasks(name, world=place.world)
    count, _ = STEPS_OF_TASKS[name]
    planned: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(place.world)]
    start = 0
    for number, group in enumerate(groups):
        planned[number % place.world][number // place.world % count] += range(start, start + len(group))
        start += len(group)
    sequences = [sequence for group in groups for sequence in group]
    plan = StepPlan(
        micro_batches=tuple(tuple(tuple(batch) for batch in rank) for rank in planned),
        tokens=tuple(sum(sequences[i].num_tokens for batch in rank for i in batch) for rank in planned),
    )
    step = list(STEPS_OF_TASKS).index(name) + 1
    return cut_units(sequences, plan, step=step, units_per_rank=2)[place.rank]


def train_on_tasks(
    rank: StudentRank, place: Place, names: Iterable[str], *, change: Callable[[Unit], Unit] = lambda u: u
) -> Iterator[dict[str, float]]:
    """Stage and step. `change`: of what the reference is shown in place of a unit, for controls."""
    teacher = Teacher()
    for name in names:
        batch = batch_of_tasks(name, place)
        scored = [unit for unit in batch.units if unit.kind[0] == "pairs"]
        blocks = [teacher.label(change(unit), Token()) for unit in scored]
        blocks = [replace(b, tokens_hash=u.tokens_hash()) for b, u in zip(blocks, scored, strict=True)]
        rank.stage(batch, blocks)
        yield dict(rank.step(batch.step).values)


@dataclass(frozen=True)
class ByHand:
    """One step worked out by hand."""

    values: dict[str, float]
    weights: dict[str, torch.Tensor]  # after the step


def train_on_tasks_by_hand(
    run: Run, rates: list[float], *, world: int, swapped: bool = False, weighted: bool = True
) -> list[ByHand]:
    """The same in float64 with transformers and the formulas written out, one sequence at a time. For controls:
    `swapped`, the rejected answer is preferred; not `weighted`, all rows count alike."""
    model, reference = (tiny_model("llama", seed=seed).double() for seed in (2, 1))
    optimizer = _adamw(model, run)
    made = []
    for name, rate in zip(STEPS_OF_TASKS, rates, strict=False):
        groups = groups_of_tasks(name, world=world)
        count = sum(s.num_loss_tokens for group in groups for s in group)
        dpo, cross_entropy, padding = [], torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for group in groups:
            given = [_logprob(model, sequence) for sequence in group]
            if len(group) == 2:
                margins = [own - _logprob(reference, s)[0].detach() for (own, _), s in zip(given, group, strict=True)]
                dpo.append(-((-0.5 if swapped else 0.5) * (margins[0] - margins[1])).sigmoid().log())
                padding = padding - 0.7 * sum(inside for _, inside in given)
            else:
                weight = group[0].weight if weighted else 1.0
                cross_entropy = cross_entropy - weight * given[0][0]
                padding = padding - 0.5 * weight * given[0][1]
        loss = (0.5 * cross_entropy + padding) / count
        values = {}
        if dpo:
            loss = loss + 0.7 * torch.stack(dpo).mean()
            values["task/pairs/dpo"] = torch.stack(dpo).mean().item()
        if own := sum(group[0].num_loss_tokens for group in groups if len(group) == 1):
            values["task/plain/cross_entropy"] = cross_entropy.item() / own
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        values |= {"train/loss": loss.item(), "train/grad_norm": float(norm)}
        made.append(ByHand(values, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return made


def _logprob(model: torch.nn.Module, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sequence's target ids within the vocabulary, and of the vocabulary within all rows; over its loss rows."""
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
    probabilities = model(input_ids=ids[None], use_cache=False).logits[0, rows].softmax(-1)
    inside = probabilities[:, :VOCABULARY_SIZE].sum(1)
    return (probabilities.gather(1, ids[rows + 1][:, None])[:, 0] / inside).log().sum(), inside.log().sum()


def _adamw(model: torch.nn.Module, run: Run) -> torch.optim.AdamW:
    return adamw(model, run, model.config)


def adamw(model: torch.nn.Module, run: Run, config: Any) -> torch.optim.AdamW:
    """Of all parameters; `config` of the transformers model among them."""
    config._attn_implementation = "eager"
    settings = run.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps)


def train_by_hand(run: Run, steps: int, rates: list[float]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The same steps in float64 with transformers, torch's AdamW and the formulas written out, nothing packed."""
    model, settings = tiny_model("llama", seed=2).double(), run.optimizer
    optimizer = _adamw(model, run)
    teacher, records = Teacher(), []
    for step in range(1, steps + 1):
        sequences = sequences_of(step)
        count = sum(s.num_loss_tokens for s in sequences)
        kl_sum, ce_sum, padding_sum = torch.zeros(3, dtype=torch.float64)
        for sequence in sequences:
            if not sequence.num_loss_tokens:
                continue
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
            rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
            q_of_all_rows = model(input_ids=ids[None], use_cache=False).logits[0, rows].softmax(-1)
            inside = q_of_all_rows[:, :VOCABULARY_SIZE].sum(1, keepdim=True)
            q = q_of_all_rows[:, :VOCABULARY_SIZE] / inside
            padding_sum = padding_sum - inside.log().sum()
            columns = teacher.label(Unit("u", (sequence,)), labels_of(run)).columns
            kept = torch.from_numpy(columns["ids"].astype(np.int64))
            p = torch.cat(
                [torch.from_numpy(columns["logprobs"]).double(), torch.from_numpy(columns["tail"]).double()], 1
            )
            p = p.exp() / p.exp().sum(1, keepdim=True)
            q_kept = q.gather(1, kept)
            events = torch.cat([q_kept, 1 - q_kept.sum(1, keepdim=True)], 1)
            kl_sum = kl_sum + (p * (p.log() - events.log())).sum()
            ce_sum = ce_sum - q.gather(1, ids[rows + 1][:, None]).log().sum()
        loss = (kl_sum + 0.25 * ce_sum + 1.25 * padding_sum) / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rates[step - 1]
        optimizer.step()
        records.append(
            {
                "train/loss": loss.item(),
                "train/forward_kl": kl_sum.item() / count,
                "train/cross_entropy": ce_sum.item() / count,
                "train/padding": padding_sum.item() / count,
                "train/grad_norm": float(norm),
                "train/loss_tokens": float(count),
                "train/tokens": float(sum(s.num_tokens for s in sequences)),
            }
        )
    return {name: p.detach() for name, p in model.named_parameters()}, records

"""One rank of the student: everything between a staged batch and an optimizer step, with neither Ray nor a launcher.

    stage (background)             step (collective)
    ------------------             -----------------
    check blocks against units     for each micro-batch:
    pack micro-batches into          to_device -> base model -> head and loss in one -> backward
      (pinned) host memory         one optimizer step -> StepMetrics

Loss and gradients are sums over loss rows divided by the step's global number of loss tokens, so neither the number of
ranks nor of micro-batches changes what is learned. A loss that is not finite on any rank makes the step a skipped one
on all ranks.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from configs.schema import Run
from trainer.checks.held_out import Measure, evaluate_held_out, without_samples
from trainer.checks.self_tests import Subject, run_self_tests
from trainer.checks.trained import evaluate_trained
from trainer.errors import ConfigError
from trainer.loop.packing import to_device
from trainer.loop.plan import units_taking_ids
from trainer.loop.staging import StagedStep, Staging, Vocabulary
from trainer.loop.together import Judged, weight_shares
from trainer.losses.fused import head_loss
from trainer.model.attention import border_arguments
from trainer.model.attention_choice import changing_lengths, choose_attention
from trainer.model.chosen_ids import Choice
from trainer.model.collectives import all_gather, all_gather_objects
from trainer.model.export import export_student
from trainer.model.fast import use_fast_products
from trainer.model.features import FeaturesOfBatch, FeatureTerm, make_projectors
from trainer.model.generate import generate
from trainer.model.head import Head
from trainer.model.load import HeadCall, StatesCall, StudentModule, load_config, load_student
from trainer.model.optimizer import learning_rate
from trainer.model.products import choose_products, products_state, products_told, restore_products
from trainer.model.rollout_columns import Columns
from trainer.model.task_losses import TaskLosses
from trainer.model.weight_buckets import WeightBuckets
from trainer.model.zero import ZeroModel, flush_to_disk, num_elements, sharded_loading, start_processes, stop_processes
from trainer.protocols import SelfTestResult, StudentInfo
from trainer.types import (
    BucketHeader,
    Evaluation,
    RankBatch,
    RowIds,
    SoftLabelBlock,
    StepMetrics,
    StudentPlan,
    TokenBatch,
    Unit,
    WeightBucket,
    WeightForm,
)


class StudentRank:
    """One training process. Methods marked collective must be called on all ranks, in the same order."""

    def __init__(
        self,
        run: Run,
        plan: StudentPlan,
        *,
        rank: int,
        world: int,
        device: torch.device,
        vocabulary: Vocabulary,
        total_steps: int,
    ) -> None:
        self._run, self._plan = run, plan
        self._rank, self._world, self._device = rank, world, device
        self._vocabulary = vocabulary
        self._total_steps = total_steps
        self._staging = Staging(run, vocabulary=vocabulary, device=device, last_step=total_steps)
        self._losses = TaskLosses(run, self._staging, world=world, total_steps=total_steps)
        self._features = FeatureTerm.all_of(run)
        self._on_accelerator = device.type != "cpu"
        self._owns_processes = False
        self._zero: ZeroModel | None = None  # until it is built
        self._buckets: tuple[WeightForm, WeightBuckets] | None = None  # as they were last asked for

    def build(self) -> StudentInfo:
        """Collective. Join the process group, load and shard the student."""
        started = time.monotonic()
        disable_progress_bar()
        self._owns_processes = start_processes(
            backend=self._plan.backend,
            timeout_s=self._plan.collective_timeout_s,
            rank=self._rank,
            world=self._world,
            device=self._device,
        )
        self._module = self._load()
        rows = self._module.config.get_text_config().vocab_size
        self._losses.build(padded=rows > self._vocabulary.size, compiled=self._on_accelerator)
        choose_products(self._module, rank=self._rank, device=self._device, dtype=self._dtype)
        use_fast_products(self._module.causal.base_model, device=self._device, dtype=self._dtype)
        self._zero = ZeroModel(
            self._module, config=self._plan.deepspeed, optimizer=self._run.optimizer, device=self._device
        )
        torch.manual_seed(self._run.seed + 1 + self._rank)  # dropout differs between ranks
        return self._info(time.monotonic() - started)

    def _load(self) -> StudentModule:
        """The module that is trained, in host memory or sharded, with the attention that fits it."""
        student = self._run.student
        config = load_config(student.model, role="student.model")
        self._attention = choose_attention(
            self._plan.attention,
            device_type=self._plan.device_type,
            dtype=self._plan.dtype,
            config=config,
            trust_remote_code=student.model.trust_remote_code,
        )
        self._lengths = changing_lengths(
            config, role="student.model", trust_remote_code=student.model.trust_remote_code
        )
        torch.manual_seed(self._run.seed)  # adapters start equal on all ranks
        module = load_student(
            student.model,
            dtype=self._dtype,
            attention=self._attention,
            vocabulary_size=self._vocabulary.size,
            trained=student.trained,
            activation_checkpointing=student.activation_checkpointing,
            sharded=sharded_loading(self._plan.deepspeed),
        )
        module.projectors = make_projectors(self._features, dtype=self._dtype, seed=self._run.seed)
        return module

    def _info(self, load_s: float) -> StudentInfo:
        parameters = list(self._module.causal.parameters())
        return StudentInfo(
            parameters=sum(num_elements(p) for p in parameters),
            trainable_parameters=sum(num_elements(p) for p in parameters if p.requires_grad),
            dtype=self._plan.dtype,
            attention=self._attention,
            zero_stage=self._plan.deepspeed["zero_optimization"]["stage"],
            load_s=load_s,
            products=products_told(self._device, self._dtype),
        )

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._plan.dtype)

    def propose(self, batch: RankBatch) -> tuple[RowIds, ...]:
        """Collective, between two steps. The ids that the student finds likeliest now, for each unit of this rank whose
        labels take ids, in order; those of a step that were in the checkpoint are taken from there."""
        chosen, asked = self._staging.chosen, units_taking_ids(batch, self._losses.tasks)
        known = torch.tensor([chosen.knows(batch.step, asked)], dtype=torch.int32, device=self._device)
        if not all_gather(known).all():
            self._zero.train(False)
            choose = Choice(
                self._forward,
                self._module.head_shape,
                vocabulary_size=self._vocabulary.size,
                chunk_rows=self._run.student.loss_chunk_rows,
                device=self._device,
            )
            chosen.keep(batch.step, choose.ids(batch, self._losses.tasks))
        return tuple(chosen.of(batch.step, unit) for unit in asked)

    def stage(self, batch: RankBatch, blocks: AbstractSequence[SoftLabelBlock]) -> None:
        """Check and pack this rank's share of a step into host memory. Not collective; may run beside `step`.

        Staging a step again replaces it. Raises `UnitRejected` naming the unit whose labels are not what was asked.
        """
        self._staging.stage(batch, blocks)

    def stage_evaluation(self, units: AbstractSequence[Unit], blocks: AbstractSequence[SoftLabelBlock | None]) -> None:
        """Keep this rank's held-out units with their hidden labels, or None where nobody scores them, for all
        evaluations. Not collective."""
        self._staging.stage_held_out(units, blocks)

    def step(self, step: int) -> StepMetrics:
        """Collective. Forward and backward of every staged micro-batch, then one optimizer step."""
        staged = self._staging.take(step)
        self._staging.chosen.forget(step)
        started = time.perf_counter()
        self._zero.train(True)
        sums = torch.zeros(1 + len(self._losses.term_names), dtype=torch.float64, device=self._device)
        columns = self._losses.columns(staged, self._device)
        for host_batch, of_parts in zip(staged.micro_batches, columns, strict=True):
            sums += self._train_on(to_device(host_batch, self._device), staged, of_parts)
        self._wait_for_device()
        computed = time.perf_counter()
        rate = learning_rate(step, settings=self._run.optimizer, total_steps=self._total_steps)
        outcome = self._zero.step(rate)
        self._wait_for_device()
        own = [staged.num_tokens, computed - started, time.perf_counter() - computed, peak_bytes(self._device)]
        judged = self._losses.judged(staged)
        numbers = [*(number for counts in judged.values() for number in counts), *own]
        ranks = all_gather(torch.cat([sums, torch.tensor(numbers, dtype=sums.dtype, device=self._device)]))
        totals, slowest = ranks.sum(0), ranks.amax(0)
        counted = totals[len(sums) : -4].reshape(-1, 2).tolist()
        judged = {key: Judged(*counts) for key, counts in zip(judged, counted, strict=True)}
        terms = self._losses.means(totals[1 : len(sums)].tolist(), staged, judged)
        scheduled = self._losses.told()
        if not outcome.skipped:
            self._losses.advance(terms, step)
        return StepMetrics(
            step=step,
            values={
                "train/loss": float(totals[0]) / self._world if staged.num_loss_tokens else math.nan,
                **terms,
                **scheduled,
                **weight_shares(judged, {name: total.num_loss_tokens for name, total in staged.totals.items()}),
                "train/grad_norm": outcome.grad_norm,
                "train/learning_rate": rate,
                "train/tokens": float(totals[-4]),
                "train/loss_tokens": float(staged.num_loss_tokens),
                "train/skipped": float(outcome.skipped),
                "train/micro_batches": float(len(staged.micro_batches)),
                "student/compute_s": float(slowest[-3]),
                "student/optimizer_s": float(slowest[-2]),
                "student/peak_bytes": float(slowest[-1]),
            },
        )

    def _train_on(self, batch: TokenBatch, staged: StagedStep, columns: AbstractSequence[Columns]) -> torch.Tensor:
        """Add one micro-batch's gradient; float64 [1 + terms]: the scaled loss and the bare terms, summed over rows.
        `columns` of its parts."""
        names = self._losses.term_names

        def loss_and_terms(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
            result = head_loss(
                hidden,
                weight,
                bias,
                batch.target_ids,
                head_shape=self._module.head_shape,
                vocabulary_size=self._vocabulary.size,
                parts=[self._losses.part(part, staged, own) for part, own in zip(batch.parts, columns, strict=True)],
                chunk_rows=self._run.student.loss_chunk_rows,
            )
            sums = torch.zeros(len(names), dtype=torch.float64, device=self._device)
            for part, values in zip(batch.parts, result.sums, strict=True):
                for name, value in values.items():
                    sums[names.index((part.task, name))] += value
            return result.loss, sums

        if not self._features:
            loss, sums = self._forward(batch, loss_and_terms)
        else:
            features = FeaturesOfBatch(
                self._features,
                self._module.projectors,
                batch.parts,
                self._losses.encodings,
                [self._losses.row_scale(part, staged) for part in batch.parts],
            )
            loss, sums, more, of_features = self._forward(batch, loss_and_terms, states_call=features.call())
            loss = loss + more
            sums[len(names) - len(of_features) :] = of_features
        # An infinite loss may have a finite gradient. NaN in its place is what DeepSpeed's skip, shared by all ranks,
        # looks for, and no rank has to wait for another before its backward.
        value = loss.detach()
        self._zero.backward(loss * torch.where(value.isfinite(), 1.0, torch.nan))
        return torch.cat([value.double()[None], sums])

    def _forward(
        self, batch: TokenBatch, head_call: HeadCall, *, states_call: StatesCall | None = None
    ) -> tuple[torch.Tensor, ...]:
        given = border_arguments(self._attention, batch.sequence_offsets, self._device)
        if states_call is not None:
            given = {**given, "states_call": states_call}
        return self._zero.forward(batch.token_ids, batch.position_ids, batch.loss_rows, head_call, **given)

    def _wait_for_device(self) -> None:
        if self._on_accelerator:
            torch.accelerator.synchronize(self._device)

    def evaluate(self, step: int, viewer_sequences: int) -> Evaluation:
        """Collective. Equal numbers on all ranks; samples on rank 0 only."""
        self._zero.train(False)
        evaluation = evaluate_held_out(
            self._staging.held_out,
            Measure(
                self._forward,
                self._module.head_shape,
                self._staging.teacher_head,
                shared_ids=self._staging.shared_ids,
                common_ids=self._staging.common_ids,
                mixes=self._losses.mixes(),
                vocabulary_size=self._vocabulary.size,
                chunk_rows=self._run.student.loss_chunk_rows,
                device=self._device,
            ),
            step=step,
            viewer_sequences=viewer_sequences,
        )
        if viewer_sequences:
            trained = evaluate_trained(
                self._staging.shown,
                self._forward,
                self._student_head,
                self._losses.part_labels,
                most=self._staging.num_shown,
                device=self._device,
            )
            evaluation = replace(evaluation, trained=trained)
        return evaluation if self._rank == 0 else without_samples(evaluation)

    def _student_head(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
        return Head(weight, bias, self._module.head_shape, self._vocabulary.size)

    def weights(self, version: int, index: int, form: WeightForm) -> tuple[BucketHeader, WeightBucket | None]:
        """Collective, between two steps. One bucket of the weights that training changes; the bucket on rank 0 only."""
        if self._buckets is None or self._buckets[0] != form:
            self._buckets = form, WeightBuckets(self._module, form)
        return self._buckets[1].bucket(version, index, keep=self._rank == 0)

    def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Collective, between two steps. float32 [L - 1]: the log-probabilities of tokens 1 .. L - 1 of a text, over
        all rows of the head, those of no token too: engines know no better."""
        self._zero.train(False)
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._device)
        length = len(ids)

        def of_targets(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor]:
            logits = Head(weight, bias, self._module.head_shape, len(weight)).logits(hidden)
            return (logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0],)

        given = border_arguments(self._attention, (0, length), self._device)
        rows = torch.arange(length, device=self._device)
        with torch.no_grad():
            (logprobs,) = self._zero.forward(ids[None], rows[None], rows[:-1], of_targets, **given)
        return logprobs.float().cpu().numpy()

    def save(self, step: int, folder: Path) -> None:
        """Collective. Write shards and random states into an existing folder and flush them; nothing is committed."""
        self._zero.save(folder)
        file = folder / f"rank_{self._rank}.pt"
        state = {"step": step, "world": self._world, "random": self._random_states(), "schedules": self._losses.state()}
        torch.save(state | {"chosen_ids": self._staging.chosen.state(), "products": products_state()}, file)
        flush_to_disk(file)

    def load(self, folder: Path) -> int:
        """Collective, before the first step. Continue from a committed checkpoint folder; returns its step."""
        file = folder / f"rank_{self._rank}.pt"
        first = folder / "rank_0.pt"
        if not first.is_file():
            raise ConfigError(f"{folder} is no checkpoint of a student: it has no {first.name}")
        world = torch.load(first, weights_only=True)["world"]
        if world != self._world:
            raise ConfigError(
                f"{folder} was written by {world} ranks, this run has {self._world}: set student.ranks: {world}"
            )
        state = torch.load(file, weights_only=True)
        self._zero.load(folder)
        self._set_random_states(state["random"])
        self._losses.restore(state["schedules"])
        self._staging.chosen.restore(state["chosen_ids"])
        restore_products(state.get("products"), device=self._device)
        return state["step"]

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"host": torch.get_rng_state()}
        if self._on_accelerator:
            states["device"] = torch.get_device_module(self._device).get_rng_state(self._device)
        return states

    def _set_random_states(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["host"])
        if self._on_accelerator:
            torch.get_device_module(self._device).set_rng_state(states["device"], self._device)

    def export(self, folder: Path, *, merge_adapter: bool = False) -> None:
        """Collective. Rank 0 writes the student (adapters alone, or merged) as a folder that transformers loads."""
        export_student(self._module, folder, first_rank=self._rank == 0, merge_adapter=merge_adapter)
        all_gather_objects(None)  # nobody leaves before the folder is complete

    def generate(
        self, prompts: AbstractSequence[np.ndarray], *, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Collective. Greedy continuations as int32 ids, a stop token included; the same on all ranks."""
        self._zero.train(False)
        return generate(
            self._module,
            self._zero.forward,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            vocabulary_size=self._vocabulary.size,
            device=self._device,
        )

    def self_test(self) -> tuple[SelfTestResult, ...]:
        """Collective. Packing, head, loss kernel and all-reduce on this device; changes nothing."""
        self._zero.train(False)
        subject = Subject(
            module=self._module,
            forward=self._zero.forward,
            attention=self._attention,
            losses=self._losses.tested(),
            compiled=self._losses.compiled,
            vocabulary_size=self._vocabulary.size,
            chunk_rows=self._run.student.loss_chunk_rows,
            dtype=self._dtype,
            device=self._device,
            max_length=self._run.data.max_length,
            lengths=self._lengths,
        )
        return run_self_tests(subject)

    def close(self) -> None:
        """Release what `build` made, which may be nothing; leave the process group if `build` joined it."""
        if self._zero is not None:
            self._zero.close()
        if self._owns_processes:
            stop_processes()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: tensors on its accelerator, or without one all that is resident."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)

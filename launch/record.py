"""What a run writes about itself beside its metrics: manifest, samples, generations, exit, student, report.

Written as things become known, so that a run that is killed leaves what it had.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from cluster.placement.resolve import Resolved
from cluster.placement.roles import replicas_of
from cluster.runtime import GPU
from configs.held_out import held_out_sets
from configs.rules import teachers_by_place
from configs.schema import Run
from configs.secrets import without_secrets
from launch.export import card_of, complete_student
from launch.report.artifacts import Manifest, read_generations, read_manifest
from launch.report.environment import manifest_environment
from launch.report.exactness import exactness_of
from launch.report.hours import Attempt, Devices, Hours, read_attempts
from launch.report.metrics import Records, read_metrics
from launch.report.page import BEFORE_START, sample_records, write_report
from launch.report.timeline import read_timeline
from launch.report.trained import trained_records
from launch.report.worst import worst_records
from trainer.data.readable import answer_of, readable_prompts
from trainer.errors import InfrastructureError
from trainer.loop.job import Job
from trainer.loop.rows import open_held_out
from trainer.records import read_parts
from trainer.run_folder import RunFolder, write_json, write_text
from trainer.types import Evaluation, Sequence

if TYPE_CHECKING:
    from trainer.loop.controller import Controller


class Record:
    """The artifacts of one run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._manifest: dict[str, Any] = {}
        self._job: Job | None = None

    def begin(
        self, job: Job, resolved: Resolved, *, started: float, changed: Iterable[str] = (), goes_on: bool = False
    ) -> None:
        """`changed`: inputs that are not what the run began with; where it `goes_on`, those of earlier starts stay."""
        earlier = read_manifest(self._folder)
        before = earlier if goes_on else {}
        devices, began = devices_of(resolved), self._command_began()
        attempt = {"began": began, "ended": None, "devices": devices.count, "kind": devices.kind}
        self._job = job
        run = job.run
        self._folder.exit.unlink(missing_ok=True)
        self._manifest = {
            **manifest_environment(),
            "config_hash": job.config_hash,
            "total_steps": job.loop.total_steps,
            "attempts": [*map(asdict, self.attempts(earlier)), attempt],
            "started": started,
            "phases_began_s": {
                "imports and checks": 0.0,
                BEFORE_START: started - self._command_began(),
            },
            "roles": roles_of(run, resolved),
            "reasons": list(resolved.reasons),
            "warnings": list(resolved.warnings),
            "training_losses": exactness_of(run),
            "changed_inputs": [*before.get("changed_inputs", []), *changed],
            "data": {
                "train_rows": job.rows_per_epoch,
                "evaluation_rows": len(job.evaluation),
                "vocabulary_size": job.inputs.vocabulary.size,
                "stop_ids": list(job.inputs.first.stop_ids),
            },
            "models": {
                **{place: teacher.model.model_dump() for place, teacher in teachers_by_place(run).items()},
                "student": run.student.model.model_dump(),
            },
        }
        self._write_manifest()

    def attempts(self, earlier: Manifest | None = None) -> list[Attempt]:
        """The starts before this one; one that was killed ended with its last record."""
        seen = self._folder.metrics.stat().st_mtime if self._folder.metrics.exists() else None
        return read_attempts(read_manifest(self._folder) if earlier is None else earlier, last_seen=seen)

    def phase(self, text: str) -> None:
        """A part of the run begins; the manifest holds when, in seconds after the process did."""
        self._manifest["phases_began_s"][text] = time.time() - self._command_began()
        self._write_manifest()

    @staticmethod
    def _command_began() -> float:
        return psutil.Process().create_time()

    def evaluation(self, when: str, evaluation: Evaluation) -> None:
        assert self._job is not None
        records = sample_records(evaluation.samples, self._job.inputs.tokenizer.decode)
        self._merge(self._folder.samples, {when: records})

    def looked(self, evaluation: Evaluation) -> None:
        """What an evaluation shows beside its numbers, over that of the one before: what the last step was trained on
        (of one that nothing was trained before, nothing), and held-out text that is furthest from the teacher's."""
        assert self._job is not None
        if evaluation.worst is not None and evaluation.worst.tokens:
            decode = self._job.inputs.tokenizer.decode
            write_json(self._folder.worst, worst_records(evaluation.worst, evaluation.step, decode))
        if evaluation.trained:
            inputs = self._job.inputs
            of_teacher = lambda task, name: inputs.tasks[task].aligner_of(name).teacher.template.tokenizer.decode  # noqa: E731
            write_json(self._folder.trained, trained_records(evaluation.trained, inputs.tokenizer.decode, of_teacher))

    def generation(self, who: str, rows: tuple[Sequence, ...], texts: AbstractSequence[np.ndarray]) -> None:
        """What the student wrote `before` or `after` training, or the `teacher`, to the prompts of held-out rows."""
        assert self._job is not None
        inputs, held_out = self._job.inputs, held_out_sets(self._job.run)[rows[0].task]
        read = lambda ids: inputs.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        shown: dict[str, Any] = {who: [read(text) for text in texts]}
        if len(read_generations(self._folder).get("prompts", ())) != len(rows):
            template = inputs.tasks[held_out.task.name].template
            read_from = open_held_out(self._job.run, inputs, held_out).rows
            system_prompt = held_out.rows.system_prompt
            shown["prompts"] = readable_prompts(read_from, rows, template, system_prompt=system_prompt)
            shown["reference"] = [read(answer_of(row)) for row in rows]
        self._merge(self._folder.generations, shown)

    def finish(self, controller: Controller) -> None:
        """The run came to its end: complete the student's folder and the manifest."""
        assert self._job is not None
        job = self._job
        job.inputs.tokenizer.chat_template = job.inputs.first.template.saved
        job.inputs.tokenizer.save_pretrained(self._folder.student)
        complete_student(self._folder.student, job.run, stop_ids=job.inputs.first.stop_ids)
        self._manifest |= {
            "finished": time.time(),
            "counters": counted(read_metrics(self._folder)) | asdict(job.counters),
            "self_tests": [{"name": r.name, "passed": r.passed, "numbers": r.numbers} for r in controller.self_tests],
            "resumed_from": controller.resumed_from,
            "student": asdict(controller.student_info),
        }
        self._write_manifest()
        card = card_of(self._folder, job.run, adapter=job.run.student.lora is not None, weights=self._folder.student)
        write_text(self._folder.student / "README.md", card)

    def ended(self, code: int, reason: str) -> None:
        """How the run ended, and the report of what it did until then; one that never began leaves only the former.

        Raises InfrastructureError where the end of a run that came to it cannot be noted. Otherwise what ended the run
        is more important than that it cannot be noted, and a report can be made again.
        """
        said = without_secrets(reason, environment=os.environ)
        if self._manifest:
            self._manifest["attempts"][-1]["ended"] = time.time()
            with contextlib.suppress(OSError):  # the exit code below is more important
                self._write_manifest()
        try:
            write_json(self._folder.exit, {"code": code, "reason": said, "time": time.time()})
        except OSError as error:
            if code == 0:
                raise InfrastructureError(
                    f"the run is trained to its end, but {self._folder.exit} cannot be written: {error}; make room on "
                    "the disk and run the same command again"
                ) from error
            _warn(f"{self._folder.exit} cannot be written: {error}")
        try:
            if self._folder.metrics.exists():
                write_report(self._folder)
        except OSError as error:
            advice = f"make room on the disk, then: stillhouse report {self._folder.path}"
            _warn(f"the report cannot be written: {error}; {advice}")

    def _write_manifest(self) -> None:
        write_json(self._folder.manifest, self._manifest)

    @staticmethod
    def _merge(path: Path, fields: dict[str, Any]) -> None:
        known = read_parts(path, dict[str, Any], tell=_warn)
        write_json(path, known | fields)


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # of a stream that goes to the same full disk
        print(f"warning: {text}", file=sys.stderr, flush=True)


def counted(records: Records) -> dict[str, int]:
    """Steps and what was in them, each once, and events by name, over all attempts of a run."""
    sums = {
        "trained_sequences": "step/sequences",
        "trained_tokens": "train/tokens",
        "trained_loss_tokens": "train/loss_tokens",
        "label_bytes": "labels/bytes",
    }
    totals = {name: sum(_whole(step.values.get(of)) for step in records.steps) for name, of in sums.items()}
    now_and_then = ("answers/written", "answers/empty", "answers/cut_off", "answers/dropped")
    for name in (*now_and_then, "labels/store_hits", "labels/store_misses", "labels/store_bytes"):
        counts = [step.values[name] for step in records.steps if name in step.values]
        totals |= {name.replace("/", "_"): sum(map(_whole, counts))} if counts else {}
    events = Counter(event.name for event in records.events)
    return {**events, "trained_steps": len(records.steps), **totals}


def _whole(number: float | None) -> int:
    return 0 if number is None or math.isnan(number) else int(number)


def devices_of(resolved: Resolved) -> Devices:
    """What a run holds: GPUs, or the cores that its processes use."""
    placement = resolved.placement
    if resolved.accelerator == GPU:
        return Devices(max(1, placement.num_gpus), "GPU")
    threads = int(resolved.student_environment.get("OMP_NUM_THREADS", "1"))
    used = threads * max(1, placement.num_slots)
    local = "RAY_ADDRESS" not in os.environ
    return Devices(max(1, min(used, len(os.sched_getaffinity(0))) if local else used), "core")


def hours_of(job: Job, record: Record, devices: Devices) -> Hours:
    """Of this start of a run; evaluations and saves of earlier ones say what they cost."""
    costs: dict[str, list[float]] = {}
    for span in read_timeline(job.folder):
        if span.lane == "student":
            costs.setdefault(span.kind, []).append(span.stop_s - span.start_s)
    return Hours(job.loop, devices, began=psutil.Process().create_time(), earlier=record.attempts(), costs=costs)


def roles_of(run: Run, resolved: Resolved) -> dict[str, Any]:
    """What runs where, for the manifest."""
    roles: dict[str, Any] = {
        "student": {
            "ranks": run.student.ranks,
            "accelerator": resolved.accelerator,
            "dtype": resolved.student.dtype,
            "attention": resolved.student.attention,
            "zero_stage": run.student.zero_stage,
        }
    }
    for plan in resolved.engines:
        roles[plan.actors] = {
            "engine": plan.engine.kind,
            "replicas": replicas_of(run, plan.role, plan.teacher).replicas,
            "tensor_parallel_size": plan.tensor_parallel_size,
            "dtype": plan.dtype,
        }
    return roles

"""`stillhouse train`: one run from its YAML to a report, on this machine or on the Ray cluster it is part of.

configuration, models, rows  ->  hardware, resolve  ->  Ray and reservations  ->  the controller  ->  report, exit
(errors here start nothing)                             (runtime: ray only)       (all the work)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster import nodes, ray_session, runtime
from cluster.health import Failure, FailurePolicy, RestartGroup
from cluster.in_process import InProcessSession
from cluster.model_files import ModelFiles, find_folder
from cluster.placement.hardware import Hardware
from cluster.placement.resolve import Resolved, resolve
from cluster.session import RaySession
from cluster.students.group import StudentJob
from configs.load import config_hash, dump_run, run_folder
from configs.schema import ModelSource, Run
from launch.check import raise_problems
from launch.contents import contents_of, dtypes_of
from launch.export import ADAPTER, stored_dtype
from launch.quiet import quiet_libraries
from launch.record import Record
from launch.report.metrics import MetricsLog, TensorBoardSink, Timeline, read_metrics
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from launch.resuming import Standing, new_length, refuse_changes, standing
from launch.stall import SAVE_GRACE_S, StallWatch, stall_timeout_s
from launch.stopping import StopRequest, preemptible
from launch.supported import load_supported
from trainer.checks.label_check import teacher_truth
from trainer.errors import ConfigError, InfrastructureError, StillhouseError
from trainer.loop.controller import Controller
from trainer.loop.job import Inputs, Job, make_job
from trainer.model.load import load_config
from trainer.model.teacher_answers import teacher_answers
from trainer.run_folder import RunFolder, write_text
from trainer.types import Unit

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""Of a file anywhere. Other errors of this type are timeouts and broken connections."""


def train(path: Path, overrides: list[str], *, skip_self_test: bool = False, wait_for_nodes: int | None = None) -> int:
    """Run a configuration to its end, resuming what its folder holds. Returns the exit code; raises StillhouseError.

    `wait_for_nodes`: begin only when so many nodes of the cluster at RAY_ADDRESS are alive.
    """
    with preemptible():
        return _train_in_folder(path, overrides, skip_self_test=skip_self_test, wait_for_nodes=wait_for_nodes)


def _train_in_folder(path: Path, overrides: list[str], *, skip_self_test: bool, wait_for_nodes: int | None) -> int:
    """`train`, while the signals of a scheduler are heard."""
    run = load_supported(path, overrides).run
    quiet_libraries()
    warnings, inputs = raise_problems(run)
    folder = RunFolder.create(run_folder(run))
    with folder.lock():
        record = Record(folder)
        contents = contents_of(run, inputs)
        here = standing(run, folder, contents)
        if here.finished:
            steps = len(read_metrics(folder).steps)
            print(f"{folder.path} is finished: {steps} steps, report in {folder.report}", flush=True)
            print("\n".join([*here.changed, closing_words(folder)]), flush=True)
            return 0
        try:
            _train(
                run,
                inputs,
                folder,
                record,
                warnings,
                contents=contents,
                here=here,
                skip_self_test=skip_self_test,
                wait_for_nodes=wait_for_nodes,
            )
        except StillhouseError as error:
            record.ended(error.exit_code, str(error))
            raise
        except (KeyboardInterrupt, asyncio.CancelledError):
            record.ended(130, "interrupted")
            raise KeyboardInterrupt from None
        except Exception as error:
            text = disk_trouble(error, folder.path)
            if text is not None:
                record.ended(InfrastructureError.exit_code, text)
                raise InfrastructureError(text) from error
            record.ended(1, f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:  # a plug-in or library of this process, with sys.exit() for example
            record.ended(1, repr(error))
            raise RuntimeError(f"a plug-in or a library ended the run by raising {error!r}") from error
        record.ended(0, "finished")
    with contextlib.suppress(OSError):  # the run has ended well, whoever may read that
        print(closing_words(folder), flush=True)
    return 0


def disk_trouble(error: Exception, folder: Path) -> str | None:
    """What to say where a disk, and no mistake in the code, ended the run: any failure with a file of the run folder,
    and with files elsewhere what only disks do."""
    if not isinstance(error, OSError):
        return None
    if isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder):
        return f"the run folder {folder} cannot be used: {error}"
    if error.errno in DISK_ERRORS:
        return f"a disk fails, of the run folder {folder} or of its inputs: {error}"
    return None


def closing_words(folder: RunFolder) -> str:
    """Where everything is, and what to do with it."""
    dtype = stored_dtype(folder.student)
    stored = f" in {dtype}" if dtype else ""
    if (folder.student / ADAPTER).exists():
        student = f"an adapter{stored}: peft loads it; stillhouse export --merge-adapter makes a whole model of it"
    else:
        student = f"a Hugging Face folder{stored}: transformers and vLLM load it"
    return "\n".join(
        [
            "",
            f"report    {folder.report}    (open it in a browser: curves, timeline, tokens, answers before and after)",
            f"student   {folder.student}    ({student})",
            "next      stillhouse export "
            f"{folder.path} my-student      copies the student, checked, with its model card",
            f"          stillhouse config show {folder.config}    every setting of this run; change one with --set",
        ]
    )


def _train(
    run: Run,
    inputs: Inputs,
    folder: RunFolder,
    record: Record,
    warnings: list[str],
    *,
    contents: dict[str, str],
    here: Standing,
    skip_self_test: bool,
    wait_for_nodes: int | None,
) -> None:
    started = time.time()
    write_text(folder.config, dump_run(run))
    with contextlib.ExitStack() as stack:
        resolved, cluster = _hardware(run, inputs, stack, wait_for_nodes=wait_for_nodes)
        dtypes = dtypes_of(resolved)
        changed = [*here.changed, *(refuse_changes(run, folder, here.after, dtypes) if here.after else [])]
        job = make_job(
            run,
            inputs,
            folder,
            config_hash=config_hash(run),
            teacher_dtype=resolved.scorer.dtype,
            skip_self_test=skip_self_test,
            contents=contents | dtypes,
            after=here.after,
        )
        length = new_length(run, here.after, job.loop.total_steps)
        progress = stack.enter_context(Progress(job.loop.total_steps))
        sinks = [TensorBoardSink(folder)] if run.report.tensorboard else []
        observer = RunObserver(
            metrics=MetricsLog(folder, sinks, tell=progress.note), timeline=Timeline(folder), progress=progress
        )
        stack.callback(observer.close)
        for text in (
            *warnings,
            *changed,
            *([length] if length else []),
            *job.stream.notes,
            *resolved.reasons,
            *resolved.warnings,
            *(cluster.warnings if cluster else ()),
        ):
            observer.event("note", text=text)
        record.begin(job, resolved, started=started, changed=changed, goes_on=here.after is not None)
        shared = cluster is not None and not cluster.owned
        with stall_watch(job, resolved, observer, record) as stall:
            controller = asyncio.run(_drive(job, resolved, observer, record, stall, shared=shared))
        progress.close()
        record.finish(controller)


def _hardware(
    run: Run, inputs: Inputs, stack: contextlib.ExitStack, *, wait_for_nodes: int | None
) -> tuple[Resolved, ray_session.RayCluster | None]:
    """What the run is resolved on; with `runtime: ray`, Ray is up afterwards and ends with the stack."""
    if wait_for_nodes is not None and (run.runtime == "in_process" or not os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"--wait-for-nodes {wait_for_nodes} waits for nodes of a Ray cluster, and none is named: set RAY_ADDRESS "
            "to the address of its head, and keep runtime: ray"
        )
    if run.runtime == "in_process":
        return resolve_run(run, inputs, Hardware.local()), None
    if os.environ.get("RAY_ADDRESS"):
        cluster = ray_session.start_ray(num_cpus=0)
        stack.callback(ray_session.stop_ray, cluster)
        if wait_for_nodes is not None:
            nodes.wait_for_nodes(
                wait_for_nodes,
                timeout_s=run.faults.start_timeout_s or nodes.JOIN_TIMEOUT_S,
                note=lambda text: print(text, flush=True),
            )
        return resolve_run(run, inputs, Hardware.of_ray()), cluster
    resolved = resolve_run(run, inputs, Hardware.local())
    store = ray_session.object_store_bytes(run.training.max_label_bytes)
    cluster = ray_session.start_ray(num_cpus=resolved.placement.num_slots, object_store_bytes=store)
    stack.callback(ray_session.stop_ray, cluster)
    return resolved, cluster


def resolve_run(run: Run, inputs: Inputs, hardware: Hardware) -> Resolved:
    """All that follows from a run, what was read for it, and the machines."""
    return resolve(
        run,
        hardware,
        vocabulary_size=inputs.vocabulary.size,
        tokenizer_fingerprint=inputs.vocabulary.fingerprint,
        stop_token_ids=inputs.stop_ids,
        student_config=load_config(run.student.model, role="student.model"),
        teacher_config=load_config(run.teacher.model, role="teacher.model"),
        teacher_bytes=_weight_bytes(run.teacher.model),
        student_bytes=_weight_bytes(run.student.model),
        offline=all(Path(model.path).is_dir() for model in (run.teacher.model, run.student.model)),
        bytecode_folder=runtime.bytecode_folder(),
    )


def _weight_bytes(source: ModelSource) -> int | None:
    """None where the weights are not on this machine yet."""
    folder = find_folder(source.path, source.revision)
    return None if folder is None else ModelFiles.of(folder).weight_bytes


async def _drive(
    job: Job, resolved: Resolved, observer: RunObserver, record: Record, stall: StallWatch | None, *, shared: bool
) -> Controller:
    """Open the session, run the controller, and close the session whatever happened. `shared`: the cluster was there
    before the run, so its nodes are checked first and watched for notices that they will be taken away."""

    def phase(text: str) -> None:
        record.phase(text)
        observer.phase(text)

    stop = StopRequest(observer)
    student = StudentJob(
        run=job.run,
        plan=resolved.student,
        vocabulary=job.inputs.vocabulary,
        total_steps=job.loop.total_steps,
    )
    session: Any
    if job.run.runtime == "in_process":
        session = InProcessSession(student, resolved, observer=observer)
    else:
        session = RaySession(student, resolved, folder=job.folder, observer=observer, shared=shared)
    controller = Controller(
        job,
        session,
        observer,
        stop_requested=stop.requested,
        read_block=session.read_block,
        restart_after=_restart_after(job.run),
        teacher_truth=_truth(job, resolved),
        teacher_answers=_answers(job),
        teacher_dtype=resolved.scorer.dtype,
        on_evaluation=record.evaluation,
        on_generation=record.generation,
        on_phase=phase,
    )
    watched = stall.over(stop) if stall is not None else contextlib.nullcontext()
    with stop.on_signals(can_wait=lambda: controller.in_loops), watched:
        try:
            if isinstance(session, RaySession):
                phase("reserving slots for the roles")
                await session.reserve()
            if shared:
                phase("checking the nodes")
                await session.check_nodes()
                stop.watch(session.watch_for_drain(stop.ask))
            await controller.run()
        except asyncio.CancelledError:
            stop.explain()
            raise
        finally:
            stop.leave()
            with contextlib.suppress(OSError):  # a record that cannot be written must not hide why the run ends
                phase("stopping the roles")
            await session.close()
    return controller


def stall_watch(
    job: Job, resolved: Resolved, observer: RunObserver, record: Record
) -> contextlib.AbstractContextManager[StallWatch | None]:
    """None with `runtime: in_process`: there a step blocks everything else, and somebody may sit in a debugger."""
    if job.run.runtime == "in_process":
        return contextlib.nullcontext()
    faults, plans = job.run.faults, (resolved.student, resolved.scorer, resolved.writer)
    return StallWatch(
        observer,
        timeout_s=stall_timeout_s(faults, start_timeout_s=max(plan.start_timeout_s for plan in plans if plan)),
        save_s=faults.step_timeout_s + SAVE_GRACE_S,
        file=job.folder.path / "stall.txt",
        ended=record.ended,
    )


def _truth(job: Job, resolved: Resolved) -> Callable[[Unit], Any]:
    def truth(unit: Unit) -> Any:
        model, size = job.run.teacher.model, job.inputs.vocabulary.size
        return teacher_truth(unit, model, vocabulary_size=size, dtype=resolved.scorer.dtype)

    return truth


def _answers(job: Job) -> Callable[[list[np.ndarray]], list[np.ndarray] | None]:
    source, most = job.run.teacher.model, job.run.report.generate_tokens
    return partial(teacher_answers, source=source, max_new_tokens=most, stop_ids=job.inputs.stop_ids)


def _restart_after(run: Run) -> Callable[[int], float | None]:
    policy = FailurePolicy.of_students(run.faults)

    def restart_after(failures: int) -> float | None:
        decision = policy.decide(Failure(kind="students_lost", count=failures))
        return decision.delay_s if isinstance(decision, RestartGroup) else None

    return restart_after

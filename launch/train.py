"""`stillhouse train`: one run from its YAML to a report, on this machine or on the Ray cluster it is part of.

configuration, models, rows  ->  hardware, resolve  ->  Ray and reservations  ->  the controller  ->  report, exit
(errors here start nothing)                             (runtime: ray only)       (all the work)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.lifecycle.health import Failure, FailurePolicy, RestartGroup
from cluster.prometheus import Exported
from configs.load import LoadedRun, config_hash, dump_run, load_run, run_folder
from configs.schema import Run
from launch.check.alignment import aligned_at_start
from launch.check.run import raise_problems
from launch.contents import contents_of, dtypes_of
from launch.export import ADAPTER, stored_dtype
from launch.log_level import log_level
from launch.notify import Notifier
from launch.process import DISK_ERRORS
from launch.quiet import quiet_libraries
from launch.record import Record, devices_of, hours_of
from launch.report.artifacts import read_manifest
from launch.report.exactness import told_at_start
from launch.report.hours import Hours, read_attempts, spent
from launch.report.metrics import MetricsLog, Timeline, read_metrics
from launch.report.observer import RunObserver
from launch.report.progress import Progress
from launch.resuming import Standing, new_length, refuse_changes, standing
from launch.runtimes import Runtime, open_runtime
from launch.stall import SAVE_GRACE_S, StallWatch, stall_timeout_s
from launch.stopping import StopRequest, preemptible
from launch.stored import refuse_missing
from launch.trackers.trackers import Trackers
from trainer.errors import ConfigError, InfrastructureError, StillhouseError
from trainer.loop.control_ids import with_control_ids
from trainer.loop.controller import Controller
from trainer.loop.inputs import Inputs
from trainer.loop.job import Job, make_job
from trainer.run_folder import RunFolder, write_text


@dataclass(frozen=True)
class Start:
    """What is known of a run before anything starts."""

    run: Run
    inputs: Inputs
    warnings: list[str]
    contents: dict[str, str]
    standing: Standing
    notifier: Notifier


def train(path: Path, overrides: list[str], *, skip_self_test: bool = False, wait_for_nodes: int | None = None) -> int:
    """Run a configuration to its end, resuming what its folder holds. Returns the exit code; raises StillhouseError.

    `wait_for_nodes`: begin only when so many nodes of the cluster at RAY_ADDRESS are alive.
    """
    with preemptible():
        return _train_and_tell(path, overrides, skip_self_test=skip_self_test, wait_for_nodes=wait_for_nodes)


def _train_and_tell(path: Path, overrides: list[str], *, skip_self_test: bool, wait_for_nodes: int | None) -> int:
    """`train`, with signals of a scheduler handled."""
    loaded = load_run(path, overrides)
    notifier = Notifier(loaded.run.name, loaded.run.notify, RunFolder(run_folder(loaded.run)))
    with notifier.failures():
        _train_in_folder(loaded, notifier, skip_self_test=skip_self_test, wait_for_nodes=wait_for_nodes)
    return 0


def _train_in_folder(
    loaded: LoadedRun, notifier: Notifier, *, skip_self_test: bool, wait_for_nodes: int | None
) -> None:
    run = loaded.run
    quiet_libraries()
    warnings, inputs = raise_problems(loaded)
    folder = RunFolder.create(run_folder(run))
    with folder.lock():
        record = Record(folder)
        contents = contents_of(run, inputs)
        here = _standing(loaded, folder, contents)
        if here.finished:
            steps = len(read_metrics(folder).steps)
            print(f"{folder.path} is finished: {steps} steps, report in {folder.report}", flush=True)
            print("\n".join([*here.changed, closing_words(folder)]), flush=True)
            return
        try:
            start = Start(run, inputs, warnings, contents, here, notifier)
            _train(start, folder, record, skip_self_test=skip_self_test, wait_for_nodes=wait_for_nodes)
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
    _say(closing_words(folder))
    notifier.ended(0, "finished")


def _standing(loaded: LoadedRun, folder: RunFolder, contents: Mapping[str, str]) -> Standing:
    """`standing`, with file and line in what it refuses."""
    try:
        return standing(loaded.run, folder, contents)
    except ConfigError as error:
        raise ConfigError(loaded.located(str(error))) from None


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
    took = spent(read_attempts(read_manifest(folder)))
    return "\n".join(
        [
            "",
            *([f"took      {took}"] if took else []),
            f"report    {folder.report}    (open it in a browser: curves, timeline, tokens, answers before and after)",
            f"student   {folder.student}    ({student})",
            "next      stillhouse export "
            f"{folder.path} my-student      copies the student, checked, with its model card",
            f"          stillhouse config show {folder.config}    every setting of this run; change one with --set",
        ]
    )


def _train(
    start: Start, folder: RunFolder, record: Record, *, skip_self_test: bool, wait_for_nodes: int | None
) -> None:
    started = time.time()
    run, here = start.run, start.standing
    write_text(folder.config, dump_run(run))
    trackers = Trackers(run, folder, goes_on=here.after is not None, tell=_say)
    with trackers, contextlib.ExitStack() as stack:
        decided = with_control_ids(run, start.inputs)
        runtime = open_runtime(decided, start.inputs, stack, wait_for_nodes=wait_for_nodes)
        dtypes = dtypes_of(run, runtime.resolved)
        changed = [*here.changed, *(refuse_changes(run, folder, here.after, dtypes) if here.after else [])]
        job = make_job(
            decided,
            start.inputs,
            folder,
            config_hash=config_hash(run),
            teacher_dtypes=runtime.resolved.teacher_dtypes,
            skip_self_test=skip_self_test,
            contents=start.contents | dtypes,
            after=here.after,
        )
        if run.store is not None and run.store.mode == "only":
            print(refuse_missing(decided, start.inputs, runtime.resolved), flush=True)
        length = new_length(run, here.after, job.loop.total_steps)
        exported = runtime.exported(run, total_steps=job.loop.total_steps)
        hours = hours_of(job, record, devices_of(runtime.resolved))
        observer = _observer(job, record, trackers, exported, hours, stack)
        notes = [
            *start.warnings,
            *told_at_start(run),
            *changed,
            *([length] if length else []),
            *(note for stream in job.streams.values() for note in stream.notes),
            *aligned_at_start(job),
        ]
        start.notifier.follow(observer, steps=job.loop.total_steps)
        for text in (*notes, *runtime.resolved.reasons, *runtime.warnings):
            observer.event("note", text=text)
        record.begin(job, runtime.resolved, started=started, changed=changed, goes_on=here.after is not None)
        with stall_watch(job, runtime, observer, record, start.notifier) as stall:
            controller = asyncio.run(_drive(job, runtime, observer, stall))
        record.finish(controller)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stdout may be closed
        print(text, flush=True)


def _observer(
    job: Job,
    record: Record,
    trackers: Trackers,
    exported: Exported | None,
    hours: Hours,
    stack: contextlib.ExitStack,
) -> RunObserver:
    """Its files and the progress are closed with the stack."""
    progress = stack.enter_context(Progress(job.loop.total_steps, level=log_level(), device=hours.devices.kind))
    metrics = MetricsLog(job.folder, tell=progress.note, rewound=trackers.rewound)
    observer = RunObserver(
        metrics=metrics,
        timeline=Timeline(job.folder),
        progress=progress,
        record=record,
        exported=exported,
        hours=hours,
    )
    stack.callback(observer.close)
    return observer


async def _drive(job: Job, runtime: Runtime, observer: RunObserver, stall: StallWatch | None) -> Controller:
    """Open the session, run the controller, and close the session whatever happened."""
    stop = StopRequest(observer)
    session = runtime.open_session(job, observer)
    controller = Controller(
        job, session, observer, stop_requested=stop.requested, restart_after=_restart_after(job.run)
    )
    watched = stall.over(stop) if stall is not None else contextlib.nullcontext()
    with stop.on_signals(can_wait=lambda: controller.in_loops), watched:
        try:
            await session.reserve()
            await session.check_nodes()
            stop.watch(session.watch_for_drain(stop.ask))
            await controller.run()
        except asyncio.CancelledError:
            stop.explain()
            raise
        finally:
            stop.leave()
            with contextlib.suppress(OSError):  # a record that cannot be written must not hide why the run ends
                observer.phase("stopping the roles")
            await session.close()
    return controller


def stall_watch(
    job: Job, runtime: Runtime, observer: RunObserver, record: Record, notifier: Notifier
) -> contextlib.AbstractContextManager[StallWatch | None]:
    """None with `runtime: in_process`: there a step blocks everything else, and somebody may sit in a debugger."""
    if runtime.cluster is None:
        return contextlib.nullcontext()
    faults = job.run.faults
    return StallWatch(
        observer,
        timeout_s=stall_timeout_s(faults, start_timeout_s=runtime.start_timeout_s),
        save_s=faults.step_timeout_s + SAVE_GRACE_S,
        file=job.folder.path / "stall.txt",
        ended=record.ended,
        tell=partial(notifier.ended, stalled=True),
    )


def _restart_after(run: Run) -> Callable[[int], float | None]:
    policy = FailurePolicy.of_students(run.faults)

    def restart_after(failures: int) -> float | None:
        decision = policy.decide(Failure(kind="students_lost", count=failures))
        return decision.delay_s if isinstance(decision, RestartGroup) else None

    return restart_after

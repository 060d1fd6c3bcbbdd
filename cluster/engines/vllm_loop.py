"""One thread that owns one vLLM engine, and the way into it from asyncio; scorer and writer share it.

    event loop (many coroutines)                      engine thread (one)
    run(requests) --- Submit ---> command queue ---> add requests to the running batch
                                                      engine.step() while anything is inside
    await future <--- call_soon_threadsafe ---------- all outputs of a job are there
    deadline or cancellation --- Abort ------------> its requests leave the scheduler

Waiting never blocks the event loop, so an actor answers pings while its engine is busy. A step is never interrupted:
an abort or a new job takes effect between two steps.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.engines.units import EngineStatistics
from trainer.errors import DeadlineExceeded, EngineDead, UnitRejected, foreign_errors

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence for the engine."""

    token_ids: list[int]
    params: SamplingParams | PoolingParams


@dataclass(frozen=True, slots=True)
class Finished:
    """What a job gave: vLLM's final output of each request, in the order asked."""

    outputs: list[Any]
    started_s: float  # wall clock at which its first request entered the engine
    took_s: float  # until its last output left the engine


@dataclass(slots=True)
class Job:
    """Requests that are answered together. Touched by the engine thread only, once submitted."""

    name: str
    requests: AbstractSequence[Request]
    num_tokens: int
    num_rows: int
    future: asyncio.Future[Finished]
    loop: asyncio.AbstractEventLoop
    request_ids: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    started_s: float = 0.0
    started_at: float = 0.0  # monotonic

    def resolve(self, result: Finished | Exception) -> None:
        """Hand the result to the waiting coroutine, which may have given up or lost its event loop meanwhile."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_set, self.future, result)


@dataclass(frozen=True, slots=True)
class Submit:
    job: Job


@dataclass(frozen=True, slots=True)
class Abort:
    job: Job


@dataclass(frozen=True, slots=True)
class Stop:
    pass


class EngineLoop:
    """Runs jobs on the engine that `build` makes, in a thread of its own (a CUDA device belongs to a thread)."""

    def __init__(self, build: Callable[[], LLMEngine], *, name: str) -> None:
        """Returns when the engine is ready; raises what `build` raised."""
        self.name = name
        self.statistics = EngineStatistics(0, 0, 0, 0, 0.0, 0.0, 0)
        self.padded_vocabulary_size = 0  # known once the model is loaded
        self._build = build
        self._commands: queue.SimpleQueue[Submit | Abort | Stop] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._owner: dict[str, Job] = {}  # request id -> job
        self._num_requests = 0
        self._lock = threading.Lock()  # between "is it dead?" and putting a command
        self._death: str | None = None
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"engine-{name}", daemon=True)
        self._thread.start()
        if (failure := self._ready.get()) is not None:
            self._thread.join()
            raise failure

    async def run(
        self, requests: AbstractSequence[Request], *, name: str, num_tokens: int, num_rows: int, deadline_s: float
    ) -> Finished:
        """Let the requests join the running batch and wait for all of them.

        Raises `DeadlineExceeded` after `deadline_s`, `UnitRejected` if vLLM refuses a request, `EngineDead` if the
        engine broke, before or meanwhile. Whenever this ends early its requests leave the engine.
        """
        loop = asyncio.get_running_loop()
        job = Job(name, requests, num_tokens, num_rows, loop.create_future(), loop)
        self._command(Submit(job))
        try:
            async with asyncio.timeout(deadline_s):
                return await job.future
        except TimeoutError:
            raise DeadlineExceeded(
                f"{name}: {num_tokens} tokens did not leave the engine {self.name} within {deadline_s:.1f} s"
            ) from None
        finally:
            if job.future.cancelled():
                self._commands.put(Abort(job))

    def close(self) -> None:
        """Fail what is still inside, shut the engine down, end the thread. May be called twice."""
        self._commands.put(Stop())
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise EngineDead(f"the engine {self.name} did not stop within {CLOSE_TIMEOUT_S:.0f} s")

    def _command(self, command: Submit) -> None:
        with self._lock:
            if self._death is not None:
                raise EngineDead(self._death)
            self._commands.put(command)

    # What follows runs in the engine thread.

    def _main(self) -> None:
        try:
            engine = self._build()
            self.padded_vocabulary_size = engine.model_config.get_vocab_size()
        finally:
            self._ready.put(sys.exception())  # None where it went well
        try:
            self._serve(engine)
        finally:
            self._die(sys.exception())
            engine.engine_core.shutdown()

    def _serve(self, engine: LLMEngine) -> None:
        cpu_at_start = time.process_time()
        while True:
            while not self._commands.empty() or not self._jobs:
                command = self._commands.get()
                if isinstance(command, Stop):
                    return
                if isinstance(command, Submit):
                    self._admit(engine, command.job)
                else:
                    self._abort(engine, command.job)
            started_at = time.monotonic()
            num_inside = len(self._jobs)
            finished = [job for output in engine.step() if (job := self._take(output)) is not None]
            now = self.statistics
            self.statistics = EngineStatistics(
                num_units=now.num_units + len(finished),
                num_tokens=now.num_tokens + sum(job.num_tokens + num_written(job) for job in finished),
                num_rows=now.num_rows + sum(job.num_rows for job in finished),
                num_steps=now.num_steps + 1,
                busy_s=now.busy_s + time.monotonic() - started_at,
                cpu_s=time.process_time() - cpu_at_start,
                max_concurrent_units=max(now.max_concurrent_units, num_inside),
            )
            for job in finished:
                self._finish(job)

    def _admit(self, engine: LLMEngine, job: Job) -> None:
        job.started_s, job.started_at = time.time(), time.monotonic()
        self._jobs[id(job)] = job
        for request in job.requests:
            request_id = f"{self._num_requests}"
            self._num_requests += 1
            prompt = {"type": "token", "prompt_token_ids": request.token_ids}
            try:
                with foreign_errors(f"{job.name}: vLLM refused a request", error=UnitRejected):
                    engine.add_request(request_id, prompt, request.params)
            except UnitRejected as refusal:
                self._abort(engine, job)
                job.resolve(UnitRejected(str(refusal)))  # without its cause, which nobody else may be able to unpickle
                return
            job.request_ids.append(request_id)
            self._owner[request_id] = job

    def _take(self, output: Any) -> Job | None:
        """Store an output; its job, if that was the last one missing."""
        if not output.finished:
            return None
        job = self._owner.pop(output.request_id)
        job.outputs[output.request_id] = output
        return job if len(job.outputs) == len(job.request_ids) else None

    def _finish(self, job: Job) -> None:
        del self._jobs[id(job)]
        outputs = [job.outputs[request_id] for request_id in job.request_ids]
        job.resolve(Finished(outputs, job.started_s, time.monotonic() - job.started_at))

    def _abort(self, engine: LLMEngine, job: Job) -> None:
        if self._jobs.pop(id(job), None) is not None:
            inside = [request_id for request_id in job.request_ids if self._owner.pop(request_id, None) is not None]
            engine.abort_request(inside)

    def _die(self, failure: BaseException | None) -> None:
        """Fail everybody who waits or will come; only text crosses, since nobody else may be able to unpickle it."""
        reason = "was closed" if failure is None else f"died: {type(failure).__name__}: {failure}"
        with self._lock:
            self._death = f"the engine {self.name} {reason}"
        waiting = list(self._jobs.values())
        while not self._commands.empty():
            if isinstance(command := self._commands.get(), Submit):
                waiting.append(command.job)
        for job in waiting:
            job.resolve(EngineDead(self._death))
        self._jobs.clear()


def num_written(job: Job) -> int:
    """Tokens a writer added; a scorer's outputs hold tensors and add none."""
    return sum(
        len(completion.token_ids)
        for output in job.outputs.values()
        if isinstance(output.outputs, list)
        for completion in output.outputs
    )


def _set(future: asyncio.Future[Finished], result: Finished | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)

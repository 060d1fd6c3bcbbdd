"""One thread that owns one vLLM engine, and the way into it from asyncio; scorer and generator share it.

    event loop (many coroutines)                engine thread (one)
    submit(requests) ------> call queue ------> add requests to the running batch
                                                engine.step() while anything is inside
    await future <--- call_soon_threadsafe ---- all outputs of a job are there
    deadline or cancellation -----------------> its requests leave the scheduler
    run(work) -------------> call queue ------> work(engine)

Waiting never blocks the event loop, so an actor answers pings while its engine is busy. A step is never interrupted:
what is called runs between two steps.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.engines.units import EngineStatistics
from trainer.errors import DeadlineExceeded, EngineDead, InfrastructureError, UnitRejected, foreign_errors
from trainer.heap import Trimmer

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

CLOSE_TIMEOUT_S = 60.0
_Result = TypeVar("_Result")


class Turns:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = itertools.count()
        self._now = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._changed:
            number = next(self._asked)
            self._changed.wait_for(lambda: self._now == number)
        try:
            yield
        finally:
            with self._changed:
                self._now += 1
                self._changed.notify_all()


TURNS = Turns()
"""Of the engines of this process. They share buffers of vLLM's kernels for hosts and globals of its Python code: two
that compute at once lock up, or overwrite each other's numbers."""


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


class Waiter(Generic[_Result]):
    """A coroutine that waits for a result from the engine thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[_Result] = self._loop.create_future()

    @property
    def gave_up(self) -> bool:
        return self._future.cancelled()

    async def wait(self, deadline_s: float, *, late: str) -> _Result:
        """Raises `DeadlineExceeded` with the text `late`."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._future
        except TimeoutError:
            raise DeadlineExceeded(late) from None

    def resolve(self, result: _Result | Exception) -> None:
        """From the engine thread; the coroutine may have given up or lost its event loop meanwhile."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: _Result | Exception) -> None:
        if self._future.done():
            return
        if isinstance(result, Exception):
            self._future.set_exception(result)
        else:
            self._future.set_result(result)


@dataclass(slots=True)
class Job:
    """Requests that are answered together. Touched by the engine thread only, once submitted."""

    name: str
    requests: AbstractSequence[Request]
    num_tokens: int
    num_rows: int
    waiter: Waiter[Finished]
    request_ids: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    started_s: float = 0.0
    started_at: float = 0.0  # monotonic


@dataclass(frozen=True, slots=True)
class Call:
    """What the engine thread does between two steps; `waiter` is told where the engine is dead by then."""

    work: Callable[[LLMEngine], None]
    waiter: Waiter[Any] | None = None


class EngineLoop:
    """Runs jobs on the engine that `build` makes, in a thread of its own (a CUDA device belongs to a thread)."""

    def __init__(self, build: Callable[[], LLMEngine], *, name: str) -> None:
        """Returns when the engine is ready; raises what `build` raised."""
        self.name = name
        self.statistics = EngineStatistics(0, 0, 0, 0, 0.0, 0.0, 0)
        self.padded_vocabulary_size = 0  # known once the model is loaded
        self._build = build
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()  # None: stop
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

    async def submit(
        self, requests: AbstractSequence[Request], *, name: str, num_tokens: int, num_rows: int, deadline_s: float
    ) -> Finished:
        """Let the requests join the running batch and wait for all of them.

        Raises `DeadlineExceeded` after `deadline_s`, `UnitRejected` if vLLM refuses a request, `EngineDead` if the
        engine broke, before or meanwhile. Whenever this ends early its requests leave the engine.
        """
        job = Job(name, requests, num_tokens, num_rows, Waiter())
        self._call(Call(lambda engine: self._admit(engine, job), job.waiter))
        late = f"{name}: {num_tokens} tokens did not leave the engine {self.name} within {deadline_s:.1f} s"
        try:
            return await job.waiter.wait(deadline_s, late=late)
        finally:
            if job.waiter.gave_up:
                self._calls.put(Call(lambda engine: self._abort(engine, job)))

    async def run(self, work: Callable[[LLMEngine], _Result], *, name: str, deadline_s: float) -> _Result:
        """What `work` returns. It has the engine for itself, between two steps; requests that are inside stay there.

        Raises `InfrastructureError` with what `work` raised, `DeadlineExceeded` and `EngineDead` as `submit` does. A
        call that has not begun by its deadline never runs.
        """
        waiter: Waiter[_Result] = Waiter()

        def call(engine: LLMEngine) -> None:
            if waiter.gave_up:
                return
            try:
                with foreign_errors(f"{name} failed in the engine {self.name}", error=InfrastructureError):
                    result = work(engine)
            except InfrastructureError as error:
                waiter.resolve(InfrastructureError(str(error)))  # text alone: its cause may not unpickle elsewhere
            else:
                waiter.resolve(result)

        self._call(Call(call, waiter))
        late = f"{name} was not done in the engine {self.name} within {deadline_s:.1f} s"
        return await waiter.wait(deadline_s, late=late)

    def close(self) -> None:
        """Fail what is still inside, shut the engine down, end the thread. May be called twice."""
        self._calls.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise EngineDead(f"the engine {self.name} did not stop within {CLOSE_TIMEOUT_S:.0f} s")

    def _call(self, call: Call) -> None:
        with self._lock:
            if self._death is not None:
                raise EngineDead(self._death)
            self._calls.put(call)

    # What follows runs in the engine thread.

    def _main(self) -> None:
        try:
            with TURNS.turn():
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
        heap = Trimmer()
        while True:
            while not self._calls.empty() or not self._jobs:
                call = self._calls.get()
                if call is None:
                    return
                with TURNS.turn():
                    call.work(engine)
            started_at = time.monotonic()
            num_inside = len(self._jobs)
            with TURNS.turn():
                outputs = engine.step()
            finished = [job for output in outputs if (job := self._take(output)) is not None]
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
            heap.look()

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
                job.waiter.resolve(UnitRejected(str(refusal)))  # text alone: its cause may not unpickle elsewhere
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
        job.waiter.resolve(Finished(outputs, job.started_s, time.monotonic() - job.started_at))

    def _abort(self, engine: LLMEngine, job: Job) -> None:
        if self._jobs.pop(id(job), None) is not None:
            inside = [request_id for request_id in job.request_ids if self._owner.pop(request_id, None) is not None]
            engine.abort_request(inside)

    def _die(self, failure: BaseException | None) -> None:
        """Fail everybody who waits or will come; only text crosses, since nobody else may be able to unpickle it."""
        reason = "was closed" if failure is None else f"died: {type(failure).__name__}: {failure}"
        with self._lock:
            self._death = f"the engine {self.name} {reason}"
        waiting = [job.waiter for job in self._jobs.values()]
        while not self._calls.empty():
            if (call := self._calls.get()) is not None and call.waiter is not None:
                waiting.append(call.waiter)
        for waiter in waiting:
            waiter.resolve(EngineDead(self._death))
        self._jobs.clear()


def num_written(job: Job) -> int:
    """Tokens a generator added; a scorer's outputs hold tensors and add none."""
    return sum(
        len(completion.token_ids)
        for output in job.outputs.values()
        if isinstance(output.outputs, list)
        for completion in output.outputs
    )

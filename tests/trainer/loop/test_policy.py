"""Which weights write which step: order, age, what is kept of it, over every pace of both loops."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import ConfigError
from trainer.loop.policy import Policy, PolicyWriter
from trainer.loop.written import FILE, Written
from trainer.types import Completion, GenerationRequest, Sampling

STEPS = 9


def completion(version: int, *tokens: int) -> Completion:
    logprobs = -np.arange(len(tokens), dtype=np.float32)
    return Completion(np.asarray(tokens, np.int32), logprobs, "stop", "student", ((0, str(version)),))


class Engines:
    """Write at random pace, with the version that they have when they begin."""

    def __init__(self, pace: random.Random) -> None:
        self.version, self.pace, self.inside = 0, pace, 0

    async def generate(self, requests: list[GenerationRequest]) -> list[Completion]:
        version = self.version
        self.inside += 1
        await asyncio.sleep(self.pace.random() / 300)
        assert version == self.version, "weights came while a text was written"
        self.inside -= 1
        return [completion(version, 7) for _ in requests]


def versions_of(depth: int, sync_every: int, seed: int) -> list[int]:
    """The version that wrote each step, with both loops at random pace."""
    pace, used = random.Random(seed), [0] * (STEPS + 1)

    async def main() -> None:
        policy, engines = Policy(depth=depth, sync_every=sync_every), Engines(pace)
        writer, permits, ready = PolicyWriter("main", policy, engines), asyncio.Semaphore(depth + 1), asyncio.Queue()
        policy.begin(0, None)

        async def collect(step: int) -> None:
            async with policy.turn(step):
                assert engines.inside == 0
                (one,) = await writer.generate([GenerationRequest("0:0", np.asarray([1]), Sampling(4))])
                assert writer.staleness(one) <= writer.max_staleness == depth + sync_every - 1
                used[step] = int(one.versions[0][1])

        async def supply() -> None:
            for step in range(1, STEPS + 1):
                await permits.acquire()
                ready.put_nowait(asyncio.create_task(collect(step)))
            policy.close(STEPS)

        supplying = asyncio.create_task(supply())
        policy.synced(0)
        for step in range(1, STEPS + 1):
            await (await ready.get())
            await asyncio.sleep(pace.random() / 300)
            permits.release()
            if step % sync_every == 0 and step < STEPS:
                await policy.drained(step)
                engines.version = step
                policy.synced(step)
        await supplying

    asyncio.run(asyncio.wait_for(main(), 20))
    return used[1:]


@pytest.mark.parametrize(
    ("depth", "sync_every", "versions"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 1, [0, 0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 1, [0, 0, 0, 1, 2, 3, 4, 5, 6]),
        (0, 3, [0, 0, 0, 3, 3, 3, 6, 6, 6]),
        (1, 2, [0, 0, 0, 2, 2, 4, 4, 6, 6]),
    ],
)
def test_the_weights_that_write_a_step_do_not_depend_on_pace(depth: int, sync_every: int, versions: list[int]) -> None:
    assert [versions_of(depth, sync_every, seed) for seed in range(4)] == [versions] * 4


def test_a_supply_that_ends_early_holds_up_no_transfer() -> None:
    async def main() -> None:
        policy = Policy(depth=2, sync_every=1)
        policy.begin(3, None)
        waiting = asyncio.create_task(policy.drained(4))
        await asyncio.sleep(0)
        assert not waiting.done()
        policy.close(3)
        await asyncio.wait_for(waiting, 1)

    asyncio.run(main())


def test_what_was_written_before_an_interruption_is_not_written_again(tmp_path: Path) -> None:
    kept = Written()
    kept.keep(4, "main", {"0:1": completion(2, 5, 6)})
    kept.keep(5, "main", {"0:2": completion(3, 7, 8, 9), "0:2#1": completion(3)})
    kept.save(tmp_path, after=4)

    class NoEngines:
        async def generate(self, requests: list[GenerationRequest]) -> list[Completion]:
            raise AssertionError("asked again")

    async def main() -> list[Completion]:
        policy = Policy(depth=1, sync_every=1)
        policy.begin(4, tmp_path)
        policy.synced(4)
        asked = [GenerationRequest("0:2", np.asarray([1]), Sampling(4), sample=sample) for sample in (0, 1)]
        async with policy.turn(5):
            return await PolicyWriter("main", policy, NoEngines()).generate(asked)

    first, second = asyncio.run(main())
    assert (first.token_ids.tolist(), first.logprobs.tolist()) == ([7, 8, 9], [0.0, -1.0, -2.0])
    assert (first.finish_reason, first.author, first.versions) == ("stop", "student", ((0, "3"),))
    assert second.token_ids.tolist() == []
    assert Written.load(tmp_path).of(4, "main") == {}, "it was trained"


def test_a_file_that_no_run_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"PK")
    with pytest.raises(ConfigError, match="holds no text of the student"):
        Written.load(tmp_path)

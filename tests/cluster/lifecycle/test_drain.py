"""Notices that a node will be taken away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from cluster.lifecycle.drain import Drain, drain_effect, watch_for_drain


@pytest.mark.parametrize(
    ("roles", "controller", "stops"),
    [
        ([], False, None),
        (["scorer-0", "generator-1"], False, False),
        (["scorer-0", "student-1"], False, True),
        (["student-0"], False, True),
        ([], True, True),
        (["scorer-0"], True, True),
    ],
)
def test_a_node_that_is_taken_away_stops_the_run_only_where_it_must(
    roles: list[str], controller: bool, stops: bool | None
) -> None:
    effect = drain_effect(Drain("n3", 28.6, roles, holds_controller=controller))
    assert (None if effect is None else effect.stop) == stops
    if effect is not None:
        assert "node n3 will be taken away in 29 s" in effect.text
        assert all(role in effect.text for role in roles)
    assert "soon" in drain_effect(Drain("n3", None, ["student-0"], holds_controller=False)).text


class Watched:
    """A run under the poll, ended when `enough` polls were made."""

    def __init__(self, notices: Callable[[int], dict[str, float | None]], roles: Callable[[int], list[str]]) -> None:
        self._notices, self._roles = notices, roles
        self._polls = itertools.count(1)
        self._poll = 0
        self.stopped: list[str] = []
        self.noted: list[str] = []

    def _draining(self) -> dict[str, float | None]:
        self._poll = next(self._polls)
        return self._notices(self._poll)

    def after(self, polls: int) -> Watched:
        async def watch() -> None:
            watching = asyncio.create_task(
                watch_for_drain(
                    lambda node: self._roles(self._poll),
                    "own",
                    stop=self.stopped.append,
                    note=self.noted.append,
                    draining=self._draining,
                    names=dict,
                    poll_s=0.001,
                )
            )
            while self._poll <= polls:
                await asyncio.sleep(0.001)
            watching.cancel()

        asyncio.run(asyncio.wait_for(watch(), 10))
        return self


def test_a_notice_is_told_once() -> None:
    watched = Watched(lambda poll: {"n3": 60.0, "n4": 60.0}, lambda poll: ["scorer-0"]).after(5)
    assert len(watched.noted) == 2
    assert watched.stopped == []


def test_a_notice_that_comes_before_the_roles_do_is_kept_in_mind() -> None:
    watched = Watched(lambda poll: {"n3": 60.0}, lambda poll: ["student-0"] if poll >= 4 else []).after(6)
    assert len(watched.stopped) == 1
    assert "student-0" in watched.stopped[0]


def test_a_poll_without_an_answer_is_told_and_the_next_one_is_made() -> None:
    def notices(poll: int) -> dict[str, float | None]:
        if poll <= 3:
            raise ConnectionError("no answer")
        return {"own": 30.0}

    watched = Watched(notices, lambda poll: []).after(6)
    assert [text for text in watched.noted if "no answer" in text] == watched.noted
    assert len(watched.noted) == 1
    assert len(watched.stopped) == 1

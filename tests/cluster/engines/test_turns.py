"""The engines of one process compute one at a time; vLLM itself is not imported."""

from __future__ import annotations

import itertools
import threading
import time

from cluster.engines.vllm_loop import Turns


def test_turns_are_taken_one_at_a_time_in_the_order_in_which_they_were_asked_for() -> None:
    turns, inside, order = Turns(), [], []

    def work(name: str) -> None:
        for _ in range(20):
            with turns.turn():
                assert not inside
                inside.append(name)
                order.append(name)
                time.sleep(0.002)  # the other asks meanwhile
                inside.pop()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("scorer", "generator")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(order) == 40
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes > 25, "none that never rests keeps the other waiting"


def test_a_turn_that_fails_is_over() -> None:
    turns = Turns()
    for _ in range(2):
        try:
            with turns.turn():
                raise ValueError
        except ValueError:
            pass
    with turns.turn():
        pass

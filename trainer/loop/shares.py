"""Which task each sequence of a step is drawn from: exact counts by share, without chance.

Every draw goes to the task that is furthest behind its share (smooth weighted round robin): after n draws in all, a
task with the part p of all shares has been drawn n * p times, give or take less than one draw per other task. What
comes next depends on the counts alone, so a resumed run goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction


def next_draws(shares: Mapping[str, float], drawn: Mapping[str, int], num: int) -> tuple[str, ...]:
    """The tasks of the next `num` draws, in their order, after `drawn` of each. Ties go to the task that is named
    first; a task with share 0 is never drawn. At least one share is above 0."""
    parts = {name: Fraction(share) for name, share in shares.items() if share}
    total = sum(parts.values())
    counts = {name: drawn.get(name, 0) for name in parts}
    draws = []
    for after in range(sum(counts.values()) + 1, sum(counts.values()) + num + 1):
        name = max(parts, key=lambda name: after * parts[name] - counts[name] * total)
        counts[name] += 1
        draws.append(name)
    return tuple(draws)


def counts_of_step(shares: Mapping[str, float], drawn: Mapping[str, int], num: int) -> dict[str, int]:
    """How many of the next `num` draws are of each task; a task may have none in one step."""
    draws = next_draws(shares, drawn, num)
    return {name: draws.count(name) for name in shares}

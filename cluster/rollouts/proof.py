"""What proves that an engine computes what the student does: a fixed text that both score."""

from __future__ import annotations

import numpy as np

from trainer.errors import SyncError
from trainer.types import Probe, probe_gap

UNMOVED = 0.2
"""Part of the allowed gap by which the student may move while an engine gives the same bits: weights that are rounded
to another dtype may stay what they were for a few small steps."""


class Proof:
    """Of one engine, over all transfers. A gap shows weights that are wrong, or old by much. Weights that never came
    are found sooner: every bit of what the engine says is as before, while the student has moved."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: np.ndarray | None = None
        self._expected = np.empty(0, dtype=np.float32)  # of the student, when `_found` was new

    def gap(self, probe: Probe, found: np.ndarray) -> float:
        """The gap. Raises `SyncError` with both numbers."""
        gap = probe_gap(probe.logprobs, found)
        if not gap <= probe.max_gap:
            raise SyncError(
                f"{self._wrong(probe)}: on a fixed text of {len(probe.token_ids)} tokens the student's mean "
                f"log-probability is {float(probe.logprobs.mean()):.4f}, the engine's {float(found.mean()):.4f}, and "
                f"they differ by {gap:.4f} nats a token, where {probe.max_gap:g} are allowed (rollouts.max_probe_gap). "
                "What it writes is not the student's text, so nothing of it is trained"
            )
        if self._found is None or not np.array_equal(found, self._found):
            self._found, self._expected = found, probe.logprobs
        moved = probe_gap(probe.logprobs, self._expected)
        if moved > UNMOVED * probe.max_gap:
            raise SyncError(
                f"{self._wrong(probe)}: it says the same of a fixed text as before, bit by bit (mean log-probability "
                f"{float(found.mean()):.4f}), while the student's answer has moved by {moved:.4f} nats a token, to "
                f"{float(probe.logprobs.mean()):.4f}. What it writes is an older student's text"
            )
        return gap

    def _wrong(self, probe: Probe) -> str:
        return f"{self._name} does not have the weights that the student has after step {probe.version}"

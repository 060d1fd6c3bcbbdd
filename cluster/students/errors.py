"""What a failure of some ranks means: retryable with a new group, an error of the configuration, or a defect."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.lifecycle.calls import brief, unwrap
from trainer.errors import ConfigError, DeadlineExceeded, Defect, InfrastructureError, StillhouseError, StudentsLost

DEFECTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What a process raises of itself, again after each restart; collectives and networks raise RuntimeError or OSError."""

OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
CPU_OUT_OF_MEMORY = "can't allocate memory"  # PyTorch's CPU allocator raises a plain RuntimeError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray's

USES_LESS_MEMORY = (
    "lower training.micro_batch_tokens or student.loss_chunk_rows, set student.activation_checkpointing: true, raise "
    "student.zero_stage, set student.offload, or give the student more ranks. The same command goes on from the last "
    "checkpoint"
)


def group_error(failed: Mapping[int, BaseException], what: str) -> BaseException:
    """One error for the failures of the ranks `failed` in a collective call: a plain error of ours as it is, `Defect`
    or `ConfigError` where a restart would only repeat it, else `StudentsLost`.

    A rank that died names the cause better than its peers, whose collectives merely broke.
    """
    for error in failed.values():
        cause = unwrap(error)
        if isinstance(error, RayTaskError) and isinstance(cause, StillhouseError):
            return cause
        if isinstance(error, asyncio.CancelledError):
            return error
    order = sorted(failed, key=lambda rank: (not isinstance(failed[rank], RayActorError), rank))
    texts = [f"rank {rank}: {brief(unwrap(failed[rank]))}" for rank in order]
    hung = [rank for rank, error in failed.items() if isinstance(error, DeadlineExceeded)]
    if hung and len(hung) == len(failed):
        return StudentsLost(
            f"{what}: rank(s) {hung} gave no answer in time; the processes hang or the deadline is short"
        )
    if not isinstance(failed[order[0]], RayActorError):
        for rank in order:
            lasting = _lasting_error(failed[rank], f"{what} failed: rank {rank}")
            if lasting is not None:
                return lasting
    unknown = [error for error in failed.values() if not isinstance(error, RayError | DeadlineExceeded)]
    if unknown:
        return InfrastructureError(f"{what} failed: {brief(unknown[0])}")
    return StudentsLost(f"{what} failed: " + "; ".join(texts))


def _lasting_error(error: BaseException, where: str) -> StillhouseError | None:
    """For what a rank raised by itself and would raise again."""
    if not isinstance(error, RayTaskError):
        return None
    cause = unwrap(error)
    if type(cause).__name__ in OUT_OF_MEMORY or CPU_OUT_OF_MEMORY in str(cause):
        return ConfigError(f"{where} ran out of memory: {brief(cause)}. To use less, {USES_LESS_MEMORY}")
    if isinstance(cause, DEFECTS):
        return Defect(f"{where} raised what it would raise again after a restart.\n{COLOURS.sub('', str(error))}")
    return None

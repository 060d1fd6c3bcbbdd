"""The element-wise part of a loss through torch.compile, for accelerators: there every pass over [rows, vocabulary] is
a kernel of its own that reads and writes memory, and the compiler makes few of many.

It is `Objective.rows` that is compiled, forward and backward: everything between the products of the head and their
gradients. The self-test at start compares it with the plain formula on the device in question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.losses.objective import Objective


class CompiledRows:
    """Called as `Objective.rows`; where compiling fails whoever calls gives it up and computes as before."""

    def __init__(self, objective: Objective, *, backend: Any = "inductor") -> None:
        import torch._dynamo.exc  # slow to import, and no host needs it

        self._rows = torch.compile(objective.rows, backend=backend)
        self.failure: str | None = None

    @classmethod
    def of(cls, objective: Objective) -> CompiledRows | None:
        """None where numbers move from step to step (`Schedule`): each would be compiled anew."""
        return None if objective.schedules else cls(objective)

    @property
    def works(self) -> bool:
        return self.failure is None

    def __call__(
        self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor], *more: Any, **named: Any
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """One graph for all numbers of rows but one."""
        columns = named.get("columns", {})
        for rows in (logits, *labels.values(), *more, *named.values(), *columns.values()):
            if isinstance(rows, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(rows, 0)
        return self._rows(logits, labels, *more, **named)

    def gives_up(self, error: RuntimeError) -> bool:
        """Whether an error is one of compiling; if so, it says once why, and does not work from now on."""
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return False
        self.failure = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:2]])
        print(f"the loss cannot be compiled, and is computed without that: {self.failure}", flush=True)
        return True

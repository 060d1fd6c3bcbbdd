"""One choice of the library that multiplies, for all ranks of a student and for a run that goes on
(`trainer/model/fast/libraries.py`)."""

from __future__ import annotations

import os
from typing import Any

import torch

from trainer.build import FAST
from trainer.model.collectives import all_gather_objects
from trainer.model.fast import libraries, product
from trainer.model.zero import num_elements

WORTH_MEASURING = 2**20
"""Weights of a student. One with fewer has the default: its products cost nothing."""


def choose_products(module: torch.nn.Module, *, rank: int, device: torch.device, dtype: torch.dtype) -> None:
    """Collective. What rank 0 finds faster multiplies on all ranks: where they generate together, tokens must agree."""
    if not _chosen(device, dtype):
        return
    own = product.fixed()
    if rank == 0 and sum(num_elements(parameter) for parameter in module.parameters()) >= WORTH_MEASURING:
        own = libraries.chosen_by(os.environ)
    product.use(all_gather_objects(own)[0])


def products_told(device: torch.device, dtype: torch.dtype) -> str:
    """One line for people; empty where there is no choice."""
    return libraries.told(product.used()) if _chosen(device, dtype) else ""


def products_state() -> dict[str, Any]:
    """For a checkpoint."""
    return libraries.recorded(product.used()).to_state()


def restore_products(state: dict[str, Any] | None, *, device: torch.device) -> None:
    """A resumed run multiplies as before, so that its numbers are those of one that was never interrupted. Not on
    another kind of processor, where they would differ anyway, and not where the environment names a library."""
    if state and device.type == "cpu" and FAST not in os.environ and state["here"] == libraries.here():
        product.use(product.Choice(**state))


def _chosen(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype is torch.float32

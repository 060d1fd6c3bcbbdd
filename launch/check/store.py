"""What `check` asks of the label store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from cluster.placement.hardware import Hardware
from cluster.preflight.finding import Finding, attempt, problem, warning
from cluster.preflight.machine import existing, size_text, writable
from configs.schema import Run
from configs.store import Store
from launch.resolving import resolve_run
from launch.stored import refuse_missing
from trainer.labels.store import LabelStore, check_folder

if TYPE_CHECKING:
    from trainer.loop.inputs import Inputs

SUBJECT = "label store"


def examine_store(run: Run) -> Iterator[Finding]:
    """Whether the folder is a store, or may become one, and what it holds."""
    store = run.store
    if store is None:
        return
    found = attempt(SUBJECT, partial(check_folder, store.path), partial(_said, store))
    if not found.fatal and store.mode == "read_write":
        able = writable(SUBJECT, store.path)
        if able.fatal:
            text = f"store.path: {able.text}; or write store.mode: read_only, where labels are there already"
            found = problem(SUBJECT, text)
    elif not found.fatal and not store.path.is_dir():
        found = problem(SUBJECT, f"store.path: {store.path} is not there, and mode: {store.mode} makes none")
    yield found
    if not found.fatal and store.mode == "read_write":
        yield from _room(store)


def examine_labels(run: Run, inputs: Inputs) -> Iterator[Finding]:
    """Whether the store has all labels of a run that starts no teacher, where this machine is the one it will use."""
    if run.store is None or run.store.mode != "only" or not run.store.path.is_dir():
        return
    if run.runtime == "ray" and os.environ.get("RAY_ADDRESS"):
        yield Finding(
            "not checked", "labels", "what they were made in depends on the cluster; the run looks at its start"
        )
        return
    said: list[str] = []

    def look() -> None:
        said.append(refuse_missing(run, inputs, resolve_run(run, inputs, Hardware.local())))

    yield attempt("labels", look, lambda: said[0])


def _said(store: Store) -> str:
    held = LabelStore(store.path, limits=None)
    kinds = len(held.spaces())
    if not kinds:
        return str(store.path)
    return f"{store.path}: {size_text(held.num_bytes())} of {kinds} kind{'s' if kinds > 1 else ''} of labels"


def _room(store: Store) -> Iterator[Finding]:
    """A disk that is too small ends nothing: it is told, and labels are made as before."""
    to_come = max(0, store.max_bytes - LabelStore(store.path, limits=None).num_bytes())
    free = shutil.disk_usage(existing(store.path)).free
    if free < to_come:
        text = f"store.path: {size_text(free)} free, store.max_bytes allows {size_text(to_come)} more"
        yield warning(SUBJECT, f"{text}: labels that find no room are not kept")

"""`stillhouse prune`: what a person types to cut a student out of a model by keeping some of its layers."""

from __future__ import annotations

from pathlib import Path

from launch.quiet import quiet_libraries
from trainer.model.prune import parse_layers, prune


def prune_command(source: Path, target: Path, *, keep_layers: str) -> str:
    """Run `trainer.model.prune.prune` and return the line to print; `keep_layers` is text such as `0-9,20-29`."""
    layers = parse_layers(keep_layers)
    if not target.exists():
        quiet_libraries()
    prune(source, target, layers)
    return f"student: {target} keeps {len(layers)} layers of {source} ({keep_layers})"

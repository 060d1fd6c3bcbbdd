"""Jinja templates beside the code that fills them: a missing value is an error, and lines of blocks leave no gaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(file: Path, filters: Mapping[str, Callable[[Any], Any]], *, html: bool = False, **values: Any) -> str:
    """`html`: texts are escaped unless they are `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=html,
        comment_start_string="{##",  # bash writes ${#list[@]}
        comment_end_string="##}",
    )
    environment.filters |= filters
    return environment.get_template(file.name).render(**values)

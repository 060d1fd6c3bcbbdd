"""From a YAML file and `--set` overrides to a validated `Run`, and back to YAML.

All mistakes are reported together, in one `ConfigError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from configs.document import Document, Origin, dump, read_document
from configs.errors import ConfigError
from configs.keys import KeyPath, dotted
from configs.problems import find_problems, render
from configs.schema import Run

_OF_TEACHERS = (
    *(f"model.{key}" for key in ("path", "revision", "licence", "local_copy")),
    "chat_template",
    *(f"{role}.{key}" for role in ("scorer", "generator") for key in ("dtype", "placement", "may_span_nodes")),
)
_ROWS = ("prompts", "tasks.*.prompts", "tasks.*.evaluation", "data.evaluation")
MAY_CHANGE_ON_RESUME = (
    "folder",
    "report",
    "store",
    "notify",
    "trackers",
    "faults",
    "training.steps",
    "training.epochs",
    "training.on_changed_inputs",
    "training.keep_checkpoints",
    "training.evaluate_every",
    "training.save_every",
    "training.save_every_minutes",
    "training.depth",
    "training.max_label_bytes",
    "student.placement",
    "student.dtype",
    *(f"student.model.{key}" for key in ("path", "revision", "licence", "local_copy")),
    *(f"{teacher}.{key}" for teacher in ("teacher", "teachers.*") for key in _OF_TEACHERS),
    *(f"rollouts.{key}" for key in ("dtype", "placement", "may_span_nodes")),
    *(f"{rows}.{key}" for rows in _ROWS for key in ("path", "revision")),
)
"""What may be another in a run that goes on. Most of it changes neither the tokens, the labels nor the updates.

Of models, rows and templates it is not the place that counts but what lies there, and of `dtype: auto` what was made of
it: a checkpoint holds both (`launch/contents.py`). A run may become longer, which is told: from there on its learning
rate follows another schedule."""


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run and where each given value was written; values without an origin are defaults."""

    run: Run
    origins: Mapping[KeyPath, Origin]

    def located(self, text: str) -> str:
        """The message, with file and line added to every line that begins with a key of the configuration."""
        known = {dotted(path): origin.text for path, origin in self.origins.items() if path}

        def with_origin(found: re.Match[str]) -> str:
            place = found[2]
            while place and place not in known:  # a default is where the section around it is
                place = place.rpartition(".")[0]
            return f"{found[1]}{known[place]}: {found[2]}" if place else found[0]

        return re.sub(r"^( *)(\w[\w.-]*)(?=: )", with_origin, text, flags=re.MULTILINE)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Read a configuration. `overrides` are `a.b=c` with a YAML value, later ones win, list items by index.

    Raises `ConfigError` listing for every problem file and line (or the override), dotted path, value and what is
    allowed. No type is converted silently: `"3"` is no number and `1` is not true.
    """
    document = read_document(Path(path), overrides, model=Run)
    return LoadedRun(_validated(Run, document, str(path)), document.origins)


def load_section(model: type[S], file: Path | None, overrides: Sequence[str], *, title: str, option: str) -> S:
    """Like `load_run` for another section, from an optional file and overrides that are given as `option`."""
    return _validated(model, read_document(file, overrides, model=model, option=option), title)


def _validated(model: type[S], document: Document, title: str) -> S:
    try:
        section = model.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        raise ConfigError(render(title, find_problems(document, error, model))) from None
    if document.problems:
        raise ConfigError(render(title, document.problems))
    return section


def dump_run(run: Run) -> str:
    """The run with all defaults as YAML; `load_run` of it gives an equal run."""
    text = io.StringIO()
    dump(run.model_dump(mode="json"), text)
    return text.getvalue()


def config_hash(run: Run) -> str:
    """16 hexadecimal digits over everything that decides what the run learns. Equal hashes may resume each other."""
    canonical = json.dumps(_decisive(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(before: Run, now: Run) -> list[str]:
    """Settings that differ among those that decide what a run learns: `training.steps: 50, was 2`."""
    return list(_differences(_decisive(before), _decisive(now), ()))


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old is None and isinstance(new, dict):
        yield f"{dotted(path)}: added"
    elif new is None and isinstance(old, dict):
        yield f"{dotted(path)}: removed"
    elif old != new:
        yield f"{dotted(path)}: {json.dumps(new)}, was {json.dumps(old)}"


def _decisive(run: Run) -> dict[str, Any]:
    resolved = run.model_dump(mode="json")
    for place in MAY_CHANGE_ON_RESUME:
        *above, last = place.split(".")
        holders = [resolved]
        for part in above:  # "*" is every key; a section may be absent
            found = [holder.values() if part == "*" else [holder[part]] for holder in holders]
            holders = [one for group in found for one in group if one]
        for holder in holders:
            holder.pop(last, None)
    return resolved


def run_folder(run: Run) -> Path:
    """Where the run writes; relative to the working directory unless the configuration names an absolute folder."""
    return run.folder if run.folder is not None else Path("runs") / run.name

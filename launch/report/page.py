"""report.html: one self-contained page about a run, made from its folder alone, finished or not.

No network: style, script and pictures are inside the page, and its content security policy forbids everything else.
What is missing in the folder is left out of the page. Texts of models and datasets are untrusted, and escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cluster.preflight.machine import size_text
from configs.document import read_document
from launch import templates
from launch.report.artifacts import Tell, read_manifest
from launch.report.charts import charts
from launch.report.exactness import losses_note
from launch.report.hours import read_attempts
from launch.report.metrics import NOTICEABLE_PADDING, TOKENS_PER_S, Records, read_metrics
from launch.report.numbers import Form, compact, duration, percent
from launch.report.stations import stations
from launch.report.tasks import tables
from launch.report.timeline import Span, TimeAxis, draw, kinds_present, mean_waiting, read_timeline, wait_shares
from launch.report.trained import read_trained
from launch.report.viewer import Answers, read_generations, read_viewer, sample_records
from launch.report.worst import read_worst
from trainer.errors import ConfigError, Preempted
from trainer.run_folder import RunFolder, write_text
from trainer.types import Evaluation

__all__ = ["BEFORE_START", "sample_records", "write_report"]

_HERE = Path(__file__).parent
BEFORE_START = "reading inputs, starting Ray"
"""The phase that begins where the manifest's `started` lies (`launch/record.py`)."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline number, or two: before and after."""

    label: str
    values: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """How the run stands: `kind` is finished, failed or unfinished."""

    kind: str
    text: str


def write_report(folder: RunFolder) -> Path:
    """Write `<run>/report.html` atomically and return its path. Safe while the run is going on.

    Records that cannot be read are left out, and named among the warnings. Raises OSError where the page cannot be
    written, and ConfigError where the folder holds neither a configuration nor metrics: that is no run folder.
    """
    if not folder.config.exists() and not folder.metrics.exists():
        raise ConfigError(f"{folder.path} is no run folder: it holds neither config.yaml nor metrics.jsonl")
    write_text(folder.report, render(folder))
    return folder.report


def render(folder: RunFolder) -> str:
    """The page as text."""
    damage: list[str] = []
    config_text, config = _config(folder, tell=damage.append)
    manifest = read_manifest(folder, tell=damage.append)
    records = read_metrics(folder, tell=damage.append)
    spans = read_timeline(folder, tell=damage.append)
    viewer = read_viewer(folder, tell=damage.append)
    trained = read_trained(folder, tell=damage.append)
    worst = read_worst(folder, tell=damage.append)
    generations = read_generations(folder, tell=damage.append)
    status = _status(folder, config, manifest, records, tell=damage.append)
    shares = wait_shares(spans)
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "trained.js"))
    return templates.render(
        _HERE / "page.jinja",
        {"percent": percent, "nats": lambda value: "-" if value is None else compact(value)},
        html=True,
        title=config.get("name") or folder.path.name,
        subtitle=_subtitle(config),
        stations=stations(config),
        losses=losses_note(manifest.get("training_losses")),
        status=status,
        tiles=_tiles(records, spans, manifest),
        charts=charts(records),
        tables=tables(records),
        timeline=draw(spans),
        kinds=kinds_present(spans),
        shares=shares,
        viewer=viewer,
        trained=trained,
        worst=worst,
        generations=generations,
        answers_note=_answers_note(config, generations),
        warnings=[*(manifest.get("warnings") or []), *damage],
        events=[event for event in records.events if event.name not in ("note", "self_test")],
        sections=_sections(manifest),
        config=config_text,
        made=time.strftime("%Y-%m-%d %H:%M"),
        style=Markup("".join((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "tokens.css"))),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _config(folder: RunFolder, *, tell: Tell) -> tuple[str, Mapping[str, Any]]:
    """config.yaml as text and as values; both empty where it cannot be read."""
    if not folder.config.exists():
        return "", {}
    try:
        document = read_document(folder.config, ())
        return folder.config.read_text(encoding="utf-8"), document.tree
    except (ConfigError, OSError) as error:
        tell(f"{error}; the configuration is left out")
        return "", {}


def _answers_note(config: Mapping[str, Any], generations: Sequence[Answers]) -> str:
    """How the answers of the page were made, and which are missing."""
    most = (config.get("report") or {}).get("generate_tokens")
    texts = [f"Held-out prompts. The student decodes greedily{f', at most {most} tokens' if most else ''}."]
    if all(answers.teacher is None for answers in generations):
        texts.append("The teacher's own answers are shown where a run has a generator or its teacher is small.")
    return " ".join(texts)


def _subtitle(config: Mapping[str, Any]) -> str:
    named = _inside(config, "teachers")
    places = [("teachers", name) for name in named] if isinstance(named, Mapping) else []
    student, *teachers = [_model_name(config, *place) for place in (("student",), ("teacher",), *places)]
    taught = " and ".join(filter(None, teachers))
    return f"{student} learns from {taught}" if student and taught else ""


def _model_name(config: Mapping[str, Any], *place: str) -> str:
    """A hub name in full, of a folder only its own name."""
    path = str(_inside(config, *place, "model", "path") or "")
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else Path(path).name


def _inside(config: Any, *keys: str) -> Any:
    """What keys lead to, or None; a configuration of an old or edited folder need not be valid."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _status(
    folder: RunFolder, config: Mapping[str, Any], manifest: Mapping[str, Any], records: Records, *, tell: Tell
) -> Status:
    """exit.json is a run's very last file; a page made just before it goes by the manifest."""
    last = records.steps[-1].step if records.steps else 0
    total = manifest.get("total_steps") or _inside(config, "training", "steps")
    reached = f"step {last:,}" + (f" of {total:,}" if isinstance(total, int) and total else "")
    try:
        ending = folder.ending()
    except (ConfigError, OSError) as error:
        tell(f"{error}; how the run ended is left out")
        ending = None
    if ending is None and not manifest.get("finished"):
        return Status("unfinished", f"unfinished, {reached}")
    if ending is None or ending.code == 0:
        return Status("finished", f"finished, {reached}")
    if ending.code == Preempted.exit_code:
        return Status("unfinished", f"stopped as asked, {reached}")
    reason = f": {ending.reason}" if ending.reason else ""
    return Status("failed", f"ended with exit code {ending.code} at {reached}{reason}")


def _tiles(records: Records, spans: Sequence[Span], manifest: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    if records.evaluations:
        first, last = records.evaluations[0], records.evaluations[-1]
        tiles = _quality_tiles(first, last)
        if max(first.padding_mass, last.padding_mass) >= NOTICEABLE_PADDING:
            tiles.append(Tile("On ids that do not exist", _change(first.padding_mass, last.padding_mass, percent)))
    speeds = [s.values[TOKENS_PER_S] for s in records.steps[len(records.steps) // 10 :] if TOKENS_PER_S in s.values]
    speeds = sorted(speed for speed in speeds if math.isfinite(speed))
    if speeds:
        tiles.append(Tile("Speed, median", (compact(speeds[len(speeds) // 2]),), "tokens per second"))
    tiles += _time_tile(spans, manifest)
    shares = wait_shares(spans)
    waits = (mean_waiting(shares, student=True), mean_waiting(shares, student=False))
    for who, waiting in zip(("Student", "Teacher"), waits, strict=True):
        if waiting is not None:
            tiles.append(Tile(f"{who} waited", (percent(waiting),), "of the steady state"))
    return [*tiles, *_store_tile(records)]


def _store_tile(records: Records) -> list[Tile]:
    """Of a run with a label store: how much of what it asked for was there."""
    hits, misses, read = (
        sum(step.values.get(f"labels/store_{name}", 0.0) for step in records.steps)
        for name in ("hits", "misses", "bytes")
    )
    if not hits + misses > 0:
        return []
    return [
        Tile("From the label store", (percent(hits / (hits + misses)),), f"of the sequences, {size_text(int(read))}")
    ]


def _quality_tiles(first: Evaluation, last: Evaluation) -> list[Tile]:
    """Without what no teacher scored."""
    tiles = []
    if first.forward_kl is not None and last.forward_kl is not None:
        kl = _change(first.forward_kl, last.forward_kl, compact)
        tiles.append(Tile(f"KL to teacher, nats/{last.kl_unit}", kl, _factor(first.forward_kl, last.forward_kl)))
    if first.agreement is not None and last.agreement is not None:
        tiles.append(Tile("Same first choice", _change(first.agreement, last.agreement, percent)))
    teacher = "" if last.teacher_perplexity is None else f"teacher {compact(last.teacher_perplexity)}"
    return [*tiles, Tile("Perplexity", _change(first.perplexity, last.perplexity, compact), teacher)]


def _change(before: float, after: float, form: Form) -> tuple[str, ...]:
    """`6.31` and `1.05`, or one number when nothing happened yet."""
    return (form(after, 3),) if before == after else (form(before, 3), form(after, 3))


def _factor(before: float, after: float) -> str:
    """How many times lower, or higher; nothing where that is no number."""
    low, high = sorted((before, after))
    if not 0 < low < high < math.inf:
        return ""
    factor = high / low
    return f"{compact(factor) if factor >= 100 else f'{factor:.1f}'} times {'lower' if after < before else 'higher'}"


def _time_tile(spans: Sequence[Span], manifest: Mapping[str, Any]) -> list[Tile]:
    """Wall time from the command to the end. Of a run that was resumed or has not ended: the time
    in which some role worked, over all attempts."""
    attempts = read_attempts(manifest)
    hours = sum(attempt.device_s for attempt in attempts) / 3600
    if hours:
        last = attempts[-1]
        on = f"{last.devices} {last.kind}{'s' if last.devices > 1 else ''}"
        starts = f", {len(attempts)} starts" if len(attempts) > 1 else ""
        return [*_wall(spans, manifest), Tile(f"{last.kind}-hours", (compact(hours),), f"{on}{starts}")]
    return _wall(spans, manifest)


def _wall(spans: Sequence[Span], manifest: Mapping[str, Any]) -> list[Tile]:
    started, finished = manifest.get("started"), manifest.get("finished")
    if started is not None and finished is not None and manifest.get("resumed_from") is None:
        before = (manifest.get("phases_began_s") or {}).get(BEFORE_START, 0.0)
        return [Tile("Wall time", (duration(max(0.0, finished - started + before)),), "from the command on")]
    if spans:
        return [Tile("Working time", (duration(TimeAxis.of(spans).length_s),), "without pauses")]
    return []


def _sections(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as (heading, rows of name and value), nested names joined by dots."""
    loose = [(key, _text(key, value)) for key, value in manifest.items() if not isinstance(value, (Mapping, list))]
    sections = [("Run", loose)] if loose else []
    for key, value in manifest.items():
        if value and isinstance(value, (Mapping, list)) and key != "warnings":
            sections.append((key.replace("_", " ").capitalize(), list(_rows("", value))))
    return sections


def _rows(prefix: str, value: Any) -> Sequence[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for k, item in value.items() for row in _rows(f"{prefix}.{k}" if prefix else str(k), item)]
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return [row for i, item in enumerate(value, start=1) for row in _rows(f"{prefix} {i}".strip(), item)]
    return [(prefix or "-", _text(prefix, value))]


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name in ("started", "finished") and isinstance(value, (int, float)) and 0 <= value <= 1e11:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if name.endswith("bytes") and isinstance(value, (int, float)):
        return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

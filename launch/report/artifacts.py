"""The JSON files of a run folder read back: typed, and without what has another shape.

A file of its own because report and model card are made from folders of any version, killed or edited ones too: what
is wrong in one of these files costs a number or a sample, and a sentence, never the page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NotRequired

from pydantic import ConfigDict, NonNegativeInt
from typing_extensions import TypedDict

from trainer.records import Moment, ignore, read_parts
from trainer.run_folder import RunFolder, Turn

Tell = Callable[[str], None]


class DataFacts(TypedDict, total=False):
    """What the manifest says of the data."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    stop_ids: list[int]


class AttemptRecord(TypedDict):
    """One start of a run; without an end while it goes on, or where it was killed."""

    began: Moment
    ended: Moment | None
    devices: int
    kind: str


class Manifest(TypedDict, total=False):
    """manifest.json; it holds more, which is shown as it is."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    attempts: list[AttemptRecord]
    started: Moment
    finished: Moment | None
    total_steps: int
    warnings: list[str]
    changed_inputs: list[str]
    versions: dict[str, Any]
    counters: dict[str, int]
    data: DataFacts
    roles: dict[str, dict[str, Any]]
    phases_began_s: dict[str, float]


class Sample(TypedDict):
    """One sequence of samples.json; `launch/report/viewer.py` says what is in it."""

    id: str
    tokens: list[str]
    rows: list[NonNegativeInt]
    student_logprob: list[float | None]
    teacher_logprob: list[float | None]
    kl: list[float | None]


class Samples(TypedDict, total=False):
    """samples.json."""

    before: list[Sample]
    after: list[Sample]


class LabelledId(TypedDict):
    """An id of a label."""

    id: int
    text: str
    teacher: float | None
    student: float | None
    control: bool


class LabelRow(TypedDict):
    """One row of trained.json; `launch/report/trained.py` says what is in it."""

    row: NonNegativeInt
    token: int
    kept: int
    ids: list[LabelledId]
    tail: float | None
    student_tail: float | None
    entropy: float | None
    student_entropy: float | None
    target: float | None
    student_target: float | None
    kl: float | None
    group: NotRequired[int]
    beside: NotRequired[list[str]]


class TrainedSequence(TypedDict):
    """One sequence of trained.json."""

    id: str
    task: str
    teacher: str
    labels: str
    how: str
    tokens: list[str]
    rows: list[LabelRow]


class TrainedFile(TypedDict, total=False):
    """trained.json."""

    step: NonNegativeInt
    sequences: list[TrainedSequence]


class FirstRecord(TypedDict):
    """The likeliest token of a row; no text of one that the student has not."""

    text: str | None
    logprob: float | None


class WorstTokenRecord(TypedDict):
    """One token of worst.json; `launch/report/worst.py` says what is in it."""

    id: str
    kl: float
    before: str
    token: str
    after: str
    student: float | None
    teacher: float | None
    student_first: FirstRecord
    teacher_first: FirstRecord


class WorstTextRecord(TypedDict):
    """One text of worst.json."""

    kl: float
    rows: NonNegativeInt
    shown: Sample


class WorstFile(TypedDict, total=False):
    """worst.json."""

    step: NonNegativeInt
    tokens: list[WorstTokenRecord]
    texts: list[WorstTextRecord]


class Generations(TypedDict, total=False):
    """generations.json. A prompt is its turns, of an earlier version one text."""

    prompts: list[list[Turn] | str | None]
    before: list[str | None]
    after: list[str | None]
    teacher: list[str | None]
    reference: list[str | None]


def read_manifest(folder: RunFolder, *, tell: Tell = ignore) -> Manifest:
    return read_parts(folder.manifest, Manifest, tell=tell)


def read_samples(folder: RunFolder, *, tell: Tell = ignore) -> Samples:
    """Every sample with numbers for each of its rows, which are rows of its tokens."""
    read = read_parts(folder.samples, Samples, depth=2, tell=tell)
    found: Samples = {}
    for when in ("before", "after"):
        for sample in read.get(when, []):
            if _is_whole(sample):
                found.setdefault(when, []).append(sample)
            else:
                tell(f"{folder.samples}: {when}: its lists differ in length; this is left out")
    return found


def read_trained(folder: RunFolder, *, tell: Tell = ignore) -> tuple[int, list[TrainedSequence]]:
    """The step, and every sequence whose rows are rows of its tokens."""
    read = read_parts(folder.trained, TrainedFile, depth=2, tell=tell)
    whole = []
    for one in read.get("sequences", []):
        if all(row["row"] + 1 < len(one["tokens"]) for row in one["rows"]):
            whole.append(one)
        else:
            tell(f"{folder.trained}: {one['id']}: a row is none of its tokens; this is left out")
    return read.get("step", 0), whole


def read_worst(folder: RunFolder, *, tell: Tell = ignore) -> WorstFile:
    """Every token, and every text with a number for each of its rows."""
    read = read_parts(folder.worst, WorstFile, depth=2, tell=tell)
    texts = read.get("texts", [])
    whole = [text for text in texts if _is_whole(text["shown"])]
    if len(whole) < len(texts):
        tell(f"{folder.worst}: texts: the lists of one differ in length; this is left out")
    return {**read, "texts": whole} if texts else read


def read_generations(folder: RunFolder, *, tell: Tell = ignore) -> Generations:
    return read_parts(folder.generations, Generations, tell=tell)


def _is_whole(sample: Sample) -> bool:
    lengths = {len(sample[name]) for name in ("rows", "student_logprob", "teacher_logprob", "kl")}
    return len(lengths) == 1 and max(sample["rows"], default=0) < max(1, len(sample["tokens"]))

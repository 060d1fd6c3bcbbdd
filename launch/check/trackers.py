"""Trackers of a run: their libraries, which the process of the run needs, and whether they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.preflight import software
from cluster.preflight.finding import Finding, Silence, attempt, bounded, warning
from configs.errors import foreign_errors
from configs.schema import Run
from configs.trackers import TRACKERS, TrackerChoice

REACH_TIMEOUT_S = 15.0
GOES_ON = "a run goes on without it, and sends what is missing when it answers"


def installed(run: Run) -> Iterator[Finding]:
    """Of each whose library is missing, or of a version that is not known to work."""
    for i, choice in enumerate(run.trackers):
        if choice.extra is not None:
            found = software.extra(choice.extra)
            if found.fatal:
                yield replace(found, subject=f"trackers.{i}", text=f"trackers.{i}: {found.text}")


def reached(run: Run) -> Iterator[Finding]:
    """Whether each answers, of those whose library is there. A warning: a run may be started elsewhere, or later."""
    for i, choice in enumerate(run.trackers):
        if choice.extra is None or not software.extra(choice.extra).fatal:
            yield _reach(f"trackers.{i}", choice)


def _reach(place: str, choice: TrackerChoice) -> Finding:
    def look() -> None:
        with foreign_errors(f"{place}: {choice.kind}"):
            try:
                TRACKERS.load(choice).reach()
            except SystemExit as left:  # it would end the command without a word
                raise RuntimeError(f"it calls sys.exit({left.code!r})") from None

    questions = (attempt(place, one, lambda: f"{choice.kind} is ready") for one in (look,))
    try:
        (finding,) = bounded(questions, first_s=REACH_TIMEOUT_S, then_s=REACH_TIMEOUT_S)
    except Silence as silence:
        return warning(place, f"{place}: {choice.kind}: {silence}", GOES_ON)
    return warning(place, finding.text, GOES_ON) if finding.fatal else finding

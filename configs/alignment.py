"""How the labels of a teacher with another tokenizer reach the student's rows. One class of parameters per method.

`align: overlap` is `trainer/align/overlap.py`, whose class `Aligner` has these fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from configs.section import Share
from configs.stations import Choice, Station

if TYPE_CHECKING:
    from configs.tasks import ResolvedTask


class Alignment(Choice):
    """Base of all methods, those of a user's included."""

    labels: ClassVar[tuple[str, ...]] = ()
    """The kinds of labels that it can align; empty: any."""
    term: ClassVar[str | None] = None
    """The only term that can use what it gives of labels; None: every divergence."""
    instead: ClassVar[str] = ""
    """What to write where the labels are of another kind."""

    compares_ids: ClassVar[bool] = False
    """Whether the labels say nothing of a token that the teacher's vocabulary lacks."""
    chunked: ClassVar[bool] = False
    """Whether what belongs together are several rows of each side."""

    min_ratio: Share = Field(
        0.5, description="Share of the answers' bytes that the labels must reach; the run ends where it is less."
    )


class Overlap(Alignment):
    """Distributions over the tokens that both vocabularies have, all others as one event, at the rows that begin at the
    same byte of the answer in both tokenisations."""

    kind: Literal["overlap"] = "overlap"
    compares_ids: ClassVar[bool] = True
    labels: ClassVar[tuple[str, ...]] = ("topk", "hidden", "dense")
    instead: ClassVar[str] = "write labels: topk or hidden, or align: chunks"


class Chunks(Alignment):
    """Log-probabilities of the shortest stretches of an answer that both tokenisations cut out (the idea of approximate
    likelihood matching, arXiv 2503.20083). Needs of the teacher the log-probabilities of the text alone."""

    kind: Literal["chunks"] = "chunks"
    chunked: ClassVar[bool] = True
    labels: ClassVar[tuple[str, ...]] = ("token",)
    term: ClassVar[str | None] = "chunk_kl"
    instead: ClassVar[str] = "write labels: token and objective: [chunk_kl], or align: overlap"


class Uld(Alignment):
    """Sorted probabilities, whatever their tokens (arXiv 2402.12030), the smaller vocabulary filled up with zeros, at
    the rows of `overlap`."""

    kind: Literal["uld"] = "uld"
    labels: ClassVar[tuple[str, ...]] = ("dense", "hidden")
    term: ClassVar[str | None] = "uld"
    instead: ClassVar[str] = "write labels: hidden and objective: [uld], or align: overlap"


ALIGNMENTS = Station(
    Alignment,
    (Overlap, Chunks, Uld),
    package="trainer.align",
    class_name="Aligner",
    default="overlap",
    members=("groups", "encoding"),
    contract="trainer/align/aligner.py",
)
AnyAlignment = Annotated[Alignment, ALIGNMENTS]


def _ensemble_problem(how: str, align: Alignment, labels: Choice) -> str:
    """What several teachers with tokenizers of their own cannot become; empty where they can."""
    if align.chunked:
        return (
            f"align: {align.kind} cuts the text by one teacher's tokenizer, and an ensemble has several: give each a "
            "task of its own, or write align: overlap"
        )
    if how == "min_ce":
        return (
            "min_ce compares teachers by the probability of the same target ids, and their tokenizers cut the text "
            "into others: write how: per_teacher, or probability_mean with labels: hidden"
        )
    if how == "logit_mean":
        return (
            "logit_mean is renormalised over one vocabulary, and align compares several: write how: probability_mean"
            ", or per_teacher"
        )
    if how == "probability_mean" and not align.compares_ids:
        return f"align: {align.kind} gives probabilities without tokens, which do not mix: write how: per_teacher"
    if how == "probability_mean" and not getattr(labels, "of_every_id", False):
        return (
            f"the ids that labels: {labels.kind} keep are of unlike vocabularies, and are not joined: write labels: "
            "hidden, or how: per_teacher"
        )
    if getattr(labels, "control_ids", ()):
        return "control_ids are ids of one teacher's vocabulary, and an ensemble with align has several: remove them"
    return ""


def alignment_problems(task: ResolvedTask) -> Iterator[tuple[str, str, str]]:
    """(station, value, what is wrong) of what the alignment of a task cannot give it."""
    align, kind = task.align, task.labels.kind
    for term in task.objective:
        if "chunks" in term.needs and (align is None or align.term != term.loss):
            yield "objective", term.loss, f"{term.loss} compares chunks of two tokenisations: write align: chunks"
    if align is None:
        return
    if task.ensemble is not None and (problem := _ensemble_problem(task.ensemble.how, align, task.labels)):
        yield "ensemble", task.ensemble.how, problem
    if task.route is not None:
        yield "route", task.route.column, "align fits one teacher's tokenizer: give each teacher a task of its own"
    if task.soft_labels is not None and align.labels and kind not in align.labels:
        yield "labels", kind, f"align: {align.kind} cannot align labels: {kind}; {align.instead}"
        return
    for term in task.objective:
        if not term.looks_at_labels() or "chunks" in term.needs:
            continue
        if align.term is not None and term.loss != align.term:
            text = f"align: {align.kind} gives labels that only {align.term} can use; {align.instead}"
            yield "objective", term.loss, text
        elif term.needs & {"target", "target_event", "likeliest_ids"}:
            text = f"{term.loss} looks at single tokens of the teacher, which align: {align.kind} does not keep; "
            yield "objective", term.loss, text + "write another divergence, such as forward_kl"
        elif term.form == "features":
            text = f"{term.loss} compares states token by token, which align: {align.kind} does not give; "
            yield "objective", term.loss, text + "let it have a teacher of the student's tokenizer"
        elif any(one.needs for one in term.token_weights):
            yield "objective", term.loss, f"token_weights look at labels that align: {align.kind} changes: remove them"
        elif term.form == "sequence":
            text = f"{term.loss} compares whole answers token by token, which align: {align.kind} does not give; "
            yield "objective", term.loss, text + "let it have a teacher of the student's tokenizer"

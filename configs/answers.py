"""Answers: who writes the text that is trained on. One class of parameters per kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.section import Positive, Share
from configs.stations import Choice, Station


class Answers(Choice):
    """Base of all kinds, those of a user's included."""

    needs_generator: ClassVar[bool] = False
    """Whether the teacher needs generator replicas."""
    needs_answer: ClassVar[bool] = True
    """Whether every row needs an answer."""


class DatasetAnswers(Answers):
    """The dataset's own answers; every row needs one."""

    kind: Literal["dataset"] = "dataset"


class TeacherAnswers(Answers):
    """The dataset's answer where a row has one, else the teacher writes it (sequence-level distillation, arXiv
    1606.07947).

    An answer that reaches `max_new_tokens` is cut off. With `on_cut_off: keep` it is learnt as far as it goes, without
    an end token, so that the student is not taught to stop there; with `drop` it is left out, as an empty answer always
    is. The run ends where more than `max_dropped_fraction` of the answers were left out.
    """

    kind: Literal["teacher"] = "teacher"
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    rewrite: bool = Field(False, description="The teacher also writes anew what rows have an answer to.")
    on_cut_off: Literal["keep", "drop"] = "keep"
    max_dropped_fraction: Share = 0.5

    needs_generator: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False


ANSWERS = Station(
    Answers,
    (DatasetAnswers, TeacherAnswers),
    package="trainer.answers",
    class_name="AnswerSource",
    default="dataset",
    members=("rewrite", "room_for_answer", "bind"),
    formerly={"feature": "dataset", "labeling": "teacher"},
    contract="trainer/answers/dataset.py",
)
AnyAnswers = Annotated[Answers, ANSWERS]

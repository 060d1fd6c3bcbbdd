"""Answers: who writes the text that is trained on. One class of parameters per kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.refusal import refusal
from configs.section import Natural, Positive, Share
from configs.stations import Choice, Station

LEAST_TEMPERATURE = 0.01


class Answers(Choice):
    """Base of all kinds, those of a user's included."""

    needs_generator: ClassVar[bool] = False
    """Whether the teacher needs generator replicas."""
    needs_rollouts: ClassVar[bool] = False
    """Whether the student writes, in rollout engines."""
    needs_answer: ClassVar[bool] = True
    """Whether every row needs an answer."""

    @property
    def stops_at_text(self) -> bool:
        """Whether generators must know the text of what they write, to stop at strings."""
        return False


class DatasetAnswers(Answers):
    """The dataset's own answers; every row needs one."""

    kind: Literal["dataset"] = "dataset"


class Drawn(Answers):
    """What is said of answers that a model writes."""

    max_new_tokens: Positive = Field(256, description="Of one answer, at most.")
    n: Positive = Field(1, description="Answers to each prompt; a step then has n times as many sequences.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="0: greedy, else 0.01 to 2.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Mass of the likeliest tokens to draw from.")
    top_k: Natural = Field(0, description="Number of the likeliest tokens to draw from; 0: all.")
    min_p: Share = Field(0.0, description="Least probability of a token, as a fraction of the likeliest one's.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="Strings that end an answer.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="None: from the seed of the run.")

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            text = f"n: {self.n} greedy answers are all the same: write a temperature above 0, or n: 1"
            raise refusal(("n",), self.n, text)
        return self

    @field_validator("temperature")
    @classmethod
    def _engines_can_divide(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"vLLM draws at {LEAST_TEMPERATURE} or above: write that, or 0, which is greedy")
        return temperature

    @property
    def stops_at_text(self) -> bool:
        return bool(self.stop)


class TeacherAnswers(Drawn):
    """The dataset's answer where a row has one, else the teacher writes it (sequence-level distillation, arXiv
    1606.07947).

    The `n` answers to a prompt are a group: `n` sequences, each drawn with a seed of its own, which depends on `seed`,
    the prompt and the number of the answer alone. Logits are divided by `temperature` and then restricted by `min_p`,
    `top_k` and `top_p`, in this order. An answer ends with an end token of the teacher, or with the token that
    completes one of the strings of `stop`.

    An answer that reaches `max_new_tokens` is cut off. With `on_cut_off: keep` it is learnt as far as it goes, without
    an end token, so that the student is not taught to stop there; with `drop` it is left out, as an empty answer always
    is. The run ends where more than `max_dropped_fraction` of the answers were left out.
    """

    kind: Literal["teacher"] = "teacher"
    rewrite: bool = Field(False, description="The teacher also writes anew what rows have an answer to.")
    on_cut_off: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of an answer that reaches max_new_tokens."
    )
    max_dropped_fraction: Share = Field(0.5, description="The run ends where more of the answers were left out.")

    needs_generator: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False


class StudentAnswers(Drawn):
    """The student writes all answers, those too that rows have (on-policy distillation, arXiv 2306.13649), in the
    engines of `rollouts`, and the teacher judges every token of them.

    The `n` answers to a prompt are a group: `n` sequences, drawn by one replica with a seed each, which depends on
    `seed`, the prompt and the number of the answer. Tokens are drawn from the student's own distribution unless
    `temperature`, `top_p`, `top_k` or `min_p` say otherwise; the text is then no sample of the student, which a loss
    that weighs by the ratio of both distributions would notice. An answer ends with an end token of the student, or
    with the token that completes one of the strings of `stop`.

    An answer that reaches `max_new_tokens` is learnt as far as it goes, or left out (`on_cut_off: drop`). One of end
    tokens alone says nothing: it is counted and left out, as one is that was written by older weights than
    `training.depth` and `rollouts.sync_every` allow. A step without any answer left trains nothing; the run ends where
    more than `max_dropped_fraction` of the answers were left out.
    """

    kind: Literal["student"] = "student"
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(1.0, description="0: greedy, else 0.01 to 2.")
    on_cut_off: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of an answer that reaches max_new_tokens."
    )
    max_dropped_fraction: Share = Field(0.5, description="The run ends where more of the answers were left out.")

    needs_rollouts: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = False

    @property
    def draws_otherwise(self) -> str:
        """The settings by which tokens are drawn from another distribution than the student's; empty where none is."""
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return ", ".join(
            f"{name}: {getattr(self, name):g}" for name, value in plain.items() if getattr(self, name) != value
        )


ANSWERS = Station(
    Answers,
    (DatasetAnswers, TeacherAnswers, StudentAnswers),
    package="trainer.answers",
    class_name="AnswerSource",
    default="dataset",
    members=("rewrite", "room_for_answer", "bind"),
    formerly={"feature": "dataset", "labeling": "teacher"},
    contract="trainer/answers/dataset.py",
)
AnyAnswers = Annotated[Answers, ANSWERS]

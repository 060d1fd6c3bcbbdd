"""Soft labels: what the teacher says of each token. One class of parameters per encoding.

`kind: topk` is `trainer/labels/topk.py`, whose class `Encoding` has these fields. A block of labels names its encoding
by such an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from configs.section import Natural, Need, Positive, Temperature
from configs.stations import Choice, Station

_DISTRIBUTIONS: frozenset[Need] = frozenset({"labels", "target", "target_event", "likeliest_ids"})


class Labels(Choice):
    """Base of all encodings, those of a user's included."""

    gives: ClassVar[frozenset[Need]] = frozenset({"labels"})
    """What terms of an objective find in them. target: the log-probability of the target id, in a column `target` or
    `logprob` or as an event; target_event: the pair tells where the target id is, and its log-probabilities;
    likeliest_ids: every event but the tail is one id, the teacher's likeliest among them."""
    needs_row_keys: ClassVar[bool] = False
    """Whether labels are drawn, with random numbers of the row alone."""
    code_version: ClassVar[int] = 1
    """Raised where its file makes other numbers of the same logits: labels that a store keeps are then made again."""

    takes_ids: ClassVar[bool] = False
    """Whether whoever asks for them says of which ids: a request carries `num_given` ids for each row."""

    of_every_id: ClassVar[bool] = False
    """Whether their events are all ids of the vocabulary, in its order: those of several teachers are then the same."""

    temperature: Temperature = Field(1.0, description="Of teacher and student alike; losses are scaled by T^2.")

    @property
    def least_vocabulary(self) -> int:
        """How many ids a vocabulary needs for such labels to be made of it."""
        return 1

    @property
    def target_moves_events(self) -> bool:
        """Whether the events of a row are others where its target id is another."""
        return False

    def entropy(self, columns: Mapping[str, Any]) -> float | None:
        """Mean entropy in nats of a block's rows, for the report; None where its columns alone do not tell it."""
        return None


class Sparse(Labels):
    """Base of encodings that keep some ids of each row, and the mass of all others."""

    most: ClassVar[str] = ""
    """The field that says how many ids of a row are kept, which must hold the control ids."""

    control_ids: Literal["auto"] | tuple[Natural | str, ...] = Field(
        (),
        description="Tokens, as the teacher's tokenizer writes them, or ids that are always kept, such as "
        '["<|im_end|>", "<tool_call>"]; auto: those that end a turn or a text. Whether an answer ends is a token that '
        "is seldom among the likeliest ones, and a student that never hears of it does not stop.",
    )

    @field_validator("control_ids", mode="before")
    @classmethod
    def _tokens(cls, given: Any) -> Any:
        if given == "auto":
            return given
        tokens = given if isinstance(given, list | tuple) else [None]
        if not all(isinstance(one, str) or (type(one) is int and one >= 0) for one in tokens):
            raise ValueError('must be auto or a list of tokens and ids, such as ["<|im_end|>", 2]')
        if len(set(tokens)) < len(tokens):
            raise ValueError("names a token twice; name each once")
        return tuple(tokens)


class TopK(Sparse):
    """The k likeliest ids of each row, and the mass of all others."""

    kind: Literal["topk"] = "topk"
    code_version: ClassVar[int] = 2
    most: ClassVar[str] = "k"

    gives: ClassVar[frozenset[Need]] = _DISTRIBUTIONS

    k: Positive = Field(64, description="Ids kept of each row, the control ids among them.")

    @property
    def least_vocabulary(self) -> int:
        return self.k


class Nucleus(Sparse):
    """The likeliest ids of each row until they hold the mass p, and the mass of all others: few where the teacher is
    sure, many where it is not."""

    kind: Literal["nucleus"] = "nucleus"
    code_version: ClassVar[int] = 2
    most: ClassVar[str] = "k_max"

    gives: ClassVar[frozenset[Need]] = frozenset({"labels", "target", "target_event"})

    p: Annotated[float, Field(gt=0, le=1)] = Field(0.98, description="Mass that the kept ids reach, if k_max allows.")
    k_max: Annotated[int, Field(gt=0, le=65535)] = Field(256, description="Ids kept of a row, at most.")


class Sampled(Sparse):
    """Ids drawn by their probability (RS-KD, arXiv 2503.16870): the gradient of forward_kl is unbiased over the whole
    vocabulary, at a few dozen bytes a row."""

    kind: Literal["sampled"] = "sampled"
    code_version: ClassVar[int] = 2
    draws: Annotated[int, Field(gt=0, le=65535)] = Field(50, description="Of each row; fewer different ids are kept.")
    seed: Natural = Field(0, description="Of the draws, beside the text and the place in it.")

    needs_row_keys: ClassVar[bool] = True


class Hidden(Labels):
    """The teacher's last hidden state: exact, and multiplied by the teacher's head on the student's side. With `layers`
    also the states between its layers, for terms on features."""

    kind: Literal["hidden"] = "hidden"

    gives: ClassVar[frozenset[Need]] = _DISTRIBUTIONS | {"layers"}
    of_every_id: ClassVar[bool] = True

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: what the teacher computes in.")
    layers: tuple[Natural, ...] = Field(
        (),
        description="Further states of each row, counted as transformers' hidden_states are: 0 what the first layer "
        "reads (the embeddings), i what layer i leaves, and of the last one what the final norm makes of it, which is "
        "the last hidden state again.",
    )

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("names a layer twice; name each once")
        return tuple(sorted(layers))


class Dense(Labels):
    """The log-probability of every id."""

    kind: Literal["dense"] = "dense"

    gives: ClassVar[frozenset[Need]] = _DISTRIBUTIONS
    of_every_id: ClassVar[bool] = True

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="float16 halves the bytes and rounds by up to 0.004 nats, bfloat16 by up to 0.03."
    )


class GivenIds(Sparse):
    """The teacher's log-probabilities on the student's own likeliest ids, and the mass of all others: what reverse_kl
    needs, which lives where the student's mass is."""

    kind: Literal["given_ids"] = "given_ids"
    code_version: ClassVar[int] = 2
    most: ClassVar[str] = "k"

    gives: ClassVar[frozenset[Need]] = frozenset({"labels", "target", "target_event"})
    takes_ids: ClassVar[bool] = True

    k: Positive = Field(64, description="Ids given for each row, the control ids among them.")
    ids: Literal["student", "teachers"] = Field(
        "student",
        description="Who chooses them: the student, one forward pass of its own before a step is scored. teachers: "
        "what topk labels of an ensemble become, not to be written.",
    )
    add_target: bool = Field(True, description="The target id is given too.")
    add_teacher_topk: Natural = Field(0, description="The teacher adds as many ids, its likeliest that are not given.")

    @property
    def target_moves_events(self) -> bool:
        return self.add_target

    @property
    def num_given(self) -> int:
        """Ids that a request carries for each row."""
        return self.k + self.add_target

    @property
    def num_kept(self) -> int:
        """Ids that a label holds for each row."""
        return self.num_given + self.add_teacher_topk

    @property
    def least_vocabulary(self) -> int:
        return self.num_kept


class Token(Labels):
    """The log-probability of the target id alone: for terms over whole answers."""

    kind: Literal["token"] = "token"
    code_version: ClassVar[int] = 2

    gives: ClassVar[frozenset[Need]] = frozenset({"labels", "target", "target_logprobs"})

    @field_validator("temperature")
    @classmethod
    def _of_the_model_as_it_is(cls, temperature: float) -> float:
        if temperature != 1.0:
            raise ValueError("labels: token are compared with the student's at temperature 1: remove temperature")
        return temperature


class NoLabels(Choice):
    """No teacher is asked about tokens: for objectives of hard labels alone."""

    kind: Literal["none"] = "none"

    gives: ClassVar[frozenset[Need]] = frozenset()


LABELS = Station(
    Labels,
    (TopK, Nucleus, Sampled, GivenIds, Hidden, Dense, Token, NoLabels),
    package="trainer.labels",
    class_name="Encoding",
    default="topk",
    members=("needs", "layout", "encode", "prepare", "align", "mass"),
    contract="trainer/labels/encoding.py",
    other_words={
        **dict.fromkeys(("logits", "logprobs", "full"), "dense"),
        **dict.fromkeys(("top_p", "top_mass"), "nucleus"),
        **dict.fromkeys(("rs_kd", "random_sampling", "samples"), "sampled"),
        **dict.fromkeys(("features", "last_hidden_state"), "hidden"),
        **dict.fromkeys(("student_topk", "on_ids"), "given_ids"),
        "hard": "none",
    },
)
AnyLabels = Annotated[Labels | NoLabels, LABELS]

HELD_OUT = Hidden()
"""What held-out rows are scored with, whatever the training labels are: exact over the whole vocabulary."""

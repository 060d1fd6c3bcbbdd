"""The terms of an objective: one class per term, with its parameters and what it needs of a task.

The values are computed in `trainer/losses/`. Here stands what can be refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from configs.section import Need, Section, Weight
from configs.stations import Station

Exactness = Literal["exact", "lower_bound", "unbiased", "biased", "refused"]


class Term(Section):
    """Base of all terms."""

    loss: str
    weight: Weight = Field(1.0, description="Of the term in the sum.")

    form: ClassVar[Literal["row", "sequence"]] = "row"
    """row: a function of one row, averaged over loss tokens; sequence: of whole answers, averaged over groups."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """labels: of every row, from a teacher; groups: several answers to one prompt; rewards: a number per answer;
    target_logprobs: log-probabilities of the target ids alone, from a teacher."""
    exactness: ClassVar[Mapping[str, Exactness]] = {}
    """By kind of labels, how the value compares with that over the whole vocabulary. A kind of a user's is not listed
    and allowed."""
    instead: ClassVar[str] = ""
    """What to write where the labels' kind is refused."""

    def same_as(self, other: Term) -> bool:
        """Whether both are one term but for their weights."""
        return self.model_copy(update={"weight": other.weight}) == other

    @classmethod
    def looks_at_labels(cls) -> bool:
        """Whether its value depends on what a teacher says."""
        return bool(cls.needs & {"labels", "target_logprobs"})

    @classmethod
    def exactness_with(cls, kind: str) -> Exactness | None:
        """`exactness` with labels of a kind; exact where it looks at none, None for a kind of a user's."""
        return cls.exactness.get(kind) if cls.looks_at_labels() else "exact"

    @property
    def compares_answers(self) -> bool:
        """Whether it is a function of several answers to one prompt, which must then meet in one micro-batch."""
        return "groups" in self.needs

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of the function that computes the term: its own fields."""
        return {name: value for name, value in self if name not in Term.model_fields}


class Divergence(Term):
    """Base of distances between the distributions of teacher and student. Top-k compares k + 1 events, a lower bound of
    the value over the vocabulary for every f-divergence (data processing inequality)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    exactness: ClassVar[Mapping[str, Exactness]] = {
        "topk": "lower_bound",
        "given_ids": "lower_bound",
        "hidden": "exact",
        "dense": "exact",
        "token": "refused",
    }
    instead: ClassVar[str] = "write labels: topk (some ids of each row) or labels: hidden (exact)"


class ForwardKl(Divergence):
    """KL(teacher, student) (arXiv 1503.02531): covers all modes of the teacher."""

    loss: Literal["forward_kl"] = "forward_kl"


class ReverseKl(Divergence):
    """KL(student, teacher) (MiniLLM, arXiv 2306.08543): seeks modes."""

    loss: Literal["reverse_kl"] = "reverse_kl"


class Jsd(Divergence):
    """The generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

    loss: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="weight of the teacher in the mixture, for example beta: 0.5."
    )


class SkewForwardKl(Divergence):
    """KL(teacher, alpha teacher + (1 - alpha) student) (DistiLLM, arXiv 2402.03898): forward_kl, bounded."""

    loss: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="weight of the teacher in the mixture.")


class CrossEntropy(Term):
    """-log q(target id): hard labels, which need no teacher."""

    loss: Literal["cross_entropy"] = "cross_entropy"


class Dpo(Term):
    """-log sigmoid(beta (difference of log q/p between the chosen and the rejected answer)) (arXiv 2305.18290); the
    teacher is the reference p."""

    loss: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(0.1, description="strength of the pull towards the reference.")

    form: ClassVar[Literal["row", "sequence"]] = "sequence"
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "target_logprobs"})
    exactness: ClassVar[Mapping[str, Exactness]] = {"token": "exact"}


LOSSES = Station(Term, (ForwardKl, ReverseKl, Jsd, SkewForwardKl, CrossEntropy, Dpo), class_name="Term", tag="loss")
AnyTerm = Annotated[Term, LOSSES]

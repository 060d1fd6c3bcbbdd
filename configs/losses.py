"""The terms of an objective: one class per term, with its parameters and what it needs of a task.

The values are computed in `trainer/losses/`. Here stands what can be refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from configs.policy_terms import REFUSED, PolicyParameters, Returned, Sampled
from configs.refusal import refusal
from configs.section import Natural, Need, Positive, Section, Share, Temperature, Weight
from configs.stations import Choice, Station

if TYPE_CHECKING:
    from configs.labels import Labels, NoLabels

Exactness = Literal["exact", "lower_bound", "unbiased", "biased", "refused"]


_Strength = Annotated[float, Field(gt=0, le=1e3)]

_OF_ROWS: frozenset[Need] = frozenset({"groups", "rewards", "chunks", "rollouts"})
"""Needs that labels have no part in."""


class TokenWeight(Choice):
    """Base of weights of tokens inside a term, of a user's own too. Several of a term are multiplied, and carry no
    gradient. A weight lies between 0 and 1, so that the term gets smaller by their mean, which metrics show; that of
    `difficulty` has the mean 1."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Of the labels."""
    whole_distribution: ClassVar[bool] = False
    """Whether labels that lump ids change it."""


class Entropy(TokenWeight):
    """By the teacher's entropy: 1 / (1 + exp(-(entropy - at) / width)). With `width: 0` a step, as of
    entropy-aware distillation (arXiv 2603.07079)."""

    kind: Literal["entropy"] = "entropy"
    at: _Strength = Field(1.0, description="Nats at which the weight is one half.")
    width: Annotated[float, Field(ge=0)] = Field(0.25, description="Nats over which it rises; 0: at once.")
    favour: Literal["high", "low"] = Field("high", description="Which entropy is weighted more.")

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    whole_distribution: ClassVar[bool] = True


class Confidence(TokenWeight):
    """By the teacher's probability of the target id: p^power, or (1 - p)^power."""

    kind: Literal["confidence"] = "confidence"
    power: _Strength = Field(1.0, description="1: in proportion to the probability.")
    favour: Literal["sure", "unsure"] = Field("sure", description="Which rows are weighted more.")

    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "target_event"})


class Difficulty(TokenWeight):
    """The share of rows where teacher and student are furthest apart (Hellinger distance); others count for nothing
    (AdaKD, arXiv 2510.11615). The share falls while the loss falls and rises while it rises."""

    kind: Literal["difficulty"] = "difficulty"
    keep: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="The share at first.")
    least: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="And the smallest.")
    change: Share = Field(0.1, description="Of the share, up or down, at a time.")
    tolerance: Share = Field(0.05, description="Change of the mean loss that moves it.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Of the mean loss.")

    @model_validator(mode="after")
    def _falls(self) -> Difficulty:
        if self.keep < self.least:
            raise ValueError(
                f"keeps a share of {self.keep:g} at first, below the smallest ({self.least:g}): lower least"
            )
        return self

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    whole_distribution: ClassVar[bool] = True


class Position(TokenWeight):
    """By the number of loss tokens before it in its sequence: least + (1 - least) 2^(-number / half_life)."""

    kind: Literal["position"] = "position"
    half_life: Positive = Field(description="Tokens over which the weight falls by half, for example 512.")
    least: Share = Field(0.0, description="What it falls to.")


TOKEN_WEIGHTS = Station(TokenWeight, (Entropy, Confidence, Difficulty, Position), class_name="TokenWeight")
AnyTokenWeight = Annotated[TokenWeight, TOKEN_WEIGHTS]


class Term(Section):
    """Base of all terms."""

    loss: str
    weight: Weight = Field(1.0, description="Of the term in the sum.")
    token_weights: tuple[AnyTokenWeight, ...] = Field(
        (), description="Weights of each token in it, multiplied: entropy, confidence, difficulty, position."
    )

    form: ClassVar[Literal["row", "sequence", "features"]] = "row"
    """row: a function of one row, averaged over loss tokens; sequence: of whole answers, averaged over groups;
    features: of states inside both models at one row, or at all rows of a micro-batch, averaged over loss tokens."""
    compared_rows: ClassVar[Literal["preference", "candidates"]] = "preference"
    """Of a term that needs groups: the format of its rows."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """labels: of every row, from a teacher; target_event: among them the target id; likeliest_ids: the teacher's
    likeliest ids, each by itself; groups: several answers to one prompt; rewards: a number per answer; target_logprobs:
    log-probabilities of the target ids alone, from a teacher; target: the same, whatever else the labels hold;
    rollouts: text that the student wrote, with the log-probabilities of its tokens; chunks: `align: chunks`; layers:
    states of a teacher."""
    tells: ClassVar[tuple[str, ...]] = ()
    """What its function says of each row beside the value; metrics have the means."""
    moves: ClassVar[bool] = False
    """Whether numbers of it follow the run, by a schedule."""
    exactness: ClassVar[Mapping[str, Exactness]] = {}
    """By kind of labels, how the value compares with that over the whole vocabulary. A kind of a user's is not listed
    and allowed."""
    across_tokenizers: ClassVar[bool] = False
    """Whether it is for teachers with another tokenizer (`align`), and measured in docs/tokenizers.md."""
    instead: ClassVar[str] = ""
    """What to write where the labels' kind is refused."""

    def same_as(self, other: Term) -> bool:
        """Whether both are one term but for their weights."""
        return self.model_copy(update={"weight": other.weight}) == other

    @classmethod
    def looks_at_labels(cls) -> bool:
        """Whether its value depends on what a teacher says."""
        return bool(cls.needs & {"labels", "target_logprobs", "layers"})

    @classmethod
    def exactness_with(cls, labels: Labels | NoLabels | type[Labels]) -> Exactness | None:
        """`exactness` with labels of a kind, `refused` where those lack what it needs; exact where it looks at none,
        None where the kind is a user's."""
        if not cls.looks_at_labels():
            return "exact"
        if cls.needs - _OF_ROWS - labels.gives:
            return "refused"
        return cls.exactness.get(labels.model_fields["kind"].default if isinstance(labels, type) else labels.kind)

    def problem_with(self, labels: Labels) -> str | None:
        """Why it cannot be computed from labels with these parameters, and what to write; None where it can."""
        return None

    def exactness_of(self, labels: Labels | NoLabels) -> Exactness | None:
        """`exactness_with` these labels, weights of tokens included: one of a distribution that labels lump is
        biased."""
        found = self.exactness_with(labels)
        lumped = ForwardKl.exactness_with(labels) != "exact"
        if (
            found in ("exact", "lower_bound", "unbiased")
            and lumped
            and any(one.whole_distribution for one in self.token_weights)
        ):
            return "biased"
        return found

    @field_validator("token_weights")
    @classmethod
    def _of_rows(cls, weights: tuple[TokenWeight, ...]) -> tuple[TokenWeight, ...]:
        if weights and cls.form != "row":
            what = "compares whole answers" if cls.form == "sequence" else "is about states inside the models"
            raise ValueError(f"a term that {what} has no weights of tokens: remove token_weights")
        kinds = [one.kind for one in weights]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"{twice} is named twice: keep one of both")
        return weights

    @property
    def least_vocabulary(self) -> int:
        """How many ids a vocabulary needs."""
        return 1

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
        "nucleus": "lower_bound",
        "given_ids": "lower_bound",
        "sampled": "refused",
        "hidden": "exact",
        "dense": "exact",
        "token": "refused",
    }
    instead: ClassVar[str] = "write labels: topk (some ids of each row) or labels: hidden (exact)"


_BIASED_BY_A_TAIL: Mapping[str, Exactness] = {
    kind: "biased" if found == "lower_bound" else found for kind, found in Divergence.exactness.items()
}
"""Of what is no f-divergence: lumped, it may come out smaller or larger."""


class ForwardKl(Divergence):
    """KL(teacher, student) (arXiv 1503.02531): covers all modes of the teacher."""

    loss: Literal["forward_kl"] = "forward_kl"

    exactness: ClassVar[Mapping[str, Exactness]] = {**Divergence.exactness, "sampled": "unbiased"}


class ReverseKl(Divergence):
    """KL(student, teacher) (MiniLLM, arXiv 2306.08543): seeks modes."""

    loss: Literal["reverse_kl"] = "reverse_kl"

    instead: ClassVar[str] = "write labels: given_ids (the student's likeliest ids) or labels: hidden (exact)"


class Jsd(Divergence):
    """The generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

    loss: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="weight of the teacher in the mixture, for example beta: 0.5."
    )
    normalised: bool = Field(
        False, description="Divided by beta (1 - beta): as large as forward_kl near beta 0, as reverse_kl near 1."
    )


class SkewForwardKl(Divergence):
    """KL(teacher, alpha teacher + (1 - alpha) student) (DistiLLM, arXiv 2402.03898): forward_kl, bounded."""

    loss: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="weight of the teacher in the mixture.")


class SkewReverseKl(Divergence):
    """KL(student, alpha student + (1 - alpha) teacher) (DistiLLM, arXiv 2402.03898): reverse_kl, bounded."""

    loss: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="weight of the student in the mixture.")


class Tvd(Divergence):
    """The total variation distance, half the sum of abs(p - q) (f-distill, arXiv 2307.15190): at most 1, robust."""

    loss: Literal["tvd"] = "tvd"


class AdaptiveKl(Divergence):
    """forward_kl and reverse_kl of each row, weighted by how far teacher and student differ over the teacher's
    likeliest ids and over the others (AKL, arXiv 2404.02657)."""

    loss: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="The head: the likeliest ids while their probabilities sum to no more than this, at least one."
    )

    exactness: ClassVar[Mapping[str, Exactness]] = _BIASED_BY_A_TAIL


class AlphaBeta(Divergence):
    """The alpha-beta divergence (ABKD, arXiv 2505.04560): forward_kl at (1, 0), reverse_kl at (0, 1)."""

    loss: Literal["alpha_beta"] = "alpha_beta"
    alpha: Annotated[float, Field(ge=0.05, le=2)] = Field(0.2, description="Larger: more where the teacher is sure.")
    beta: Annotated[float, Field(ge=0.05, le=2)] = Field(0.7, description="Larger: more where the student is sure.")

    exactness: ClassVar[Mapping[str, Exactness]] = _BIASED_BY_A_TAIL


class Taid(Divergence):
    """KL(m, student) with a target m between both models, in logits, that moves to the teacher while the loss falls
    (TAID, arXiv 2501.16937)."""

    loss: Literal["taid"] = "taid"
    start: Annotated[float, Field(ge=0, lt=1)] = Field(0.4, description="Weight of the teacher's logits at first.")
    end: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="And at the end of the run.")
    step_size: Annotated[float, Field(ge=0, le=1)] = Field(5e-4, description="How fast a falling loss moves it.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="Of the relative change of the loss.")

    exactness: ClassVar[Mapping[str, Exactness]] = _BIASED_BY_A_TAIL
    moves: ClassVar[bool] = True

    @model_validator(mode="after")
    def _moves_forwards(self) -> Taid:
        if self.start > self.end:
            raise ValueError(f"taid moves from start to end: start ({self.start:g}) must not exceed end ({self.end:g})")
        return self


class Lsm(Divergence):
    """KL(student, teacher) over the teacher's k likeliest ids, both renormalised there (LSM, arXiv 2603.25562); ids
    outside get no gradient at all."""

    loss: Literal["lsm"] = "lsm"
    k: Positive = Field(32, description="Ids of each row; no more than the labels keep.")

    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "likeliest_ids"})
    exactness: ClassVar[Mapping[str, Exactness]] = {**_BIASED_BY_A_TAIL, "topk": "exact"}

    @property
    def least_vocabulary(self) -> int:
        return self.k

    def problem_with(self, labels: Labels) -> str | None:
        if labels.kind != "topk":
            return None
        # control ids take places of the likeliest; `auto` is a list once the tokenizer has been read
        controls = 0 if labels.control_ids == "auto" else len(labels.control_ids)
        if labels.k - controls >= self.k:
            return None
        kept = f"lsm compares the {self.k} likeliest ids of each row, and labels: topk keep {labels.k}"
        kept += f", {controls} of them control ids" if controls else ""
        here = f"k: {labels.k - controls} or less here, or " if labels.k > controls else ""
        return f"{kept}: write {here}k: {self.k + controls} there"


class Dkd(Divergence):
    """The target id against all others, and the others among themselves, each with a weight of its own (DKD, arXiv
    2203.08679); forward_kl is the first plus (1 - p(target)) times the second."""

    loss: Literal["dkd"] = "dkd"
    alpha: Annotated[float, Field(ge=0, le=1e3)] = Field(1.0, description="Of the target id against all others.")
    beta: Annotated[float, Field(ge=0, le=1e3)] = Field(1.0, description="Of the other ids among themselves.")

    @model_validator(mode="after")
    def _weighs_something(self) -> Dkd:
        if not self.alpha and not self.beta:
            raise ValueError("alpha and beta are both 0, so that nothing is learnt: raise one of them")
        return self

    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "target_event"})


class Atkd(Divergence):
    """dkd whose easy rows, those where the teacher is surest of the target id, learn from the other ids alone (ATKD,
    arXiv 2402.11890)."""

    loss: Literal["atkd"] = "atkd"
    easy_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="Of the mean over easy rows; the mean over hard rows has the rest."
    )
    hard_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Of the rows that is hard, by a threshold that follows it from step to step."
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "target_event"})
    tells: ClassVar[tuple[str, ...]] = ("hard_share",)
    moves: ClassVar[bool] = True


class _OnRollouts(Sampled, Term):
    """Base of terms on text that the student wrote, of which each token is one sample: labels need say nothing but the
    teacher's log-probability of it. What else they say lessens the noise."""

    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "target", "rollouts"})
    exactness: ClassVar[Mapping[str, Exactness]] = {
        **dict.fromkeys(Divergence.exactness, "unbiased"),
        "sampled": "refused",
    }
    tells: ClassVar[tuple[str, ...]] = ("ratio", "truncated")
    instead: ClassVar[str] = "they do not hold the sampled token: write labels: token, topk, given_ids or hidden"

    def exactness_of(self, labels: Labels | NoLabels) -> Exactness | None:
        found = super().exactness_of(labels)
        return "biased" if found == "unbiased" and self.is_biased else found

    def problem_with(self, labels: Labels) -> str | None:
        problem = self.problem_with_samples(labels)
        return None if problem is None else f"{self.loss} {problem}"


class PolicyGradient(PolicyParameters, _OnRollouts):
    """Reverse KL by the tokens that the student wrote: the reward of each is log p(token) - log q(token), and what
    follows it counts with `discount` (on-policy distillation as of Thinking Machines; MiniLLM, arXiv 2306.08543; with a
    verifier's reward beside it GKD's, arXiv 2306.13649, section 3.2). A token counts with its importance ratio."""

    loss: Literal["policy_gradient"] = "policy_gradient"

    def parameters(self) -> dict[str, Any]:
        own = ("max_ratio", "clip", "closed_form", "fixed_negative")
        return {name: getattr(self, name) for name in own}


class MiniLlm(Returned, _OnRollouts):
    """reverse_kl of each token, and the mean reward of the tokens after it as its return (MiniLLM, arXiv 2306.08543,
    equations 3 to 7), by the text that the student wrote. Its language-modelling loss is a task of `cross_entropy`
    beside this one, its mixed sampling a matter of `answers`."""

    loss: Literal["minillm"] = "minillm"

    @property
    def has_closed_form(self) -> bool:
        return True

    def parameters(self) -> dict[str, Any]:
        return {"max_ratio": self.max_ratio, "clip": self.clip}


class K2(_OnRollouts):
    """(log q(token) - log p(token))^2 / 2 of each token that the student wrote: on average its gradient is that of
    reverse_kl, though its value is another (Schulman's k2, joschu.net/blog/kl-approx.html)."""

    loss: Literal["k2"] = "k2"


class CrossEntropy(Term):
    """-log q(target id): hard labels, which need no teacher."""

    loss: Literal["cross_entropy"] = "cross_entropy"


class Dpo(Term):
    """-log sigmoid(beta (difference of log q/p between the chosen and the rejected answer)) (arXiv 2305.18290); the
    teacher is the reference p."""

    loss: Literal["dpo"] = "dpo"
    beta: _Strength = Field(0.1, description="strength of the pull towards the reference.")

    form: ClassVar[Literal["row", "sequence", "features"]] = "sequence"
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "target_logprobs"})
    exactness: ClassVar[Mapping[str, Exactness]] = {"token": "exact"}


class _Listwise(Term):
    """Base of distances between two distributions over the answers to one prompt."""

    per_token: bool = Field(
        True, description="By the mean log-probability of an answer's tokens; false: by their sum, as sampling would."
    )
    temperature: Temperature = Field(1.0, description="Log-probabilities are divided by it.")

    form: ClassVar[Literal["row", "sequence", "features"]] = "sequence"
    compared_rows: ClassVar[Literal["preference", "candidates"]] = "candidates"


class ListwiseKl(_Listwise):
    """KL(p, q) over the candidates of a prompt, p the softmax of the teacher's log-probabilities of whole candidates,
    q of the student's (listwise distillation, RocketQAv2, arXiv 2110.07367, equation 4)."""

    loss: Literal["listwise_kl"] = "listwise_kl"

    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "target_logprobs"})
    exactness: ClassVar[Mapping[str, Exactness]] = {"token": "exact"}


class ScoredListwiseKl(_Listwise):
    """listwise_kl with p the softmax of the candidates' scores, which the rows hold: of a reranker, a judge, a person.
    It needs no teacher: `labels: none`."""

    loss: Literal["scored_listwise_kl"] = "scored_listwise_kl"
    score_temperature: Temperature = Field(1.0, description="Scores are divided by it.")

    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "rewards"})


class Features(Term):
    """How far the states after a layer of the student are from those after one of the teacher (arXiv 2402.13116, table
    2): l2, the mean square of the difference; l1, its mean size; cosine, 1 - cos; ce, the cross-entropy between the
    softmaxes of both, as of distributions over the channels; mmd, between the two sets of states of a micro-batch,
    whichever row they are of. Layers are counted as `layers` of `labels: hidden` are."""

    loss: Literal["features"] = "features"
    distance: Literal["l2", "l1", "cosine", "ce", "mmd"] = Field("l2", description="As above.")
    student_layer: Natural = Field(description="0 to the number of its layers.")
    teacher_layer: Natural = Field(description="One of `layers` of `labels: hidden`.")
    projector: Literal["none", "linear"] = Field(
        "none",
        description="linear: the student's states go through a matrix that is learnt with it and thrown away with the "
        "run, as they must where both models differ in width.",
    )
    normalised: bool = Field(
        True, description="States are divided by their root mean square first, of which a few channels are the most."
    )
    temperature: Temperature = Field(1.0, description="Of ce alone: states are divided by it.")

    form: ClassVar[Literal["row", "sequence", "features"]] = "features"
    needs: ClassVar[frozenset[Need]] = frozenset({"layers"})
    exactness: ClassVar[Mapping[str, Exactness]] = {"hidden": "exact"}
    instead: ClassVar[str] = "write labels: {kind: hidden, layers: [the teacher_layer of each such term]}"

    @model_validator(mode="after")
    def _temperature_is_of_ce(self) -> Features:
        if self.temperature != 1 and self.distance != "ce":
            text = f"distance: {self.distance} has none, only ce does: remove it"
            raise refusal(("temperature",), self.temperature, text)
        return self

    def problem_with(self, labels: Labels) -> str | None:
        if self.teacher_layer in labels.layers:
            return None
        layers = sorted({*labels.layers, self.teacher_layer})
        held = f"layers {list(labels.layers)}" if labels.layers else "no layers"
        return (
            f"teacher_layer: {self.teacher_layer} is compared, and labels: hidden hold {held}: write labels: "
            f"{{kind: hidden, layers: {layers}}}"
        )

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance, "normalised": self.normalised, "temperature": self.temperature}


class ChunkKl(Term):
    """KL of whether a chunk of the text comes, tau (P log P/Q + (1 - P) log (1 - P)/(1 - Q)) by its probabilities to
    the power of 1/tau, P of the teacher and Q of the student, for teachers with another tokenizer (ALM, arXiv
    2503.20083)."""

    loss: Literal["chunk_kl"] = "chunk_kl"
    temperature: Annotated[float, Field(ge=1, le=1e4)] = Field(
        100.0,
        description="tau: at 1 an unlikely chunk teaches nothing; at 100, as in ALM, about as much as a likely one.",
    )

    across_tokenizers: ClassVar[bool] = True
    form: ClassVar[Literal["row", "sequence", "features"]] = "sequence"
    needs: ClassVar[frozenset[Need]] = frozenset({"target_logprobs", "chunks"})
    exactness: ClassVar[Mapping[str, Exactness]] = {"token": "biased"}

    def exactness_of(self, labels: Labels | NoLabels) -> Exactness | None:
        """At a temperature of 1 a lower bound of the KL divergence."""
        found = super().exactness_of(labels)
        return "lower_bound" if found == "biased" and self.temperature == 1 else found


class Uld(Divergence):
    """Sum of |p - q| over sorted probabilities, for teachers with any other tokenizer (arXiv 2402.12030): it does not
    look at which tokens they are of."""

    loss: Literal["uld"] = "uld"

    exactness: ClassVar[Mapping[str, Exactness]] = {
        **dict.fromkeys(("topk", "nucleus", "sampled", "given_ids", "token"), "refused"),
        **dict.fromkeys(("hidden", "dense"), "exact"),
    }
    across_tokenizers: ClassVar[bool] = True
    instead: ClassVar[str] = "it sorts all probabilities: write labels: hidden"


LOSSES = Station(
    Term,
    (
        ForwardKl,
        ReverseKl,
        Jsd,
        SkewForwardKl,
        SkewReverseKl,
        Tvd,
        AdaptiveKl,
        AlphaBeta,
        Taid,
        Lsm,
        Dkd,
        Atkd,
        PolicyGradient,
        MiniLlm,
        K2,
        CrossEntropy,
        Dpo,
        ListwiseKl,
        ScoredListwiseKl,
        Features,
        ChunkKl,
        Uld,
    ),
    class_name="Term",
    tag="loss",
    refused=REFUSED,
    other_words={
        **dict.fromkeys(("fkl", "kl", "kld", "kl_div", "kd", "soft_cross_entropy"), "forward_kl"),
        **dict.fromkeys(("rkl", "reverse_kld"), "reverse_kl"),
        **dict.fromkeys(("js", "jsd_beta", "jensen_shannon", "gkd", "generalized_jsd"), "jsd"),
        **dict.fromkeys(("sfkl", "skl", "skewed_kl", "skew_kl", "skewed_forward_kl"), "skew_forward_kl"),
        **dict.fromkeys(("srkl", "skewed_reverse_kl", "distillm"), "skew_reverse_kl"),
        **dict.fromkeys(("tv", "tvd_loss", "total_variation"), "tvd"),
        **dict.fromkeys(("akl", "adaptive_kld"), "adaptive_kl"),
        **dict.fromkeys(("ab", "abkd", "ab_divergence"), "alpha_beta"),
        **dict.fromkeys(("ce", "xent", "nll", "sft", "hard"), "cross_entropy"),
        **dict.fromkeys(("listwise", "rank_kl"), "listwise_kl"),
        **dict.fromkeys(("mse", "l2", "l1", "cosine", "mmd", "hidden", "feature"), "features"),
        **dict.fromkeys(("alm", "gold", "chunk"), "chunk_kl"),
    },
)
AnyTerm = Annotated[Term, LOSSES]

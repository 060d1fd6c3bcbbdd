"""Several teachers on the same rows: mixtures and terms of each against float64 from the definitions, over the
full-vocabulary logits of two tiny teachers of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import loss_oracles as oracle
import numpy as np
import pytest
import torch
from loss_oracles import term
from tiny_models import tiny_model

from configs.losses import Term
from configs.tasks import How
from trainer.labels import dense, given_ids, hidden, topk
from trainer.labels.joined import joined_ids
from trainer.losses.ensemble import WEIGHT, Together, logit_mean, probability_mean, target_logprobs
from trainer.losses.fused import HeadLoss, LossPart, head_loss
from trainer.losses.objective import Objective
from trainer.model.head import Head, HeadShape

V, H, N = 283, 16, 40
TEMPERATURE = 1.3
MIX = (term("forward_kl", 0.8), term("reverse_kl", 0.2), term("jsd", 0.3, 0.4), term("cross_entropy", 0.5))
ENCODINGS = {"hidden": hidden.Encoding(temperature=TEMPERATURE), "dense": dense.Encoding(temperature=TEMPERATURE)}
TOPK = topk.Encoding(k=20, temperature=TEMPERATURE)
TEACHERS = {"big": 3, "code": 4}


@dataclass(frozen=True)
class World:
    """A student's head, and two teachers' hidden states and logits of the same text."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target_ids: torch.Tensor
    states: Mapping[str, torch.Tensor]
    heads: Mapping[str, Head]
    weights: torch.Tensor  # float64 [N, 2], of each row

    def logits(self, name: str) -> torch.Tensor:
        return self.heads[name].logits(self.states[name])

    def labels(self, encoding: object, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        columns = {}
        for index, name in enumerate(TEACHERS):
            source = self.states[name] if encoding.needs == "hidden" else self.logits(name)
            columns |= {f"{name}/{key}": c for key, c in encoding.encode(source, self.target_ids).items()}
            columns[f"{name}/{WEIGHT}"] = weights[:, index : index + 1].float()
        return columns

    def fused(
        self, encoding: object, how: How, *, terms: tuple[Term, ...] = MIX, weights: torch.Tensor | None = None
    ) -> HeadLoss:
        teachers = tuple(TEACHERS) if how == "per_teacher" else ()
        labels = self.labels(encoding, self.weights if weights is None else weights)
        together = Together(encoding, tuple(TEACHERS), how, self.heads)
        part = LossPart(slice(0, N), labels, together, Objective.of(terms, encoding, teachers=teachers), 0.25)
        shape = HeadShape()
        return head_loss(
            self.hidden, self.weight, None, self.target_ids,
            head_shape=shape, vocabulary_size=V, parts=[part], chunk_rows=16,
        )  # fmt: skip

    def by_hand(self, how: How, *, terms: tuple[Term, ...] = MIX, k: int | None = None) -> torch.Tensor:
        """float64, from the definitions."""
        student = self.hidden.double() @ self.weight.double().T
        teachers = [self.logits(name).double() for name in TEACHERS]
        p = [oracle.probabilities(logits, TEMPERATURE) for logits in teachers]
        w = self.weights.T[..., None]
        given = {"temperature": TEMPERATURE, "k": k}
        if how == "per_teacher":
            of_labels = [one for one in terms if "labels" in one.needs]
            own = [oracle.objective(tuple(of_labels), student, one, self.target_ids, **given) for one in teachers]
            hard = tuple(one for one in terms if "labels" not in one.needs)
            rest = oracle.objective(hard, student, teachers[0], self.target_ids, **given) if hard else 0
            return 0.25 * (w[0][:, 0] * own[0] + w[1][:, 0] * own[1] + rest).sum()
        if how == "probability_mean":
            mixed = w[0] * p[0] + w[1] * p[1]
        else:
            product = p[0] ** w[0] * p[1] ** w[1]
            mixed = product / product.sum(1, keepdim=True)
        return 0.25 * oracle.objective(terms, student, mixed.log() * TEMPERATURE, self.target_ids, **given).sum()


@pytest.fixture(scope="module")
def world() -> World:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (1, N + 1), generator=g)
    states, heads = {}, {}
    for name, seed in TEACHERS.items():
        model = tiny_model("llama", seed=seed)
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        states[name] = output.hidden_states[-1][0, :-1] * 6  # a tiny model's own logits are nearly flat
        heads[name] = Head(model.get_output_embeddings().weight.detach(), None, HeadShape(), V)
        torch.testing.assert_close(
            heads[name].logits(states[name]) / 6, output.logits[0, :-1, :V], atol=1e-4, rtol=1e-4
        )
    weights = torch.rand(N, 2, generator=g, dtype=torch.float64)
    return World(
        torch.randn(N, H, generator=g).requires_grad_(),
        (torch.randn(V, H, generator=g) * 0.6).requires_grad_(),
        ids[0, 1:],
        states,
        heads,
        weights / weights.sum(1, keepdim=True),
    )


def _same(world: World, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    of_ours, of_theirs = (torch.autograd.grad(loss, (world.hidden, world.weight)) for loss in (ours, theirs))
    pairs = [(ours.detach(), theirs.detach()), *zip(of_ours, of_theirs, strict=True)]
    return all(float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("how", ["probability_mean", "logit_mean", "per_teacher"])
def test_loss_and_gradient_equal_the_definition_and_swapped_weights_do_not(world: World, kind: str, how: How) -> None:
    by_hand = world.by_hand(how)
    assert _same(world, world.fused(ENCODINGS[kind], how).loss, world.by_hand(how))
    swapped = world.fused(ENCODINGS[kind], how, weights=world.weights.flip(1))
    assert not _same(world, swapped.loss, by_hand, 1e-2)


@pytest.mark.parametrize(("how", "other"), [("probability_mean", "logit_mean"), ("logit_mean", "per_teacher")])
def test_one_way_to_mix_is_not_another(world: World, how: How, other: How) -> None:
    assert not _same(world, world.fused(ENCODINGS["dense"], how).loss, world.by_hand(other), 1e-2)


def test_terms_of_each_teacher_are_computed_over_its_own_kept_ids_and_have_its_name(world: World) -> None:
    terms = (term("forward_kl", 0.8), term("cross_entropy", 0.5))
    ours = world.fused(TOPK, "per_teacher", terms=terms)
    assert list(ours.sums[0]) == ["forward_kl/big", "forward_kl/code", "cross_entropy"]
    # float16 log-probabilities are rounded by 0.004 nats at most.
    assert _same(world, ours.loss, world.by_hand("per_teacher", terms=terms, k=20), 5e-3)
    swapped = world.fused(TOPK, "per_teacher", terms=terms, weights=world.weights.flip(1))
    assert not _same(world, swapped.loss, world.by_hand("per_teacher", terms=terms, k=20), 1e-2)
    student = (world.hidden.double() @ world.weight.double().T).detach()
    plain = (term("forward_kl"),)
    given = {"temperature": TEMPERATURE, "k": 20}
    by_hand = {
        name: oracle.objective(plain, student, world.logits(name), world.target_ids, **given) for name in TEACHERS
    }
    bare = {name: float(rows.sum()) / TEMPERATURE**2 for name, rows in by_hand.items()}
    for name, value in bare.items():
        assert float(ours.sums[0][f"forward_kl/{name}"]) == pytest.approx(value, rel=2e-3), "bare: without its weight"


@pytest.mark.parametrize("how", ["probability_mean", "logit_mean"])
def test_a_teacher_with_all_of_the_weight_is_the_only_one(world: World, how: How) -> None:
    encoding = ENCODINGS["hidden"]
    one_hot = torch.zeros(N, 2, dtype=torch.float64)
    one_hot[:, 1] = 1
    mixed = world.fused(encoding, how, weights=one_hot)
    labels = encoding.encode(world.states["code"], world.target_ids)
    part = LossPart(slice(0, N), labels, encoding, Objective.of(MIX, encoding), 0.25, world.heads["code"])
    alone = head_loss(
        world.hidden, world.weight, None, world.target_ids,
        head_shape=HeadShape(), vocabulary_size=V, parts=[part], chunk_rows=16,
    )  # fmt: skip
    assert _same(world, mixed.loss, alone.loss.double(), 1e-5)
    assert mixed.loss.isfinite()


def test_equal_teachers_are_themselves_whatever_their_weights() -> None:
    logprobs = torch.randn(9, 30, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    weights = [torch.full((9, 1), share) for share in (0.2, 0.5, 0.3)]
    for mix in (probability_mean, logit_mean):
        torch.testing.assert_close(mix([logprobs] * 3, weights), logprobs, atol=1e-6, rtol=1e-6)


def test_the_mean_over_probabilities_keeps_what_the_mean_over_logits_loses() -> None:
    """Two certain teachers that disagree: one keeps both modes, the other what neither excludes."""
    first, second = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.01, 0.98, 0.01]]).log()
    weights = [torch.full((1, 1), 0.5)] * 2
    torch.testing.assert_close(
        probability_mean([first, second], weights).exp(), torch.tensor([[0.495, 0.495, 0.01]]), atol=1e-6, rtol=1e-5
    )
    geometric = logit_mean([first, second], weights).exp()
    assert geometric[0, 2] > 0.04
    assert geometric.sum() == pytest.approx(1)


@pytest.mark.parametrize("encoding", [*ENCODINGS.values(), TOPK], ids=lambda one: one.kind)
def test_the_log_probability_of_target_ids_is_that_of_the_teacher_at_the_temperature(world: World, encoding) -> None:
    for name in TEACHERS:
        source = world.states[name] if encoding.needs == "hidden" else world.logits(name)
        given = {"vocabulary_size": V, "chunk_rows": 7}
        labels = encoding.encode(source, world.target_ids)
        found = target_logprobs(encoding, labels, world.target_ids, world.heads[name], **given)
        expected = oracle.probabilities(world.logits(name), TEMPERATURE).gather(1, world.target_ids[:, None])[:, 0]
        torch.testing.assert_close(found, expected.log(), atol=1e-4, rtol=1e-4)
        if encoding is not TOPK:
            moved = target_logprobs(encoding, labels, world.target_ids.roll(1), world.heads[name], **given)
            assert (moved - expected.log()).abs().max() > 0.1


def test_a_teacher_that_did_not_judge_the_rows_has_no_term_and_gives_nothing(world: World) -> None:
    encoding, terms = ENCODINGS["dense"], (term("forward_kl"),)
    objective = Objective.of(terms, encoding, teachers=tuple(TEACHERS))
    everything = world.labels(encoding, torch.ones(N, 2))
    labels = {name: column for name, column in everything.items() if name.startswith("code/")}
    logits = (world.hidden @ world.weight.T).detach()
    loss, values = objective.rows(logits, labels, world.target_ids, Together(encoding, ("code",), "per_teacher"))
    assert not values["forward_kl/big"].any()
    own = {"logprobs": everything["code/logprobs"]}
    alone, _ = Objective.of(terms, encoding).rows(logits, own, world.target_ids, encoding)
    torch.testing.assert_close(loss, alone)


def _joined(world: World) -> tuple[object, torch.Tensor]:
    """The encoding of a second request, and the ids that both teachers keep, as it is given them."""
    kept = [TOPK.encode(world.logits(name), world.target_ids)["ids"].numpy() for name in TEACHERS]
    encoding = given_ids.Encoding(k=40, ids="teachers", add_target=False, temperature=TEMPERATURE)
    return encoding, torch.from_numpy(joined_ids(kept, 40))


def _labels_of_joined(world: World, weights: torch.Tensor) -> tuple[object, dict[str, torch.Tensor]]:
    encoding, ids = _joined(world)
    columns = {}
    for index, name in enumerate(TEACHERS):
        made = encoding.encode(world.logits(name), world.target_ids, ids)
        columns |= {f"{name}/{key}": column for key, column in made.items()}
        columns[f"{name}/{WEIGHT}"] = weights[:, index : index + 1].float()
    return encoding, columns


def _mixture_over_joined_ids(world: World, terms: dict[str, float]) -> torch.Tensor:
    """float64, row by row: the mixture of the whole vocabulary, lumped into the joined ids and everything else."""
    student = oracle.probabilities(world.hidden.double() @ world.weight.double().T, TEMPERATURE)
    p = [oracle.probabilities(world.logits(name), TEMPERATURE) for name in TEACHERS]
    mixed = world.weights[:, :1] * p[0] + world.weights[:, 1:] * p[1]
    total = torch.zeros((), dtype=torch.float64)
    for row, ids in enumerate(_joined(world)[1].long()):
        own = ids[ids >= 0]
        assert 20 < len(own) <= 40, "the teachers keep unlike ids"
        pair = (oracle.lump(one[row : row + 1], own[None]) for one in (mixed, student))
        lumped = tuple(pair)
        total = total + sum(weight * oracle.DIVERGENCES[loss](*lumped).sum() for loss, weight in terms.items())
    return 0.25 * TEMPERATURE**2 * total


def test_the_mixture_over_joined_ids_is_that_of_the_vocabulary_lumped_and_swapped_weights_are_not(world: World) -> None:
    losses = {"forward_kl": 0.8, "reverse_kl": 0.2}
    terms = tuple(term(loss, weight) for loss, weight in losses.items())
    for weights, equal in ((world.weights, True), (world.weights.flip(1), False)):
        encoding, labels = _labels_of_joined(world, weights)
        together = Together(encoding, tuple(TEACHERS), "probability_mean")
        part = LossPart(slice(0, N), labels, together, Objective.of(terms, encoding), 0.25)
        loss = head_loss(
            world.hidden, world.weight, None, world.target_ids,
            head_shape=HeadShape(), vocabulary_size=V, parts=[part], chunk_rows=16,
        ).loss  # fmt: skip
        by_hand = _mixture_over_joined_ids(world, losses)
        assert _same(world, loss, by_hand, 5e-3 if equal else 2e-2) is equal  # float16 rounds by 0.004 nats


def test_dkd_finds_the_mixture_s_own_log_probability_of_a_target_that_nobody_kept(world: World) -> None:
    encoding, labels = _labels_of_joined(world, world.weights)
    logits = (world.hidden @ world.weight.T).detach()
    pair = Together(encoding, tuple(TEACHERS), "probability_mean").align(logits, labels)
    p = [oracle.probabilities(world.logits(name), TEMPERATURE) for name in TEACHERS]
    mixed = world.weights[:, :1] * p[0] + world.weights[:, 1:] * p[1]
    expected = mixed.gather(1, world.target_ids[:, None])[:, 0].log()
    torch.testing.assert_close(pair.teacher_target.double(), expected, atol=1e-4, rtol=1e-4)


def test_ids_are_joined_once_each_in_any_order_of_the_teachers() -> None:
    first, second = np.array([[5, 2], [9, 1]], np.uint16), np.array([[2, 7], [9, 1]], np.uint16)
    expected = [[2, 5, 7, -1, -1], [1, 9, -1, -1, -1]]
    assert joined_ids([first, second], 5).tolist() == expected == joined_ids([second, first], 5).tolist()

"""The start-up self-tests find what they are for: each breaks when its subject is broken, and only then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from architectures import WINDOW, architecture_config, architecture_model
from tiny_models import tiny_model
from torch import distributed

from configs.labels import Labels, Nucleus, Sampled
from configs.losses import CrossEntropy, Dpo, ForwardKl, ReverseKl
from trainer.checks import self_tests
from trainer.checks.self_tests import Subject, run_self_tests
from trainer.labels.encoding import load_encoding
from trainer.labels.hidden import Encoding as Hidden
from trainer.labels.token import Encoding as Token
from trainer.labels.topk import Encoding as TopK
from trainer.losses.objective import Objective
from trainer.model.attention import IMPLEMENTATIONS
from trainer.model.head import HeadShape
from trainer.model.load import StudentModule

TERMS = (ReverseKl(), CrossEntropy(weight=0.5))


@pytest.fixture(scope="module", autouse=True)
def _group_of_one() -> Iterator[None]:
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    yield
    distributed.destroy_process_group()


def _losses(encoding: Any, objective: Objective | None = None) -> dict[str, tuple[Any, Objective]]:
    return {"main": (encoding, objective or Objective.of(TERMS, encoding))}


def _subject(**changes: Any) -> Subject:
    causal = tiny_model("qwen3")
    causal.config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    module = StudentModule(causal)
    subject = Subject(
        module=module,
        forward=module,
        attention="sdpa",
        losses=_losses(TopK(k=16)),
        vocabulary_size=283,
        chunk_rows=512,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=128,
    )
    return dataclasses.replace(subject, **changes)


def _failed(subject: Subject) -> list[str]:
    return [result.name for result in run_self_tests(subject) if not result.passed]


@pytest.mark.parametrize("encoding", [TopK(k=16), TopK(k=4, temperature=2.0), Hidden()])
def test_all_pass_on_a_sound_student(encoding: Any) -> None:
    results = run_self_tests(_subject(losses=_losses(encoding)))
    assert all(result.passed for result in results), results
    assert all(any(character.isdigit() for character in result.numbers) for result in results)


@pytest.mark.parametrize("labels", [Nucleus(k_max=40), Sampled()])
def test_ragged_and_drawn_labels_pass_on_a_sound_student(labels: Labels) -> None:
    encoding = load_encoding(labels)
    assert _failed(_subject(losses=_losses(encoding, Objective.of((ForwardKl(),), encoding)))) == []


def test_attention_that_ignores_borders_fails_packing_alone() -> None:
    subject = _subject()

    def leaking(*args: Any, borders: Any = None, **arguments: Any) -> Any:
        return subject.module(*args, **arguments)

    assert _failed(dataclasses.replace(subject, forward=leaking)) == ["packing (sdpa)"]


def _windowed() -> torch.nn.Module:
    causal = architecture_model(architecture_config("mistral"))
    causal.config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    return StudentModule(causal)


@pytest.mark.parametrize("lengths", [(WINDOW,), (WINDOW, 60)])
def test_a_window_that_the_packed_attention_loses_fails_packing_alone(lengths: tuple[int, ...]) -> None:
    module = _windowed()
    sound = _subject(module=module, forward=module, lengths=lengths)
    (packing, *_) = results = run_self_tests(sound)
    assert all(result.passed for result in results), results
    assert f"a sequence of {lengths[-1] + 32} tokens crosses {', '.join(map(str, lengths))}" in packing.numbers

    def without_window(*args: Any, borders: Any = None, **arguments: Any) -> Any:
        if borders is None:
            return module(*args, **arguments)
        module.config.sliding_window = 10_000
        try:
            return module(*args, borders=borders, **arguments)
        finally:
            module.config.sliding_window = WINDOW

    assert _failed(dataclasses.replace(sound, forward=without_window)) == ["packing (sdpa)"]


def test_lengths_that_no_row_reaches_or_that_are_too_long_to_test_are_not_crossed() -> None:
    module = _windowed()
    (packing, *_) = run_self_tests(_subject(module=module, forward=module, lengths=(127, 100_000)))
    assert "crosses" not in packing.numbers
    (packing, *_) = run_self_tests(_subject(module=module, forward=module, lengths=(10_000,), max_length=100_000))
    assert packing.numbers.endswith("; not tested: sequences of more than 10000 tokens")


def test_a_head_that_is_read_wrongly_fails() -> None:
    subject = _subject()
    subject.module.head_shape = HeadShape(scale=1.1)
    assert "student logits" in _failed(subject)


class RowsThatSeeEachOther(Objective):
    """An objective whose rows depend on which other rows are computed with them, as a broken kernel's would."""

    def rows(self, logits: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        loss, terms = super().rows(logits, *arguments, **more)
        return loss * (1 + 0.001 * len(loss)), terms


def test_a_loss_that_depends_on_its_chunk_fails() -> None:
    sound = Objective.of(TERMS, TopK(k=16))
    broken = RowsThatSeeEachOther(sound.row_terms)
    assert _failed(_subject(losses=_losses(TopK(k=16), broken))) == ["loss kernel"]
    assert _failed(_subject(losses=_losses(TopK(k=16), sound))) == []


@pytest.mark.parametrize("terms", [(Dpo(),), (Dpo(weight=2.0), CrossEntropy(weight=0.1))])
def test_terms_that_compare_answers_are_tested_through_both_passes(terms: tuple[Any, ...]) -> None:
    sound = Objective.of(terms, Token())
    assert _failed(_subject(losses=_losses(Token(), sound))) == []
    opposite = dataclasses.replace(sound, sequence_terms=(dataclasses.replace(sound.sequence_terms[0], factor=-1.0),))

    class Opposite(Objective):
        def sequences(self, scores: Any) -> Any:
            return opposite.sequences(scores)

    broken = Opposite(sound.row_terms, sound.sequence_terms, needs_reference=True)
    assert _failed(_subject(losses=_losses(Token(), broken))) == ["loss kernel"]


def test_self_tests_leave_the_random_state_alone() -> None:
    subject = _subject()
    before = torch.get_rng_state()
    run_self_tests(subject)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_labels_than_the_loss_is_tested_with_by_default_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_tests, "LOSS_VOCABULARY", 64)
    encoding = TopK(k=100)
    assert _failed(_subject(losses=_losses(encoding))) == []

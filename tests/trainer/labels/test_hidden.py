"""Hidden and dense labels against the logits of real architectures."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from trainer.labels import dense, hidden
from trainer.labels.encoding import TeacherShape, pack_rows, unpack_rows
from trainer.model.head import Head, HeadShape

V = 283  # of the tiny tokenizer; the models have 320 rows


def teacher_of(family: str, *, tied: bool, dtype: torch.dtype = torch.float32):
    """(logits [n, V], final hidden states [n, H], head) of a tiny teacher on random ids."""
    model = tiny_model(family, tied=tied, seed=3, dtype=dtype)
    ids = torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
        logits = model(ids).logits[0, :, :V].float()
    return logits, states, Head(model.lm_head.weight, None, HeadShape.of_config(model.config), V)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_encodings_give_the_models_own_distribution(family: str, tied: bool, temperature: float):
    logits, states, head = teacher_of(family, tied=tied)
    target_ids = torch.zeros(12, dtype=torch.int64)
    expected = logits.double().div(temperature).log_softmax(1).float()
    for encoding, source in ((hidden.Encoding(), states), (dense.Encoding(), logits)):
        encoding = type(encoding)(temperature=temperature)
        labels = encoding.encode(source, target_ids)
        pair = encoding.align(logits, labels, head)
        assert pair.exhaustive
        torch.testing.assert_close(pair.teacher, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pair.student, expected, atol=1e-5, rtol=1e-5)


def test_what_ready_made_of_a_chunk_gives_the_same_pair_as_the_columns():
    logits, states, head = teacher_of("gemma2", tied=True)
    encoding = hidden.Encoding()
    labels = encoding.encode(states, torch.zeros(12, dtype=torch.int64))
    direct, ready = encoding.align(logits, labels, head), encoding.align(logits, encoding.prepare(labels, head), head)
    torch.testing.assert_close(ready.teacher, direct.teacher)


def test_auto_keeps_the_teachers_dtype_and_bfloat16_bits_survive_the_wire():
    _, states, _ = teacher_of("llama", tied=True, dtype=torch.bfloat16)
    encoding = hidden.Encoding()
    layout = encoding.layout(TeacherShape(V, 64, torch.bfloat16))
    made = encoding.encode(states, torch.zeros(12, dtype=torch.int64))
    assert made["hidden"].dtype == layout[0].dtype == torch.bfloat16
    column = unpack_rows(pack_rows(made, layout).numpy(), layout)["hidden"]
    assert column.nbytes == 12 * 64 * 2
    assert torch.equal(torch.from_numpy(column).view(torch.bfloat16), states)


def test_a_named_dtype_wins_over_the_teachers():
    encoding = hidden.Encoding(dtype="bfloat16")
    assert encoding.layout(TeacherShape(V, 64, torch.float32))[0].dtype == torch.bfloat16
    assert encoding.encode(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64))["hidden"].dtype == torch.bfloat16


def test_hidden_labels_without_a_head_are_refused():
    labels = {"hidden": torch.zeros(1, 64)}
    with pytest.raises(ValueError, match="teacher_head"):
        hidden.Encoding().align(torch.zeros(1, V), labels, None)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 8e-3), ("bfloat16", 8e-2)])
def test_rounded_dense_labels_stay_distributions_near_the_exact_ones(dtype: str, tolerance: float):
    logits, _, _ = teacher_of("qwen2", tied=True)
    encoding = dense.Encoding(dtype=dtype)
    pair = encoding.align(logits, encoding.encode(logits, torch.zeros(12, dtype=torch.int64)))
    torch.testing.assert_close(pair.teacher.exp().sum(1), torch.ones(12))
    torch.testing.assert_close(pair.teacher, logits.log_softmax(1), atol=tolerance, rtol=0.0)

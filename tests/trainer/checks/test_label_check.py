"""The label self-test: rows that are long enough and not too long, and a control that every teacher can pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import WINDOW, architecture_folder
from label_oracle import oracle_of, random_unit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from configs.labels import Hidden, Labels, Nucleus, Sampled, TopK
from configs.models import ModelSource
from trainer.checks.label_check import (
    CHECK_TOKENS,
    check_labels,
    plan_check,
    teacher_lengths,
    teacher_truth,
)
from trainer.labels.encoding import TeacherShape, load_encoding, row_keys
from trainer.labels.ragged import flatten_ragged
from trainer.model import attention
from trainer.protocols import SelfTestResult
from trainer.types import LabelHeader, SoftLabelBlock, Unit, tokens_to_read

VOCABULARY = 283
UNIT = random_unit("u", (90, [(20, 80)]), (60, [(5, 50)]))


def _block(unit: Unit, spec: Labels, columns: dict[str, torch.Tensor]) -> SoftLabelBlock:
    hidden = columns.get("hidden", torch.empty(0, 1))
    dtype = str(hidden.dtype).removeprefix("torch.")
    header = LabelHeader("teacher", "1", spec, "tiny", VOCABULARY, hidden.shape[1], dtype)
    as_numpy = {n: (c.view(torch.uint16) if c.dtype == torch.bfloat16 else c).numpy() for n, c in columns.items()}
    offsets = np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)])
    layout = load_encoding(spec).layout(TeacherShape(VOCABULARY, hidden.shape[1], hidden.dtype))
    return SoftLabelBlock(header, unit.tokens_hash(), flatten_ragged(as_numpy, layout), offsets)


def _answers(
    folder: Path,
    unit: Unit,
    *,
    dtype: str = "float32",
    shift: int = 0,
    wrong_from: int | None = None,
    spec: Labels = TopK(k=16),  # noqa: B008 - frozen
) -> tuple[SelfTestResult, ...]:
    """The self-test of labels that transformers made in this dtype; moved by `shift` rows, or noise from a row on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    encoding = load_encoding(spec)
    hidden, logits, following, keys = [], [], [], []
    with torch.no_grad():
        for sequence in unit.sequences:
            ids = torch.from_numpy(sequence.token_ids).long()
            rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
            hidden.append(model.base_model(input_ids=ids[None]).last_hidden_state[0, rows])
            logits.append(model(input_ids=ids[None]).logits[0, rows, :VOCABULARY])
            following.append(ids[rows + 1])
            keys.append(row_keys(torch.from_numpy(tokens_to_read(sequence)), rows))
    drawn = {"row_keys": torch.cat(keys)} if encoding.needs_row_keys else {}
    states, values = (torch.cat(part).roll(shift, 0) for part in (hidden, logits))
    if wrong_from is not None:
        states[wrong_from:] = torch.randn_like(states[wrong_from:])
    source = ModelSource(path=str(folder))
    head, truth = teacher_truth(unit, source, vocabulary_size=VOCABULARY, dtype=dtype)
    return check_labels(
        unit,
        hidden=_block(unit, Hidden(), {"hidden": states}),
        labels=_block(unit, spec, encoding.encode(values, torch.cat(following), **drawn)),
        teacher_head=head,
        dtype=dtype,
        reference_logits=truth,
        note="noted",
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [Nucleus(p=0.5, k_max=99, control_ids=(2,)), Sampled(control_ids=(2,))])
def test_ragged_and_drawn_labels_pass_and_those_of_other_states_fail(spec: Labels, dtype: str, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path, "llama", dtype=getattr(torch, dtype))
    assert all(answer.passed for answer in _answers(folder, UNIT, dtype=dtype, spec=spec))
    _, wrong = _answers(folder, UNIT, dtype=dtype, spec=spec, wrong_from=3)
    assert not wrong.passed, wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("cohere2", {"logit_scale": 0.004})])
def test_right_labels_pass_and_moved_ones_fail_however_flat_the_teacher_is(
    dtype: str, family: str, settings: dict, tmp_path: Path
) -> None:
    folder = architecture_folder(tmp_path, family, dtype=getattr(torch, dtype), **settings)
    right = _answers(folder, UNIT, dtype=dtype)
    assert all(answer.passed for answer in right), right
    assert right[0].numbers.endswith("; noted")
    moved = _answers(folder, UNIT, dtype=dtype, shift=1)
    assert not moved[0].passed, moved


def test_of_a_teacher_without_any_difference_between_rows_it_is_said_that_no_shift_can_be_seen(tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path, "cohere2", logit_scale=1e-9)
    answers = _answers(folder, UNIT, shift=1)
    assert all(answer.passed for answer in answers), answers
    assert "this teacher is too flat for a shift to be seen" in answers[0].numbers
    assert not _answers(architecture_folder(tmp_path / "llama", "llama"), UNIT, wrong_from=0)[0].passed


def test_what_is_wrong_beyond_a_window_alone_is_found(tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path, "mistral")
    lengths = teacher_lengths(ModelSource(path=str(folder)))
    assert lengths == (WINDOW,)
    rows = random_unit("u", *[(WINDOW - 4, [(2, WINDOW - 6)])] * 20).sequences
    plan = plan_check(rows, lengths=lengths, max_length=512)
    assert plan is not None
    assert plan.note == "a row of 88 tokens crosses 24"
    assert all(answer.passed for answer in _answers(folder, plan.unit))
    beyond = plan.unit.num_rows - 4
    assert not _answers(folder, plan.unit, wrong_from=beyond)[0].passed


def test_a_long_row_is_cut_to_its_first_labels_and_said_so() -> None:
    (row,) = random_unit("u", (21_000, [(9_000, 9_010), (20_000, 20_900)])).sequences
    plan = plan_check([row], lengths=(), max_length=32_768)
    assert plan is not None
    (cut,) = plan.unit.sequences
    assert cut.num_tokens == CHECK_TOKENS
    assert cut.num_loss_tokens == 10
    at = np.flatnonzero(cut.loss_mask)
    assert np.array_equal(cut.token_ids[at + 1], row.token_ids[9_001:9_011])
    assert plan.note == f"the first row is cut from 21000 to {CHECK_TOKENS} tokens"
    assert plan_check(random_unit("u", (9, [])).sequences, lengths=(), max_length=64) is None


def test_the_long_row_crosses_what_the_data_reaches_and_no_more() -> None:
    rows = random_unit("u", (300, [(9, 90)])).sequences

    def plan(*lengths: int, max_length: int) -> tuple[list[int], str]:
        made = plan_check(rows, lengths=lengths, max_length=max_length)
        assert made is not None
        return [s.num_tokens for s in made.unit.sequences], made.note

    assert plan(512, 4096, max_length=500) == ([300], "")
    assert plan(512, 4096, max_length=520) == ([300, 520], "a row of 520 tokens crosses 512")
    assert plan(512, 4096, max_length=9000) == ([300, 4160], "a row of 4160 tokens crosses 512, 4096")
    assert plan(64, max_length=9000) == ([300], "")  # the text is long enough
    assert plan(131_072, max_length=200_000) == ([300], "rows of more than 131072 tokens are not checked")


def test_the_reference_of_a_long_row_never_holds_all_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 4 * 400 * 50)  # 4 heads, 400 keys, 50 queries
    folder = architecture_folder(tmp_path, "gemma2")
    unit = random_unit("u", (400, [(300, 399)]))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 4 and result.shape[1] == 4:
                largest = max(largest, result.numel())
            return result

    with Largest():
        _, truth = teacher_truth(unit, ModelSource(path=str(folder)), vocabulary_size=VOCABULARY, dtype="float32")
    oracle, _ = oracle_of(folder, unit)
    ours = truth[:, :VOCABULARY].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(ours, oracle, atol=1e-3)
    assert largest == 4 * 400 * 50

"""What a teacher with another tokenizer reads, whose rows its labels are, and what becomes of what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import chat_row, write_rows
from two_tokenizers import ADVERSARIAL, METHODS, run_across

from configs.load import load_run
from configs.schema import Run
from trainer.align.blocks import ALIGNED_COLUMN, to_student_rows
from trainer.align.share import AlignedShare
from trainer.align.texts import TextAligner
from trainer.answers.teacher import answered_by_teacher, asked_ids
from trainer.data.prompt_reader import PromptReader
from trainer.errors import BadRow, ConfigError, DataError
from trainer.labels.encoding import ALIGNED, load_encoding
from trainer.labels.token import LOGPROB
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.packing import layout_of, pack
from trainer.loop.plan import task_totals
from trainer.loop.rows import held_out_rows, open_reader, sample_rows
from trainer.types import Completion, LabelHeader, Prompt, Sequence, SoftLabelBlock, Unit


def opened(folder: Path, method: str = "overlap", **changes: object) -> tuple[Run, Inputs]:
    run = load_run(run_across(folder, {**METHODS[method], **changes}), []).run
    return run, read_inputs(run)


def aligner_of(inputs: Inputs) -> TextAligner:
    aligner = inputs.tasks["main"].aligner
    assert aligner is not None
    return aligner


def reader_of(run: Run, inputs: Inputs) -> PromptReader:
    return open_reader(run, inputs, run.resolved_tasks()["main"])


def chat(question: str, answer: str | None) -> dict:
    completion = None if answer is None else [{"role": "assistant", "content": answer}]
    return {"prompt": [{"role": "user", "content": question}], "completion": completion}


def test_each_side_reads_its_own_rendering_and_rows_of_equal_text_belong_together(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path)
    write_rows(tmp_path / "train.jsonl", [chat("the fox", text) for text in ADVERSARIAL])
    aligner = aligner_of(inputs)
    for sequence in sample_rows(run, inputs):
        reading, read = sequence.reading, sequence.as_read()
        sides = aligner.student.template.tokenizer, aligner.teacher.template.tokenizer
        assert sides[0].decode(sequence.token_ids).startswith("[user]\nthe fox</s>\n[assistant]\n")
        assert (
            sides[1].decode(read.token_ids).startswith("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n")
        )
        rows, asked = np.flatnonzero(sequence.loss_mask), np.flatnonzero(read.loss_mask)
        first = rows[0] + 1, int(np.argmax(read.loss_mask)) + 1
        for row, group in zip(rows, reading.groups, strict=True):
            if group >= 0:
                partner = asked[list(reading.teacher_groups).index(group)]
                before = aligner.student.tokens.join(sequence.token_ids[first[0] : row + 1].tolist())
                assert before == aligner.teacher.tokens.join(read.token_ids[first[1] : partner + 1].tolist())
        assert reading.groups[-1] >= 0, "the end of the answer"
        assert len(asked) == (reading.groups >= 0).sum(), "nothing is asked that nobody needs"


def test_held_out_rows_are_aligned_by_single_rows_whatever_the_method(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path, "chunks")
    assert all(row.reading is not None and not row.reading.chunked for row in held_out_rows(run, inputs))
    assert all(row.reading is not None and row.reading.chunked for row in sample_rows(run, inputs))


@pytest.mark.parametrize("method", ["overlap", "chunks"])
def test_coverage_counts_what_the_labels_can_say_something_of(tmp_path: Path, method: str) -> None:
    run, inputs = opened(tmp_path, method)
    write_rows(tmp_path / "train.jsonl", [chat("the fox", "123 456")])
    (row,) = sample_rows(run, inputs)
    found = row.reading.coverage
    assert (found.num_bytes, found.num_digits) == (7, 6)
    assert found.aligned_digits == (6 if method == "chunks" else 0), "numbers in threes are no token of the teacher"
    assert found.byte_ratio == (1.0 if method == "chunks" else 1 / 7)


def test_a_block_of_the_teachers_rows_becomes_one_of_the_students(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path)
    unit = Unit("u", sample_rows(run, inputs)[:3])
    read = unit.as_read()
    assert unit.as_read().kind == unit.kind
    rows = [np.flatnonzero(s.loss_mask) + 1000 * n for n, s in enumerate(read.sequences)]
    header = LabelHeader("teacher", "", run.labels, "", 283, 64, "float32")
    offsets = np.cumsum([0, *map(len, rows)])
    columns = {"at": np.concatenate(rows).astype(np.float32)[:, None]}
    found = to_student_rows(unit, SoftLabelBlock(header, read.tokens_hash(), columns, offsets))
    assert found.tokens_hash == unit.tokens_hash() != read.tokens_hash()
    assert found.row_offsets.tolist() == np.cumsum([0, *(s.num_loss_tokens for s in unit.sequences)]).tolist()
    aligned = found.columns[ALIGNED][:, 0]
    assert aligned.tolist() == [float(g >= 0) for s in unit.sequences for g in s.reading.groups]
    for n, sequence in enumerate(unit.sequences):
        start, stop = found.row_offsets[n : n + 2]
        expected = [rows[n][group] if group >= 0 else 0 for group in sequence.reading.groups]
        assert found.columns["at"][start:stop, 0].tolist() == expected
    plain = Unit("p", (Sequence("0:0", np.arange(3, dtype=np.int32), np.array([True, True, False]), "dataset"),))
    block = SoftLabelBlock(header, plain.tokens_hash(), {}, np.array([0, 2]))
    assert plain.as_read() is plain
    assert to_student_rows(plain, block) is block


def test_chunks_are_summed_by_teacher_and_student_and_counted_in_the_step(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path, "chunks")
    unit = Unit("u", sample_rows(run, inputs)[:3])
    read = unit.as_read()
    rng = np.random.default_rng(0)
    logprobs = [-rng.random(s.num_loss_tokens).astype(np.float32) for s in read.sequences]
    header = LabelHeader("teacher", "", run.labels, "", 283, 64, "float32")
    offsets = np.cumsum([0, *map(len, logprobs)])
    block = SoftLabelBlock(header, read.tokens_hash(), {LOGPROB: np.concatenate(logprobs)[:, None]}, offsets)
    layout = (*layout_of(load_encoding(run.labels), block), ALIGNED_COLUMN)
    batch = pack([unit], [(0, 0), (0, 1), (0, 2)], [to_student_rows(unit, block)], layouts={unit.kind: layout})
    (part,) = batch.parts
    count = sum(s.reading.num_groups for s in unit.sequences)
    assert len(part.groups) == count == len(part.rewards) - 1 == task_totals(unit.sequences)["main"].num_groups
    sums = torch.zeros(count + 1).index_add_(0, part.row_sequences, part.labels[LOGPROB][:, 0])
    expected = [
        values[s.reading.teacher_groups == group].sum()
        for s, values in zip(unit.sequences, logprobs, strict=True)
        for group in range(s.reading.num_groups)
    ]
    torch.testing.assert_close(sums, torch.tensor([*expected, 0.0]))


@pytest.mark.parametrize("text", ["aaaa aaaa aaaaa a", "the fox 123 the fox 123", *ADVERSARIAL])
def test_text_that_is_learnt_from_its_first_token_is_aligned_by_the_bytes_before_it(tmp_path: Path, text: str) -> None:
    """Nothing predicts the first token, and each side cuts it elsewhere."""
    run, inputs = opened(tmp_path, data={"evaluation": None})
    write_rows(tmp_path / "train.jsonl", [{"text": f"b{text}"}])
    aligner = aligner_of(inputs)
    (row,) = sample_rows(run, inputs)
    read = row.as_read()
    rows, asked = np.flatnonzero(row.loss_mask), np.flatnonzero(read.loss_mask)
    pairs = {(int(r), int(asked[g])) for r, g in zip(rows, row.reading.groups, strict=True) if g >= 0}
    texts = []
    for ids, side in ((row.token_ids, aligner.student), (read.token_ids, aligner.teacher)):
        texts.append([side.tokens.join(ids[: i + 1].tolist()) for i in range(len(ids) - 1)])
    by_hand = {(i, j) for i, a in enumerate(texts[0]) for j, b in enumerate(texts[1]) if a == b}
    assert pairs == by_hand
    total = sum(len(piece) for piece in [aligner.student.tokens.values[i] for i in row.token_ids[1:-1]])
    assert row.reading.coverage.num_bytes == total


# --- what a teacher wrote ---------------------------------------------------------------------------------------------


def written(inputs: Inputs, prompt: Prompt, ids: list[int]) -> Sequence:
    completion = Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", "teacher", ((0, ""),))
    return answered_by_teacher(prompt, completion, aligner=aligner_of(inputs))


def asked_prompt(tmp_path: Path, *, max_length: int = 128) -> tuple[Inputs, Prompt]:
    """Of a row without an answer."""
    generator = {"teacher": {"generator": {"engine": "hf"}}, "answers": {"kind": "teacher", "max_new_tokens": 16}}
    run, inputs = opened(tmp_path, "chunks", data={"evaluation": None, "max_length": max_length}, **generator)
    write_rows(tmp_path / "train.jsonl", [chat_row(0, answered=False)])
    prompt, _ = reader_of(run, inputs).read(0, "0:0")
    return inputs, prompt


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_written_text_is_the_same_bytes_in_the_students_tokens_and_ends_with_its_end(tmp_path: Path, text: str) -> None:
    inputs, prompt = asked_prompt(tmp_path)
    teacher, student = aligner_of(inputs).teacher, aligner_of(inputs).student
    assert asked_ids(prompt).tolist() == prompt.reading.token_ids.tolist() != prompt.token_ids.tolist()
    end = teacher.template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    sequence = written(inputs, prompt, [*teacher.template.plain_ids(text), end])
    answer = sequence.token_ids[len(prompt.token_ids) :].tolist()
    assert sequence.token_ids[: len(prompt.token_ids)].tolist() == prompt.token_ids.tolist()
    assert student.tokens.join(answer[:-1]) == text.encode()
    assert answer[-1] == student.template.tokenizer.eos_token_id
    assert not set(answer[:-1]) & student.tokens.special, "text that looks like a control token is none"
    assert sequence.num_loss_tokens == len(answer)
    assert sequence.reading.coverage.byte_ratio == 1.0


def test_written_text_that_is_cut_off_has_no_end_and_no_half_character(tmp_path: Path) -> None:
    inputs, prompt = asked_prompt(tmp_path)
    teacher, student = aligner_of(inputs).teacher, aligner_of(inputs).student
    ids = teacher.template.plain_ids("fox é")
    assert teacher.tokens.join(ids[:-1]) == b"fox \xc3"
    sequence = written(inputs, prompt, ids[:-1])
    answer = sequence.token_ids[len(prompt.token_ids) :].tolist()
    assert student.tokens.join(answer) == b"fox "
    end = teacher.template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    cut = written(inputs, prompt, [*ids[:-1], end])
    assert cut.token_ids.tolist() == sequence.token_ids.tolist(), "an end behind what is left out is not learnt"
    with pytest.raises(DataError, match="no token of its answer can be aligned"):
        written(inputs, prompt, [319, end])  # an id of the padding


def test_written_text_that_is_longer_in_the_students_tokens_is_cut_at_max_length(tmp_path: Path) -> None:
    inputs, prompt = asked_prompt(tmp_path, max_length=64)
    teacher = aligner_of(inputs).teacher
    sequence = written(inputs, prompt, teacher.template.plain_ids("qzqzqz " * 10))
    assert sequence.num_tokens == 64
    assert not sequence.loss_mask[-1]
    assert sequence.reading.groups.max() > 5


# --- rows that cannot be aligned --------------------------------------------------------------------------------------


def test_a_template_that_changes_answers_leaves_the_row_before_the_change(tmp_path: Path) -> None:
    """And the share of the run says so."""
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n- ' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    run, inputs = opened(tmp_path, teacher={"chat_template": str(tmp_path / "other.jinja")})
    prompt, _ = reader_of(run, inputs).read(0, "0:0")
    assert prompt.reading.groups.tolist() == [0] + [-1] * (len(prompt.reading.groups) - 1)
    share = AlignedShare({"main": 0.5})
    with pytest.raises(DataError, match=r"only 1.9% of the bytes of the answers of task main are aligned .* 0.5"):
        share.add(sample_rows(run, inputs), least_bytes=1)
    share.add(sample_rows(run, inputs)[:1])  # too few to judge


def test_weights_of_rows_are_refused_where_chunks_cannot_have_them(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path, "chunks")
    write_rows(tmp_path / "train.jsonl", [chat_row(0) | {"weight": 0.5}])
    with pytest.raises(BadRow, match=r"train.jsonl:1: has a weight, which chunks of several rows cannot have"):
        reader_of(run, inputs).read(0, "0:0")


def test_a_row_that_is_too_long_for_the_teacher_alone_is_told_so(tmp_path: Path) -> None:
    run, inputs = opened(tmp_path, data={"evaluation": None, "max_length": 48})
    write_rows(tmp_path / "train.jsonl", [chat("the fox", "the quick brown fox jumps over the lazy dog while")])
    student = aligner_of(inputs).student.template
    assert len(student.plain_ids("the quick brown fox jumps over the lazy dog while")) < 30
    write_rows(tmp_path / "train.jsonl", [chat("the fox", "123456789" * 4)])
    with pytest.raises(BadRow, match=r"train.jsonl:1: as the teacher reads it: too long: \d+ tokens"):
        reader_of(run, inputs).read(0, "0:0")


def test_different_tokenizers_are_refused_without_a_method_and_the_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"have different tokenizers: .* Write align: overlap .*chunks .*uld"):
        opened(tmp_path, align=None)


def test_a_student_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    run, _ = opened(tmp_path)
    for file in (tmp_path / "student").glob("chat_template*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"student.model: its tokenizer has no chat template"):
        read_inputs(run)


def test_a_model_of_the_same_tokenizer_may_be_aligned_too(tmp_path: Path) -> None:
    run, _ = opened(tmp_path)
    tiny_model(seed=2, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    inputs = read_inputs(run)
    table = aligner_of(inputs).table
    assert table.tolist() == list(range(len(table)))
    for row in sample_rows(run, inputs):
        assert row.reading.token_ids.tolist() == row.token_ids.tolist()
        assert row.reading.loss_mask.tolist() == row.loss_mask.tolist()
        assert row.reading.groups.tolist() == list(range(row.num_loss_tokens))

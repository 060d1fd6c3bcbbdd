"""The prompt stream: fixed positions, exact continuation, the length rule, and what happens to bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prompt_streams import BAD, TEMPLATE, TOKENIZER, VOCABULARY, open_reader, open_stream, same, talk
from tiny_models import tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from configs.prompts import Data, Dataset
from configs.tasks import Route
from trainer.data.chat import Template
from trainer.data.prompt_reader import Asked, PromptReader, ToWrite
from trainer.data.prompts import PromptStream, check_rows
from trainer.data.vocabulary import SharedVocabulary
from trainer.errors import ConfigError, DataError
from trainer.types import Cursor, RowText, StreamCounters


def write(folder: Path, rows: list[object]) -> Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(path=str(path))


def check(dataset: Dataset, *, budget: int = 1000, to_write: ToWrite | None = None, **options):
    return check_rows(open_reader(dataset, data=Data(**options), to_write=to_write), budget=budget)


def rendered(messages: list[dict]) -> RowText:
    (text,) = TEMPLATE.render(messages)
    return text


def num_tokens(row: dict) -> int:
    return len(rendered(row["messages"]).token_ids)


def test_every_epoch_holds_every_row_once_in_its_own_seeded_order(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(i) for i in range(7)])
    stream = open_stream(dataset)
    assert stream.rows_per_epoch == 7
    epochs = [[p.id for p in stream.take(7)] for _ in range(3)]
    for number, ids in enumerate(epochs):
        assert sorted(ids) == [f"{number}:{row}" for row in range(7)]
    orders = [[i.split(":")[1] for i in ids] for ids in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert [p.id for p in open_stream(dataset, seed=6).take(7)] != epochs[0]
    assert [p.id for p in open_stream(dataset, shuffle=False).take(8)] == [f"0:{i}" for i in range(7)] + ["1:0"]


def test_the_rows_of_the_first_page_are_read_as_they_stand(tmp_path: Path) -> None:
    """By a tokenizer that, as the demo's, makes one token of a space and the word behind it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.train_from_iterator(
        ["plain text and how it goes on, all of it learnt"] * 30,
        BpeTrainer(special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"], initial_alphabet=ByteLevel.alphabet()),
    )
    assert "Ġand" in tokenizer.get_vocab()
    page = (Path(__file__).parents[3] / "docs" / "first-run.md").read_text()
    lines = page.split("```json\n")[1].split("```")[0].splitlines()
    assert len(lines) == 6
    rows = [json.loads(line) for line in lines]
    split_inside_a_token = {"prompt": "plain text ", "completion": "and how it goes on"}
    for number, row in enumerate([*rows, split_inside_a_token]):
        (tmp_path / str(number)).mkdir()
        dataset = write(tmp_path / str(number), [row])
        vocabulary = SharedVocabulary(size=len(tokenizer), fingerprint="", teacher_rows=999, student_rows=999)
        to_be_written, asks = row.keys() == {"prompt"}, Asked(compared="preference" if "chosen" in row else "")
        given = {"template": Template.of(tokenizer), "to_write": ToWrite() if to_be_written else None, "asks": asks}
        reader = open_reader(dataset, data=Data(), vocabulary=vocabulary, **given)
        stream = PromptStream(reader, seed=0)
        if row is split_inside_a_token:
            with pytest.raises(DataError, match="merges into one token"):
                stream.take(1)
        else:
            (prompt,) = stream.take(1)
            assert (prompt.loss_mask is None) if to_be_written else prompt.loss_mask.any()
            assert len(prompt.alternatives) == ("rejected" in row)


@pytest.mark.parametrize(("epochs", "lengths"), [(1, [4, 4, 2]), (2, [4, 4, 4, 4, 4]), (3, [4] * 7 + [2])])
def test_a_stream_of_some_epochs_holds_every_row_so_many_times_and_ends(
    tmp_path: Path, epochs: int, lengths: list[int]
) -> None:
    dataset = write(tmp_path, [talk(i) for i in range(10)])
    stream = open_stream(dataset, num_epochs=epochs)
    steps = [stream.take(4) for _ in lengths]
    assert [len(step) for step in steps] == lengths
    ids = [prompt.id for step in steps for prompt in step]
    assert sorted(ids) == sorted(f"{epoch}:{row}" for epoch in range(epochs) for row in range(10))
    assert (stream.counters.read, stream.take(4)) == (10 * epochs, [])
    endless = open_stream(dataset)
    assert [p.id for p in endless.take(10 * epochs)] == ids, "where it ends changes nothing before"
    assert len(endless.take(4)) == 4


def test_left_out_rows_do_not_make_an_epoch_longer(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path, [talk(0), BAD, talk(2), BAD, talk(4)]), on_bad_row="skip", num_epochs=1)
    lengths = [len(stream.take(2)) for _ in range(4)]
    assert (sum(lengths), lengths[3]) == (3, 0)
    assert stream.counters == StreamCounters(read=5, good=3, rejected=2)


def test_an_answer_of_weight_zero_is_in_no_loss(tmp_path: Path) -> None:
    bad, good = {"role": "assistant", "content": "drip", "weight": 0}, {"role": "assistant", "content": "drop"}
    question = {"role": "user", "content": "which?"}
    dataset = write(tmp_path, [{"messages": [question, bad, question, good]}])
    (prompt,) = open_stream(dataset).take(1)
    assert TOKENIZER.decode(prompt.token_ids[1:][prompt.loss_mask[:-1]]) == "drop<|im_end|>"
    assert "drip<|im_end|>" in TOKENIZER.decode(prompt.token_ids)
    with pytest.raises(DataError, match="every assistant turn is marked as not to be learnt"):
        open_stream(write(tmp_path, [{"messages": [question, bad]}])).take(1)


def test_the_weight_of_an_answer_is_that_of_its_rows(tmp_path: Path) -> None:
    half = {"messages": [*talk(0)["messages"], *talk(1)["messages"]]}
    half["messages"][-1] = {**half["messages"][-1], "weight": 0.5}
    (prompt,) = open_stream(write(tmp_path, [half])).take(1)
    learnt = prompt.row_weights[prompt.loss_mask]
    second = len(TOKENIZER("answer 1<|im_end|>")["input_ids"])
    assert learnt.tolist() == [1.0] * (len(learnt) - second) + [0.5] * second
    assert not prompt.row_weights[~prompt.loss_mask].any()
    answered = {"prompt": half["messages"][:3], "completion": half["messages"][3:]}
    (tmp_path / "one").mkdir()
    (alone,) = open_stream(write(tmp_path / "one", [answered])).take(1)
    assert set(alone.row_weights[alone.loss_mask].tolist()) == {0.5}


def test_the_weight_of_a_row_goes_with_its_prompt(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path, [talk(0), {**talk(1), "weight": 0.5}]))
    assert {prompt.id: prompt.weight for prompt in stream.take(2)} == {"0:0": 1.0, "0:1": 0.5}


def test_a_prompt_holds_the_ids_the_mask_and_the_line(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(i) for i in range(3)])
    prompt = open_stream(dataset, shuffle=False).take(3)[2]
    expected = rendered(talk(2)["messages"])
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.token_ids.tolist(), prompt.loss_mask.tolist()) == (
        expected.token_ids.tolist(),
        expected.loss_mask.tolist(),
    )
    assert prompt.origin == f"{dataset.path}:3"


def test_a_stream_continued_at_any_cursor_gives_what_was_left(tmp_path: Path) -> None:
    rows: list[object] = [talk(i, words=40 if i == 3 else 1) for i in range(5)]
    dataset = write(tmp_path, [*rows, BAD])  # positions of left-out rows must be kept too
    options = {"on_bad_row": "skip", "on_too_long": "drop", "max_length": 60}
    for size in (1, 4, 5, 6, 7):
        whole = open_stream(dataset, **options)
        steps, cursors = [], [whole.cursor]
        for _ in range(20 // size + 2):
            steps.append(whole.take(size))
            cursors.append(whole.cursor)
        assert min(whole.counters.rejected, whole.counters.dropped_too_long) >= 3
        for cut, cursor in enumerate(cursors):
            resumed = open_stream(dataset, **options)
            resumed.take(3)
            resumed.seek(cursor)
            for expected in steps[cut:]:
                assert same(resumed.take(size), expected)
            assert resumed.counters == whole.counters, "what was read twice is counted once"


def test_steps_are_fixed_sets_of_positions_whatever_is_left_out(tmp_path: Path) -> None:
    rows = [talk(i) for i in range(6)]
    expected = np.reshape([p.id for p in open_stream(write(tmp_path, rows)).take(12)], (4, 3)).tolist()
    (tmp_path / "holes").mkdir()
    holes = open_stream(write(tmp_path / "holes", [*rows[:2], BAD, *rows[3:]]), on_bad_row="skip")
    found = [[p.id for p in holes.take(3)] for _ in range(4)]
    assert found == [[i for i in step if not i.endswith(":2")] for step in expected]
    assert holes.counters == StreamCounters(read=12, good=10, rejected=2)


def test_a_cursor_of_another_seed_or_of_other_data_is_refused(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path, [talk(0)]))
    with pytest.raises(ConfigError, match="seed 6, this run has seed 5"):
        stream.seek(Cursor(epoch=0, position=0, seed=6))
    with pytest.raises(ConfigError, match=r"position 9, but the dataset .* has 1 rows"):
        stream.seek(Cursor(epoch=0, position=9, seed=5))


def test_a_bad_row_is_an_error_or_is_counted_and_listed_once(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(0), BAD, talk(2)])
    with pytest.raises(DataError, match=r"rows.jsonl:2: messages: no assistant turn"):
        open_stream(dataset).take(3)
    listing = tmp_path / "run" / "rejected.jsonl"
    stream = open_stream(dataset, on_bad_row="skip", quarantine=listing)
    assert not listing.exists()
    stream.take(6)
    assert stream.counters == StreamCounters(read=6, good=4, rejected=2)
    resumed = open_stream(dataset, on_bad_row="skip", quarantine=listing)
    resumed.take(6)
    entries = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [e["origin"] for e in entries] == [f"{dataset.path}:2"]
    assert entries[0]["reason"].startswith("messages: no assistant turn")
    assert "alone" in entries[0]["row"]


def test_a_listing_cut_off_by_a_crash_is_mended(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(0), BAD, BAD])
    listing = tmp_path / "rejected.jsonl"
    open_stream(dataset, on_bad_row="skip", quarantine=listing).take(3)
    listing.write_text(listing.read_text()[:-9])
    for _ in range(2):
        open_stream(dataset, on_bad_row="skip", quarantine=listing).take(3)
    origins = [json.loads(line)["origin"] for line in listing.read_text().splitlines()]
    assert sorted(origins) == [f"{dataset.path}:2", f"{dataset.path}:3"]


def test_a_dataset_of_which_nothing_is_usable_ends_after_one_epoch(tmp_path: Path) -> None:
    stream = open_stream(write(tmp_path, [BAD] * 4), on_bad_row="skip")
    with pytest.raises(DataError, match=r"0 of 4 rows of the dataset .* are usable; for example .*no assistant turn"):
        stream.take(100)
    few = open_stream(write(tmp_path, [BAD] * 7 + [talk(7)]), on_bad_row="skip")
    assert len(few.take(800)) == 100


def test_the_length_limit_is_exact(tmp_path: Path) -> None:
    row = talk(0, words=5)
    length = num_tokens(row)
    dataset = write(tmp_path, [talk(1), row])
    assert len(open_stream(dataset, max_length=length).take(2)) == 2
    with pytest.raises(
        DataError,
        match=rf"rows.jsonl:2: too long: {length} tokens, data.max_length is {length - 1}; raise .* drop .* truncate",
    ):
        open_stream(dataset, max_length=length - 1, shuffle=False).take(2)


def test_a_giant_row_is_too_long_without_being_tokenised(tmp_path: Path) -> None:
    dataset = write(tmp_path, [{"text": "a" * (256 * 32 + 1)}, {"text": "a" * (256 * 32)}, {"text": "short"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: too long: 8193 characters, data.max_length is 32; raise"):
        open_stream(dataset, max_length=32, shuffle=False).take(1)
    dropping = open_stream(dataset, max_length=32, on_too_long="drop")
    assert (len(dropping.take(3)), dropping.counters.dropped_too_long) == (1, 2)
    assert open_stream(dataset, max_length=32, on_too_long="truncate", shuffle=False).take(1)[0].token_ids.size == 32


def test_too_long_rows_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    row = talk(0, words=5)
    length = num_tokens(row)
    dataset = write(tmp_path, [talk(1), row])
    listing = tmp_path / "rejected.jsonl"
    dropping = open_stream(dataset, max_length=length - 1, on_too_long="drop", quarantine=listing)
    assert len(dropping.take(2)) == 1
    assert dropping.counters == StreamCounters(read=2, good=1, dropped_too_long=1)
    assert f"too long: {length} tokens" in json.loads(listing.read_text())["reason"]
    cutting = open_stream(dataset, max_length=length - 2, on_too_long="truncate", shuffle=False)
    cut = cutting.take(2)[1]
    ids, mask = rendered(row["messages"]).token_ids, rendered(row["messages"]).loss_mask
    assert cut.token_ids.tolist() == ids[: length - 2].tolist()
    assert not cut.loss_mask[-1]
    assert cut.loss_mask[:-1].tolist() == mask[: length - 3].tolist()
    assert cutting.counters == StreamCounters(read=2, good=2, truncated=1)


def test_a_row_cut_before_its_answer_is_dropped(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q " * 60}, {"role": "assistant", "content": "a"}]}
    prompt = len(TEMPLATE.render_prompt(row["messages"][:1]))
    dataset = write(tmp_path, [talk(1), row])
    stream = open_stream(dataset, max_length=prompt, on_too_long="truncate")
    assert (len(stream.take(2)), stream.counters.dropped_too_long) == (1, 1)
    assert len(open_stream(dataset, max_length=prompt + 1, on_too_long="truncate").take(2)) == 2


def test_prompts_to_be_answered_keep_room_for_the_answer(tmp_path: Path) -> None:
    dataset = write(tmp_path, [BAD, talk(1)])
    prompt = len(TEMPLATE.render_prompt(BAD["messages"]))
    fitting = open_stream(dataset, to_write=ToWrite(20), max_length=prompt + 20, shuffle=False)
    wanting, answered = fitting.take(2)
    assert wanting.loss_mask is None
    assert wanting.token_ids.tolist() == TEMPLATE.render_prompt(BAD["messages"]).tolist()
    assert answered.loss_mask is not None
    with pytest.raises(DataError, match=rf"{prompt} tokens and 20 for the answer, data.max_length is {prompt + 19}"):
        open_stream(dataset, to_write=ToWrite(20), max_length=prompt + 19, shuffle=False).take(1)
    cutting = open_stream(dataset, to_write=ToWrite(20), max_length=prompt + 19, on_too_long="truncate")
    cutting.take(2)
    assert cutting.counters.dropped_too_long == 1  # a prompt without its end could not be answered
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        open_stream(dataset, to_write=ToWrite(64), max_length=64)


def test_rewriting_asks_again_for_the_last_answer(tmp_path: Path) -> None:
    pair = {"prompt": "the fox", "completion": " jumps"}
    (tmp_path / "pairs").mkdir()
    for folder, row, expected in (
        (tmp_path, talk(3), TEMPLATE.render_prompt(talk(3)["messages"][:1])),
        (tmp_path / "pairs", pair, TEMPLATE.render_text("the fox", None)[0]),
    ):
        (prompt,) = open_stream(write(folder, [row]), to_write=ToWrite(rewrite=True)).take(1)
        assert prompt.loss_mask is None
        assert prompt.token_ids.tolist() == expected.tolist()


def test_prompts_without_answers_need_a_generator(tmp_path: Path) -> None:
    dataset = write(tmp_path, [{"prompt": "the fox"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: completion: is missing.*teacher and teacher.generator: {}"):
        open_stream(dataset).take(1)
    assert open_stream(dataset, to_write=ToWrite()).take(1)[0].loss_mask is None


def test_ids_outside_the_shared_vocabulary_are_errors(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(0)])
    small = SharedVocabulary(size=50, fingerprint="", teacher_rows=320, student_rows=320)
    stream = PromptStream(open_reader(dataset, data=Data(), vocabulary=small), seed=0)
    with pytest.raises(DataError, match=r"rows.jsonl:1: token id \d+ is outside the shared vocabulary 0..49"):
        stream.take(1)


def test_a_template_problem_is_a_configuration_error_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(0)])
    template = Template(TOKENIZER, None)
    stream = PromptStream(open_reader(dataset, data=Data(on_bad_row="skip"), template=template), seed=0)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: .*no chat template"):
        stream.take(1)


def test_a_template_that_refuses_all_rows_leaves_none_usable(tmp_path: Path) -> None:
    dataset = write(tmp_path, [talk(0), talk(1)])
    template = Template(TOKENIZER, "{{ raise_exception('not today') }}")
    stream = PromptStream(open_reader(dataset, data=Data(on_bad_row="skip"), template=template), seed=0)
    with pytest.raises(DataError, match=r"0 of 2 rows .* are usable; for example .*not today"):
        stream.take(2)


def test_checking_reports_what_training_would_meet(tmp_path: Path) -> None:
    rows = [talk(0), BAD, talk(2, words=90), talk(3, words=5), {"messages": 3}]
    dataset = write(tmp_path, rows)
    report = check(dataset, max_length=100, on_too_long="drop")
    assert (report.num_rows, report.num_checked, report.num_ok) == (5, 5, 2)
    assert (report.num_dropped, report.num_truncated) == (1, 0)
    assert (report.min_tokens, report.max_tokens) == (num_tokens(rows[0]), num_tokens(rows[3]))
    assert report.num_loss_tokens == sum(int(rendered(rows[i]["messages"]).loss_mask.sum()) for i in (0, 3))
    assert [p.removeprefix(dataset.path) for p in report.problems] == [
        ":2: messages: no assistant turn, so nothing to learn from",
        ":5: messages: must be a list of {role, content} messages, not a number",
    ]
    assert "too long" in check(dataset, max_length=100).problems[1]
    assert check(dataset, max_length=100, on_too_long="truncate").num_truncated == 1


def test_checking_a_large_dataset_stays_in_its_budget_and_looks_everywhere(tmp_path: Path) -> None:
    report = check(write(tmp_path, [talk(i) for i in range(99)] + [BAD]), budget=10)
    assert (report.num_rows, report.num_checked, report.num_ok) == (100, 10, 9)
    assert "rows.jsonl:100:" in report.problems[0]


def test_a_column_routes_by_its_value_as_yaml_writes_it(tmp_path: Path) -> None:
    route = Route(column="domain", map={"1": "a", "0": "b", "true": "b", "null": "a", "2.5": "b", "x": "a"})
    values = [1, 0, True, None, 2.5, "x", "1", 3, [1]]
    rows = [*({**talk(i), "domain": value} for i, value in enumerate(values)), talk(99)]
    reader = PromptReader.open(
        write(tmp_path, rows),
        data=Data(),
        template=TEMPLATE,
        vocabulary=VOCABULARY,
        asks=Asked(route=route),
    )
    assert [reader.read(row, "")[0].teacher for row in range(7)] == ["a", "b", "b", "a", "b", "a", "a"]
    for row, said in ((7, "is 3, which"), (8, r"is \[1\], which"), (9, "is missing, and")):
        with pytest.raises(DataError, match=rf"rows.jsonl:{row + 1}: domain: {said} is not in route.map"):
            reader.read(row, "")

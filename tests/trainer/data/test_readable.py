"""Prompts of the report: what the user typed, and not what the template makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_folder
from tiny_runs import chat_row, tiny_run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.held_out import held_out_sets
from configs.load import load_run
from configs.models import ModelSource
from launch.quiet import quiet_libraries
from trainer.data.readable import answer_of, prompt_of, readable_prompts
from trainer.loop.inputs import Inputs, read_inputs
from trainer.loop.rows import held_out_rows, open_held_out
from trainer.model.teacher_answers import teacher_answers

QUESTION = {"role": "user", "content": "the quick <|brown|> fox\n  jumps"}
ANSWER = {"role": "assistant", "content": "over the lazy dog"}
RULES = {"role": "system", "content": "a small clear spirit"}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_libraries()
    return tmp_path_factory.mktemp("run")


def shown(folder: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[list[Any], list[str], Inputs]:
    path = tiny_run(folder, {"data": data} if data else None)
    write_rows(folder / "held_out.jsonl", rows)
    run = load_run(path).run
    inputs = read_inputs(run)
    sequences = held_out_rows(run, inputs)
    (held_out,) = held_out_sets(run).values()
    read_from, said = open_held_out(run, inputs, held_out).rows, held_out.rows.system_prompt
    prompts = readable_prompts(read_from, sequences, inputs.first.template, system_prompt=said)
    decode = lambda ids: inputs.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return prompts, [decode(answer_of(sequence)) for sequence in sequences], inputs


def test_a_conversation_is_shown_by_its_turns_up_to_the_first_answer_that_is_learnt(held_out: Path) -> None:
    more = {"role": "user", "content": "turns into"}
    prompts, answers, _ = shown(
        held_out,
        [
            {"prompt": [QUESTION], "completion": [ANSWER]},
            {"prompt": [RULES, QUESTION, ANSWER, more], "completion": [{"role": "assistant", "content": "wash"}]},
        ],
    )
    assert prompts == [[QUESTION], [RULES, QUESTION, ANSWER, more]]
    assert answers == ["over the lazy dog", "wash"]


def test_of_a_fraction_the_prompts_are_those_of_the_rows_that_are_held_out(tmp_path: Path) -> None:
    asks = [f"what turns {word}" for word in ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")]
    path = tiny_run(tmp_path, {"data": {"evaluation": {"fraction": 0.4, "path": None}}})
    turns = [[{"role": "user", "content": ask}] for ask in asks]
    write_rows(tmp_path / "train.jsonl", [{"prompt": turn, "completion": [ANSWER]} for turn in turns])
    run = load_run(path).run
    inputs = read_inputs(run)
    (held_out,) = held_out_sets(run).values()
    sequences = held_out_rows(run, inputs)
    prompts = readable_prompts(open_held_out(run, inputs, held_out).rows, sequences, inputs.first.template)
    assert 1 < len(prompts) < 5
    for (turn,), sequence in zip(prompts, sequences, strict=True):
        assert turn["role"] == "user"
        assert turn["content"] in inputs.tokenizer.decode(prompt_of(sequence))


def test_of_several_answers_the_first_is_the_one_that_is_asked_for(held_out: Path) -> None:
    again = {"role": "user", "content": "and again"}
    prompts, answers, _ = shown(held_out, [{"messages": [QUESTION, ANSWER, again, ANSWER]}])
    assert prompts == [[QUESTION]]
    assert answers == ["over the lazy dog"]


def test_text_outside_a_template_is_shown_as_it_stands(held_out: Path) -> None:
    prompts, answers, _ = shown(held_out, [{"prompt": "the quick ", "completion": "fox jumps"}])
    assert prompts == [[{"role": "", "content": "the quick "}]]
    assert answers == ["fox jumps"]


def test_what_no_turns_render_to_is_shown_as_its_tokens_read(held_out: Path) -> None:
    """A corpus has no prompt but its first token."""
    prompts, _, inputs = shown(held_out, [{"text": "quick brown fox"}])
    first = inputs.first.template.render_corpus("quick brown fox")[0][:1]
    assert prompts == [[{"role": "", "content": inputs.tokenizer.decode(first, skip_special_tokens=True)}]]


def test_a_prompt_has_the_tokens_that_the_student_continues(held_out: Path) -> None:
    path = tiny_run(held_out)
    write_rows(held_out / "held_out.jsonl", [chat_row(3)])
    run = load_run(path).run
    inputs = read_inputs(run)
    (sequence,) = held_out_rows(run, inputs)
    rendered = inputs.first.template.render_prompt(chat_row(3)["prompt"])
    np.testing.assert_array_equal(prompt_of(sequence), rendered)
    assert len(prompt_of(sequence)) + len(answer_of(sequence)) <= sequence.num_tokens


def test_the_teacher_answers_as_a_loop_over_its_own_logits_does(tmp_path: Path) -> None:
    quiet_libraries()
    folder = tiny_folder(tmp_path / "teacher", seed=1)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True, "temperature": 9.0}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in ("the quick", "a still turns a large wash")]
    before = torch.get_rng_state()
    answers = teacher_answers(prompts, ModelSource(path=str(folder)), max_new_tokens=12, stop_ids=())
    assert answers is not None
    assert torch.equal(torch.get_rng_state(), before)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.tolist() == ids[len(prompt) :]
    stop = int(answers[0][3])
    first = answers[0].tolist().index(stop)
    stopped = teacher_answers(prompts[:1], ModelSource(path=str(folder)), max_new_tokens=12, stop_ids=(stop,))
    assert stopped is not None
    assert stopped[0].tolist() == answers[0].tolist()[: first + 1]


def test_a_large_teacher_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "teacher", seed=1)
    monkeypatch.setattr("trainer.model.teacher_answers.ANSWER_BYTES", 1000)
    assert teacher_answers([np.array([3])], ModelSource(path=str(folder)), max_new_tokens=1, stop_ids=()) is None

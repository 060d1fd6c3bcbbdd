"""Held-out rows as sequences: by the template of the teacher that scores them, set by set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import CHATML, tiny_folder
from tiny_runs import chat_row, tiny_run, write_rows

from configs.held_out import held_out_sets
from configs.load import load_run
from configs.schema import Run
from trainer.data.prompt_keys import PromptKeys, held_out_of
from trainer.data.readable import answer_of, readable_prompts
from trainer.errors import ConfigError, DataError
from trainer.loop import rows
from trainer.loop.inputs import read_inputs
from trainer.loop.rows import held_out_rows, open_held_out

SHOUTED = CHATML.replace("m['role']", "m['role'] | upper").replace("assistant", "ASSISTANT")


def two_teachers(folder: Path, tasks: str) -> Run:
    config = tiny_run(folder)
    tiny_folder(folder / "code", seed=3)
    (folder / "shouted.jinja").write_text(SHOUTED)
    prose = f"{{model: {{path: {folder / 'teacher'}}}, scorer: {{engine: hf}}}}"
    code = f"{{model: {{path: {folder / 'code'}}}, scorer: {{engine: hf}}, chat_template: {folder / 'shouted.jinja'}}}"
    return load_run(config, ["teacher=null", f"teachers={{prose: {prose}, code: {code}}}", f"tasks={tasks}"]).run


def test_held_out_rows_are_rendered_by_the_template_of_the_teacher_that_scores_them(tmp_path: Path) -> None:
    run = two_teachers(tmp_path, "{chat: {teacher: prose}, code: {teacher: code}, more: {teacher: code}}")
    inputs = read_inputs(run)
    found = held_out_rows(run, inputs)
    assert [(row.task, row.teacher) for row in found] == [("chat", "prose")] * 6 + [("code+more", "code")] * 6
    texts = [inputs.tokenizer.decode(row.token_ids) for row in found]
    assert all("USER\n" not in text for text in texts[:6])
    assert all("USER\n" in text for text in texts[6:])
    learnt = [inputs.tokenizer.decode(row.token_ids[1:][row.loss_mask[:-1]], skip_special_tokens=True) for row in found]
    assert [text.strip() for text in learnt[:6]] == [text.strip() for text in learnt[6:]], "the same answers"


def test_of_held_out_preferences_the_chosen_answer_is_read_and_its_prompt_is_shown(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, {"labels": "token", "objective": [{"loss": "dpo"}]})
    told = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "spirit"), ("rejected", "dog"))
    }
    rows = [{"prompt": chat_row(number)["prompt"], **told} for number in range(3)]
    write_rows(tmp_path / "held_out.jsonl", rows)
    run = load_run(config).run
    inputs = read_inputs(run)
    found = held_out_rows(run, inputs)
    assert len(found) == 3
    assert all("spirit" in inputs.tokenizer.decode(answer_of(row)) for row in found)
    (held_out,) = held_out_sets(run).values()
    shown = readable_prompts(open_held_out(run, inputs, held_out).rows, found, inputs.first.template)
    assert [turn["content"] for (turn,) in shown] == [row["prompt"][0]["content"] for row in rows]


def test_too_many_held_out_rows_and_none_that_can_be_used_are_named_by_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"{{path: {tmp_path / 'held_out.jsonl'}, max_rows: 2}}"
    run = two_teachers(tmp_path, f"{{chat: {{teacher: prose}}, code: {{teacher: code, evaluation: {own}}}}}")
    inputs = read_inputs(run)
    monkeypatch.setattr(rows, "MAX_EVALUATION_ROWS", 7)
    with pytest.raises(ConfigError, match=r"data.evaluation, tasks.code.evaluation: 8 held-out rows; .* at most 7 "):
        held_out_rows(run, inputs)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"held_out.jsonl:1: "):
        held_out_rows(run, inputs)


class Rows(list):
    raw = SimpleNamespace(name="rows.jsonl")


@pytest.mark.parametrize(
    "prompts", [range(2), range(3), range(7), range(1000), [1, 1, 2, 2, 2], [1] * 57 + [2] * 943, [1] * 999 + [2] * 999]
)
@pytest.mark.parametrize(
    ("fraction", "pattern"), [(1e-9, r"write at least fraction: (.*)"), (1 - 1e-9, r"most.*: (.*)")]
)
def test_the_fraction_that_a_refusal_names_is_accepted_and_hardly_further_than_it_must_be(
    prompts: Iterable[int], fraction: float, pattern: str
) -> None:
    keys = PromptKeys(np.array([*prompts], dtype=np.uint64) + 1, np.ones(len(prompts), dtype=bool))
    with pytest.raises(ConfigError) as refused:
        rows._fraction_of(SimpleNamespace(rows=Rows(prompts)), keys, fraction, seed=0)
    named = float(re.search(pattern, str(refused.value))[1])
    further = named * 0.9 if fraction < 0.5 else 1 - (1 - named) * 0.9
    held_out = [held_out_of(keys, one, seed=0) for one in (named, further)]
    assert 0 < held_out[0].sum() < len(prompts)
    assert held_out[1].sum() in (0, len(prompts))

"""A held-out row as a person reads it: the turns of the prompt without template tokens, and the dataset's answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

import numpy as np

from trainer.data.chat import Template
from trainer.data.dataset_options import with_system_prompt
from trainer.data.row import CandidatesRow, ChatRow, CorpusRow, PreferenceRow, Row
from trainer.data.rows import Rows
from trainer.run_folder import Turn
from trainer.types import Sequence

TURNS_TRIED = 8
"""Answers of a conversation that may be the first one in the loss; longer given context is shown as its tokens read."""


def prompt_of(sequence: Sequence) -> np.ndarray:
    """The tokens up to the first answer: row i predicts token i + 1, so the first loss row is the last prompt token."""
    return sequence.token_ids[: int(np.argmax(sequence.loss_mask)) + 1]


def answer_of(sequence: Sequence) -> np.ndarray:
    """The tokens of the first answer, its end-of-turn token included where it is learnt."""
    start, stop = sequence.spans()[0]
    return sequence.token_ids[start + 1 : stop + 1]


def readable_prompts(
    rows: Rows, sequences: AbstractSequence[Sequence], template: Template, *, system_prompt: str | None = None
) -> list[list[Turn]]:
    """The prompt of each sequence as turns. `rows` are those that the sequences were read from
    (`trainer.loop.rows.open_held_out`): of a fraction they have numbers of their own.

    Turns are shown only where rendering them gives the very tokens of the prompt; otherwise its text is.
    """
    found = []
    for sequence in sequences:
        row = rows.read(int(sequence.prompt_id.split(":")[1]), needs_answer=True)
        row = with_system_prompt(row, system_prompt)
        prompt = prompt_of(sequence)
        text = template.tokenizer.decode(prompt, skip_special_tokens=True)
        found.append(_turns(row, prompt, template) or [{"role": "", "content": text}])
    return found


def _turns(row: Row, prompt: np.ndarray, template: Template) -> list[Turn] | None:
    match row:
        case ChatRow():
            answers = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and i >= row.loss_from]
            for index in answers[:TURNS_TRIED]:
                given = {"tools": row.tools, "arguments": row.template_arguments}
                if np.array_equal(template.render_prompt(row.messages[:index], **given), prompt):
                    return [{"role": turn["role"], "content": _content(turn)} for turn in row.messages[:index]]
            return None
        case PreferenceRow() | CandidatesRow():
            return _turns(row.best, prompt, template)
        case CorpusRow():
            return None
    return [{"role": "", "content": row.prompt}]


def _content(turn: Mapping[str, Any]) -> str:
    """With the calls of an assistant turn, a line each."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join(filter(None, [turn["content"], *calls]))

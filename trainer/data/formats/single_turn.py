"""One question and one answer in fields of their own, read as a conversation of two turns.

    alpaca            instruction    output      Stanford Alpaca, LLaMA-Factory
    dolly             instruction    response    Dolly, GPTeacher, torchtune
    query_response    query          response    ms-swift
    question_answer   question       answer

An instruction may have a text that it is about, `input` or `context`, which follows after a line break, as in
LLaMA-Factory and ms-swift. Each may have `system`, and `history`, a list of earlier [question, answer] pairs, whose
answers are learnt as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.formats.conversation import conversation
from trainer.data.formats.format import Format
from trainer.data.formats.turn import Turn, plain_turn
from trainer.data.formats.turns import is_talk, written_answer
from trainer.data.formats.values import RowProblem, field_of, is_absent, json_of, kind_of, text_of
from trainer.data.row import Row

_ABOUT = ("input", "context")
_PAIRS = "a list of [question, answer] pairs"


@dataclass(frozen=True, slots=True)
class Names:
    """The fields of a format of this family."""

    asked: str
    answer: str

    def tell(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has them. An answer that is still to be written may be null."""
        return row.get(self.asked) is not None and self.answer in row

    def read(self, row: Mapping[str, Any], needs_answer: bool) -> Row:
        turns = self.question(row)
        num_given = 0
        if is_absent(row.get(self.answer)):
            found = "is missing" if self.answer not in row else "is null" if row[self.answer] is None else "is empty"
            if needs_answer:
                raise RowProblem(f"{self.answer}: {found}, and answers are needed here")
            num_given = len(turns)
        else:
            answer = written_answer(self.answer, row[self.answer])
            turns.append(plain_turn("assistant", self.answer, text_of(self.answer, answer)))
        return conversation(turns, row, needs_answer=needs_answer, num_given=num_given, name=self.answer)

    def question(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns before the answer."""
        text = text_of(self.asked, field_of(row, self.asked))
        if is_talk(text):
            raise RowProblem(
                f"{self.asked}: is a conversation as JSON text, whose JSON would be the question; write columns: "
                f"{{messages: {self.asked}}} where it has its answer, else {{prompt: {self.asked}, completion: "
                f"{self.answer}}}"
            )
        about = [name for name in _ABOUT if not is_absent(row.get(name))]
        if about and self.asked != "instruction":
            raise RowProblem(
                f"{about[0]}: is not read beside {self.asked}; write columns: {{instruction: {self.asked}, {about[0]}: "
                f"{about[0]}, output: {self.answer}}} to put it after the question"
            )
        if len(about) > 1:
            raise RowProblem(f"{about[1]}: {about[0]} says what the instruction is about too; keep one of them")
        text += "".join(f"\n{text_of(name, row[name])}" for name in about)
        return [*_history(row), plain_turn("user", self.asked, text)]


def _history(row: Mapping[str, Any]) -> list[Turn]:
    if is_absent(row.get("history")):
        return []
    value = json_of("history", row["history"], what=_PAIRS)
    if not isinstance(value, list):
        raise RowProblem(f"history: must be {_PAIRS}, not {kind_of(value)}")
    turns = []
    for index, pair in enumerate(value):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(f"{place}: must be a [question, answer] pair, not {kind_of(pair)}")
        for number, role in enumerate(("user", "assistant")):
            turns.append(plain_turn(role, f"{place}[{number}]", text_of(f"{place}[{number}]", pair[number])))
    return turns


def _format(name: str, title: str, names: Names) -> Format:
    return Format(name, title, f"{names.asked} and {names.answer}", tells=names.tell, read=names.read)


NAMES: Mapping[str, Names] = {
    "alpaca": Names("instruction", "output"),
    "dolly": Names("instruction", "response"),
    "query_response": Names("query", "response"),
    "question_answer": Names("question", "answer"),
}
ALPACA = _format("alpaca", "Alpaca", NAMES["alpaca"])
DOLLY = _format("dolly", "Dolly", NAMES["dolly"])
QUERY_RESPONSE = _format("query_response", "query and response", NAMES["query_response"])
QUESTION_ANSWER = _format("question_answer", "question and answer", NAMES["question_answer"])

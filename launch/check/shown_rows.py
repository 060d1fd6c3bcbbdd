"""`check --rows N`: rows as they are trained, with what of each is learnt.

    reader.read(row) -> Prompt -> its texts (turns, alternatives) -> pieces of one kind -> colours, or marks in a log

A mask is shifted: its row i stands for the prediction of token i + 1. Here a token is learnt where that of itself is.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import click
import numpy as np

from configs.held_out import held_out_sets
from configs.schema import Run
from trainer.data.prompt_reader import PromptReader
from trainer.errors import BadRow, ConfigError, DataError, TooLong
from trainer.loop.inputs import Inputs
from trainer.loop.rows import open_held_out, open_reader
from trainer.types import Prompt

MOST_TOKENS = 600
"""Of one text that are shown; of a longer one the beginning and the end."""

LEARNT, SPECIAL = {"bg": "green", "fg": "black", "bold": True}, {"fg": "cyan"}
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2028\u2029\u2066\u2067\u2068\u2069\ufeff")
"""They turn the direction of writing, or are line breaks to some terminals."""

MARKS = ("{+", "+}")
"""Around what is learnt, where there are no colours: as word diffs have them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks to see."""

    rows: int
    first: int = 1  # counted from 1, as the lines of a file
    tokens: bool = False  # a table of them too


@dataclass(frozen=True, slots=True)
class Text:
    """One text that a row becomes."""

    title: str
    ids: np.ndarray  # int [L]
    learnt: np.ndarray  # bool [L]: of each token whether its prediction is in the loss
    weights: np.ndarray  # float [L]: of that prediction, among others of the row
    is_prompt: bool  # the answer is written by a teacher


def show_rows(run: Run, inputs: Inputs, wanted: Wanted, *, colour: bool | None = None) -> Iterator[str]:
    """Lines to print: of every task and held-out set the rows that are wanted. `colour` None: where stdout is a
    terminal and NO_COLOR is not set."""
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    paint = Paint(inputs.tokenizer, colour=colour)
    yield ""
    yield f"{paint.learnt('learnt')}: its prediction is in the loss. Control characters are escaped"
    for task in run.resolved_tasks().values():
        if task.prompts is not None:
            title = f"{task.name} rows" if run.tasks else "train rows"
            yield from _rows_of(title, lambda task=task: open_reader(run, inputs, task), paint, wanted)
    sets = held_out_sets(run)
    for name, one in sets.items():
        title = "evaluation rows" if len(sets) == 1 else f"{name} evaluation rows"
        yield from _rows_of(title, lambda one=one: open_held_out(run, inputs, one), paint, wanted)


def _rows_of(title: str, opened: Callable[[], PromptReader], paint: Paint, wanted: Wanted) -> Iterator[str]:
    try:
        reader = opened()
    except (ConfigError, DataError) as error:
        yield f"\n{title}: cannot be shown: {error}"
        return
    num_rows = len(reader.rows)
    if wanted.first > num_rows:
        yield f"\n{title}: there is no row {wanted.first}, the last one is {num_rows}"
    for row in range(wanted.first - 1, min(wanted.first - 1 + wanted.rows, num_rows)):
        yield f"\n{paint.title(f'{title}, row {row + 1} of {num_rows}')}"
        try:
            prompt, truncated = reader.read(row, f"0:{row}")
        except BadRow as problem:
            left_out = isinstance(problem, TooLong) and reader.data.on_too_long != "error"
            yield f"  {'left out' if left_out else 'cannot be used'}: {visible(str(problem))}"
            continue
        except ConfigError as problem:
            yield f"  cannot be used: {visible(str(problem))}"
            continue
        texts = texts_of(prompt, compared=reader.asks.compared)
        yield from _prompt(prompt, texts, truncated, paint, wanted)


def _prompt(prompt: Prompt, texts: list[Text], truncated: bool, paint: Paint, wanted: Wanted) -> Iterator[str]:
    facts = [visible(prompt.origin)]
    facts += [f"teacher {prompt.teacher}"] if prompt.teacher else []
    facts += [f"weight {prompt.weight:g}"] if prompt.weight != 1 else []
    facts += ["truncated"] if truncated else []
    yield f"  {', '.join(facts)}"
    for text in texts:
        yield f"  {text.title}{_counts(text)}"
        yield from (f"    {line}" for line in paint.lines(text))
        if wanted.tokens:
            yield from (f"    {line}" for line in paint.table(text))


def _counts(text: Text) -> str:
    counts = f"{len(text.ids)} tokens, "
    if text.is_prompt:
        return f"{counts}behind which the teacher writes the answer"
    weights = sorted({float(weight) for weight in text.weights[text.learnt]} - {1.0})
    weighted = f", weights {', '.join(f'{weight:g}' for weight in weights)} among them" if weights else ""
    return f"{counts}{int(text.learnt.sum())} learnt{weighted}"


def texts_of(prompt: Prompt, *, compared: str = "") -> list[Text]:
    """All that a row becomes, in the order in which it is trained; `compared`: the format of answers to compare."""
    if prompt.alternatives:
        answers = (prompt, *prompt.alternatives)
        titles = ["chosen", "rejected"] if compared == "preference" else _candidates(prompt)
        return [_text(f"{title}: ", answer) for title, answer in zip(titles, answers, strict=True)]
    turns = [prompt, *prompt.turns]
    if len(turns) == 1:
        return [_text("", prompt)]
    return [_text(f"sequence {number} of {len(turns)}: ", turn) for number, turn in enumerate(turns, start=1)]


def _candidates(prompt: Prompt) -> list[str]:
    num = 1 + len(prompt.alternatives)
    scores = [""] * num if prompt.scores is None else [f", score {score:g}" for score in prompt.scores]
    return [f"candidate {number} of {num}{score}" for number, score in enumerate(scores, start=1)]


def _text(title: str, text: Any) -> Text:
    """Of a prompt, a turn or an alternative."""
    ids, mask = text.token_ids, text.loss_mask
    learnt = np.zeros(len(ids), bool)
    weights = np.ones(len(ids))
    if mask is not None:
        learnt[1:] = mask[:-1]
    if text.row_weights is not None:
        weights[1:] = text.row_weights[:-1]
    return Text(title, ids, learnt, weights, is_prompt=mask is None)


class Paint:
    """Texts for a terminal, or with marks for a log."""

    def __init__(self, tokenizer: Any, *, colour: bool) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
        self._colour = colour

    def title(self, text: str) -> str:
        return click.style(text, bold=True) if self._colour else text

    def learnt(self, text: str) -> str:
        return click.style(text, **LEARNT) if self._colour else text.join(MARKS)

    def lines(self, text: Text) -> list[str]:
        """The text, with what is left out of a long one said in its place."""
        shown = "".join(self._piece(piece, kind) for piece, kind in self._pieces(text))
        if text.is_prompt:
            shown += self.learnt("the teacher's answer")
        return shown.split("\n")

    def table(self, text: Text) -> Iterator[str]:
        """A line for each token."""
        yield f"{'token':>6} {'id':>7}  {'learnt':<8} text"
        skipped = left_out(len(text.ids))
        for index, token in enumerate(text.ids):
            if index in skipped:
                if index == skipped.start:
                    yield f"{'...':>6} {len(skipped)} tokens"
                continue
            weight = f" x {text.weights[index]:g}" if text.weights[index] != 1 else ""
            learnt = f"yes{weight}" if text.learnt[index] else ""
            yield f"{index:>6} {token:>7}  {learnt:<8} '{visible(self._decoded([token]), newlines=False)}'"

    def _pieces(self, text: Text) -> Iterator[tuple[str, str]]:
        """(text, kind) of tokens of one kind in a row: `learnt`, `special`, "" for others, `note` for a remark."""
        skipped = left_out(len(text.ids))
        for span in (range(skipped.start), range(skipped.stop, len(text.ids))):
            yield from self._spelled(text, span)
            if skipped and span.start == 0:
                learnt = int(text.learnt[skipped.start : skipped.stop].sum())
                yield f"\n... {len(skipped)} tokens are left out here, {learnt} of them learnt ...\n", "note"

    def _spelled(self, text: Text, span: range) -> Iterator[tuple[str, str]]:
        """A text is decoded as a whole up to each border: a character may have several tokens, and a word at the
        beginning of a text may lose its space."""
        before, begun, end = "", span.start, span.start
        for kind, some in groupby(span, key=lambda index: self._kind(text, index)):
            start, end = end, end + sum(1 for _ in some)
            whole = self._decoded(text.ids[begun:end])
            if not whole.startswith(before):  # the border is inside of a character
                before, begun = "", start
                whole = self._decoded(text.ids[begun:end])
            yield whole[len(before) :], kind
            before = whole

    def _kind(self, text: Text, index: int) -> str:
        if text.learnt[index]:
            return "learnt"
        return "special" if int(text.ids[index]) in self._special else ""

    def _piece(self, piece: str, kind: str) -> str:
        """Line by line, so that a background does not run on to the edge of the terminal."""
        if kind == "note":
            return piece
        lines = visible(piece).split("\n")
        if kind == "learnt":
            ended = [f"{line}\\n" for line in lines[:-1]] + lines[-1:]
            lines = [self.learnt(line) if line else line for line in ended]
        elif kind == "special" and self._colour:
            lines = [click.style(line, **SPECIAL) for line in lines]
        return "\n".join(lines)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def left_out(num_tokens: int) -> range:
    """The tokens in the middle of a long text that are not shown."""
    if num_tokens <= MOST_TOKENS:
        return range(num_tokens, num_tokens)
    return range(MOST_TOKENS // 2, num_tokens - MOST_TOKENS // 2)


def visible(text: str, *, newlines: bool = True) -> str:
    """The text without anything that a terminal obeys: controls, and marks that turn the direction of writing, as
    escapes. Line breaks stay, with `newlines`."""

    def shown(character: str) -> str:
        if character == "\n" and newlines:
            return character
        if unicodedata.category(character) in ("Cc", "Cs") or character in TURNING:
            return character.encode("unicode_escape", "surrogatepass").decode()
        return character

    return "".join(map(shown, text))

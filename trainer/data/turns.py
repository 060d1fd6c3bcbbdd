"""Where the answers of a conversation lie in what a chat template makes of it.

Chat templates rarely mark what the model writes, so answers are found by rendered prefixes. For assistant turn i

    render(messages[:i], add_generation_prompt=True)   what a generator reads     ^ must be a prefix of
    render(messages[:i + 1])                           ... answer <end> rest   ^

and the answer is what lies between the former and <end>, the end-of-turn token included. A later rendering that begins
with this text up to <end> holds the answer too, and one text then serves both. Many templates rewrite earlier turns
(they drop reasoning, or write what they need into the last turn alone); a turn that no later rendering repeats stays in
a text of its own, the one that a generator would have read and written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Any

from trainer.data.rendering import HINT
from trainer.data.said import check_said
from trainer.data.turn_end import TurnEnd
from trainer.errors import ConfigError, DataError

_CLOSED = re.compile(r"<(\w+)>\s*</\1>\s*$")
_OPENED = re.compile(r"<(\w+)>(\s*)$")
_REASONING = re.compile(r"</(think|thinking|thought|reasoning)>")


class TooManyTokens(DataError):
    """A conversation of more tokens than asked for; its answers were not looked for."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return (TooManyTokens, (self.num_tokens,))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in a text."""

    message: int  # its index in the conversation
    start: int  # characters
    stop: int  # behind the end-of-turn token


@dataclass(frozen=True, slots=True)
class AnswersInText:
    """A text in which some answers of a conversation lie as a generator would have written them."""

    text: str
    answers: tuple[Answer, ...]

    @property
    def decisive(self) -> str:
        """The text up to the end of its last answer."""
        return self.text[: self.answers[-1].stop]


@dataclass(frozen=True)
class TurnFinder:
    """`render(num, generation_prompt)` is a conversation's template as a function of how many messages it gets."""

    messages: AbstractSequence[Mapping[str, Any]]
    render: Callable[[int, bool], str]
    end: TurnEnd

    def find(self, learnt: Collection[int], whole: str) -> list[AnswersInText]:
        """Texts that hold each of these assistant turns exactly once; `whole` is the rendered conversation.

        Raises `ConfigError` for a template from whose rendering an answer cannot be told, `DataError` for an answer
        that it does not render.
        """
        texts: list[AnswersInText] = []
        for index in sorted(learnt):
            one = self._one(index, whole)
            if texts and one.text.startswith(texts[-1].decisive):
                texts[-1] = AnswersInText(one.text, (*texts[-1].answers, *one.answers))
            else:
                texts.append(one)
        if texts and whole.startswith(texts[-1].decisive):
            texts[-1] = AnswersInText(whole, texts[-1].answers)
        return texts

    def rewrites(self, index: int, whole: str) -> bool:
        """Whether the rendered conversation does not repeat this turn as a generator would have written it."""
        return not whole.startswith(self._one(index, whole).decisive)

    def _refusal(self, text: str) -> ConfigError | DataError:
        """Of the row where it calls tools: a template that loses those may be right for all others."""
        calls = any(message.get("tool_calls") for message in self.messages)
        return DataError(text) if calls else ConfigError(text)

    def _one(self, index: int, whole: str) -> AnswersInText:
        """Turn `index` in the text that ends with it."""
        header = self.render(index, True)
        turn = whole if index + 1 == len(self.messages) else self.render(index + 1, False)
        message, name = self.messages[index], f"messages[{index}]"
        if not turn.startswith(header):
            turn = self._behind(header, turn, message, name)
        body, stop = self._stop(turn, len(header), message, name)
        opened = _OPENED.search(header)  # a prompt may write the first tag of the reasoning
        answer = turn[opened.start() if opened else len(header) : body]
        begins = self.end.generation_prompt
        if begins and turn[len(header) : body].lstrip().startswith(begins):
            raise self._refusal(
                f"{name}: the prompt of this turn lacks {begins!r}, with which the chat template begins the answer, "
                f"so the student would learn to write it; {HINT}"
            )
        if not message.get("tool_calls") and not _ends_with(answer, message["content"]):
            raise self._refusal(
                f"{name}: the chat template does not render this answer as it stands, followed by "
                f"{self.end.suffix!r}: it becomes {turn[len(header) :][-120:]!r}; {HINT}"
            )
        check_said(answer, message, name)
        return AnswersInText(turn, (Answer(index, len(header), stop),))

    def _stop(self, turn: str, start: int, message: Mapping[str, Any], name: str) -> tuple[int, int]:
        """Where the answer that begins at `start` ends, without and with its end-of-turn token."""
        suffix = self.end.suffix
        if turn.endswith(suffix):
            return len(turn) - len(suffix), len(turn) - len(suffix) + self.end.num_characters
        if message.get("tool_calls"):  # some templates end a turn that calls tools with a token of its own
            found = self.end.last_special(turn[start:])
            if found is not None:
                return start + found[0], start + found[1]
        raise self._refusal(
            f"{name}: the chat template does not render this answer as it stands, followed by {suffix!r}: "
            f"it becomes {turn[start:][-120:]!r}; {HINT}"
        )

    def _behind(self, header: str, turn: str, message: Mapping[str, Any], name: str) -> str:
        """The text of a turn behind a prompt whose last characters the template does not repeat.

        That is well defined where only white space differs, for an empty block (`<think></think>` of a model told not
        to reason), and for an opened one (`<think>`) that the answer itself closes.
        """
        same = header.rstrip()
        if turn.startswith(same):
            return header + turn[len(same) :].lstrip()
        closed = _CLOSED.search(header)
        if closed and turn.startswith(header[: closed.start()]):
            rest = turn[closed.start() :]
            if rest.lstrip().startswith(f"<{closed[1]}>"):
                raise DataError(
                    f"{name}: the prompt of this turn ends with an empty <{closed[1]}>, but the answer reasons: remove "
                    "its reasoning, or let the template reason with teacher.template_arguments"
                )
            return header + rest
        opened = _OPENED.search(header)
        if opened is None or not turn.startswith(header[: opened.start()]) or message.get("tool_calls"):
            raise self._refusal(_parted(name, header, turn))
        tag, content = opened[1], message["content"].strip()
        reasoning, closing, rest = content.partition(f"</{tag}>")
        if not closing or not _ends_with(turn.removesuffix(self.end.suffix), rest):
            raise DataError(
                f"{name}: the prompt of this turn ends with {opened[0].strip()!r}, which the answer does not close and "
                f"the chat template then leaves out: write the reasoning and </{tag}> before the answer in content, or "
                f"{HINT}"
            )
        written = reasoning.removeprefix(opened[0].strip()).removeprefix(opened[2]) + closing + rest
        return header + written + self.end.suffix


def _parted(name: str, header: str, turn: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(header, turn, strict=False)) if a != b), min(len(header), len(turn)))
    return (
        f"{name}: the chat template is not prefix-stable, so the answer cannot be told from the rest: at character "
        f"{at} the prompt of this turn has {header[at : at + 60]!r}, the conversation up to it has "
        f"{turn[at : at + 60]!r}; {HINT}"
    )


def _ends_with(answer: str, content: str) -> bool:
    """Around reasoning inside content, white space is the template's choice."""
    if _REASONING.search(content):
        return "".join(answer.split()).endswith("".join(content.split()))
    return answer.rstrip().endswith(content.strip())

"""A row of a dataset, by what is in the loss: a conversation, a continued text, plain text, or answers to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation in the shape that chat templates take (transformers, "Writing a chat template").

    Assistant turns from index `loss_from` on are answers, and the ones before are given context.
    """

    messages: tuple[Mapping[str, Any], ...]
    """role is system, developer, user, assistant or tool; content is text, empty where an assistant turn only calls
    tools. tool_calls are `{type: function, id, function: {name, arguments}}`: arguments an object, id where the row has
    one. Other fields are the row's own."""
    loss_from: int
    turn_weights: Mapping[int, float] = field(default_factory=dict)
    """What the loss of an answer is multiplied by, by its index in `messages`, where it is not 1; 0 makes context of an
    answer. `weight` multiplies it further."""
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] | None = None
    """What the template is given as tools: `{type: function, function: {name, description, parameters}}` each."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template for this row, which win over those of the configuration."""

    @property
    def context(self) -> frozenset[int]:
        """Answers that are not learnt."""
        return frozenset(index for index, weight in self.turn_weights.items() if weight == 0)

    @property
    def answered(self) -> bool:
        """Whether the last turn is an answer; if not, one is wanted there."""
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text to be continued, outside any chat template. `completion` None: it is to be written."""

    prompt: str
    completion: str | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CorpusRow:
    """Plain text, all of it to be learnt."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A prompt with a better and a worse answer, each as the row that the prompt makes with it."""

    chosen: ChatRow | TextRow
    rejected: ChatRow | TextRow

    @property
    def answers(self) -> tuple[ChatRow | TextRow, ...]:
        return self.chosen, self.rejected

    @property
    def best(self) -> ChatRow | TextRow:
        return self.chosen

    def each(self, change: Callable[[Any], Any]) -> PreferenceRow:
        """With each answer changed."""
        return PreferenceRow(*map(change, self.answers))


@dataclass(frozen=True, slots=True)
class CandidatesRow:
    """A prompt with several answers, each as the row that the prompt makes with it, and perhaps a score of each."""

    answers: tuple[ChatRow | TextRow, ...]
    scores: tuple[float, ...] | None = None

    @property
    def best(self) -> ChatRow | TextRow:
        """The first of those with the highest score; the first where there are none."""
        return self.answers[0 if self.scores is None else self.scores.index(max(self.scores))]

    def each(self, change: Callable[[Any], Any]) -> CandidatesRow:
        """With each answer changed."""
        return CandidatesRow(tuple(map(change, self.answers)), self.scores)


Row = ChatRow | TextRow | CorpusRow | PreferenceRow | CandidatesRow


def texts_of(row: Row) -> list[tuple[str, str]]:
    """(field, text) of everything in a row that becomes text."""
    match row:
        case CorpusRow():
            return [("text", row.text)]
        case TextRow():
            return [("prompt", row.prompt), ("completion", row.completion or "")]
        case PreferenceRow() | CandidatesRow():
            return [text for answer in row.answers for text in texts_of(answer)]
    found = [
        text
        for index, message in enumerate(row.messages)
        for key, value in message.items()
        if key != "role"
        for text in _texts_in(value, f"messages[{index}].{key}")
    ]
    given = [*_texts_in(row.tools or (), "tools"), *_texts_in(row.template_arguments, "chat_template_kwargs")]
    return [*found, *given]


def _texts_in(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(field, text) of all text in a JSON value, the names of its fields included."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"the name of {place}.{key}", key
            yield from _texts_in(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _texts_in(item, f"{place}[{index}]")


def preview(value: Any, limit: int = 200) -> str:
    """A row on one short line, for messages."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""A conversation as a chat template gets it, and what the template must read of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainer.data.rendering import HINT, RENDERER, Messages
from trainer.data.row_fields import REASONING
from trainer.data.special_tokens import MARK
from trainer.errors import DataError

Tools = AbstractSequence[Mapping[str, Any]]
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Conversation:
    """Messages and tools of a row, and all variables that the template gets beside them."""

    template: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    variables: Mapping[str, Any]

    @classmethod
    def of(cls, template: str, messages: Messages, tools: Tools | None, variables: Mapping[str, Any]) -> Conversation:
        """A developer's turn is a system turn for a template that does not know the role: most would leave it out.

        Raises `DataError` for what the template does not read and would lose.
        """
        for index, message in enumerate(messages):
            for field in (*REASONING, "tool_calls"):
                if message.get(field) and not re.search(rf"\b{field}\b", template):
                    raise DataError(
                        f"messages[{index}].{field}: the chat template does not read it, and it would be lost; remove "
                        f"it, or {HINT}"
                    )
        knows_developers = re.search(r"\bdeveloper\b", template) is not None
        given = (dict(message) for message in messages)
        given = (
            one | {"role": "system"} if one["role"] == "developer" and not knows_developers else one for one in given
        )
        return cls(template, tuple(given), tuple(tools) if tools else None, variables)

    def render(self, num: int | None = None, generation_prompt: bool = False) -> str:
        """The first `num` messages rendered, all of them without. Raises as `Renderer.render` does."""
        text = RENDERER.render(
            self.template,
            self.messages,
            variables=self.variables,
            num_messages=len(self.messages) if num is None else num,
            generation_prompt=generation_prompt,
            tools=self.tools,
        )
        if _MARK_IN_JSON in text.lower() and MARK in json.dumps([self.messages, self.tools], ensure_ascii=False):
            raise DataError(
                "the chat template writes text of the row in ASCII alone, so that special tokens in it cannot be told "
                f"from the template's own; write data.special_tokens_in_text: allow, or {HINT}"
            )
        return text


_MARK_IN_JSON = json.dumps(MARK)[1:-1]

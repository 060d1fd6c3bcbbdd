"""One message of a conversation, as every format reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, with the places of its parts in the row."""

    place: str
    role: str  # system, developer, user, assistant or tool
    content: str
    fields: Mapping[str, Any] = field(
        default_factory=dict
    )  # further ones that the template gets, tool_calls among them
    mark: float | None = None  # what the row says that its loss is multiplied by
    role_place: str = ""
    content_place: str = ""
    said: str = ""  # the role as the row has it

    @property
    def message(self) -> Mapping[str, Any]:
        """What the chat template gets."""
        return {"role": self.role, "content": self.content, **self.fields}

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.fields.get("tool_calls", [])


def plain_turn(role: str, place: str, content: str) -> Turn:
    """A turn whose text is a field of its own."""
    return Turn(place, role, content, role_place=place, content_place=place, said=role)

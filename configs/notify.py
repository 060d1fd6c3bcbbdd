"""`notify:`: who is told how a run ended, and how an address that is a secret is given without being written down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from configs.refusal import refusal
from configs.section import Section

Ending = Literal["end", "failure", "stall", "preemption"]
Words = Annotated[tuple[str, ...], Field(min_length=1)]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_EXAMPLE = "for example https://example.org/hook, or ${SLACK_WEBHOOK} for one that stands in that environment variable"


class Notify(Section):
    """A webhook, a command, or both, told once when the run ends."""

    webhook: str | None = Field(
        None,
        min_length=1,
        description="http or https address that gets a POST of JSON. ${NAME} in it is taken from the environment of "
        "the process that runs `train`, and written nowhere.",
    )
    command: str | Words | None = Field(
        None,
        description="Gets the same JSON on stdin and its fields as variables STILLHOUSE_RUN, _KIND and so on. A list "
        "is a program and its arguments; text is run by the shell.",
    )
    on: Annotated[tuple[Ending, ...], Field(min_length=1)] = Field(
        ("end", "failure", "stall"),
        description="end: trained to the end. failure: ended by an error, a stall included. stall: ended because it "
        "got no further. preemption: asked to stop.",
    )
    timeout_s: Annotated[float, Field(gt=0, le=120)] = Field(10.0, description="For the webhook and for the command.")

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str | None) -> str | None:
        if webhook is None:
            return None
        plain = _VARIABLE.sub("x", webhook)
        if "$" in plain:
            raise ValueError(f"a variable is written ${{NAME}}, with letters, digits and underscores; {_EXAMPLE}")
        if not webhook.startswith("${"):
            refuse_address(plain, "the webhook")
        return webhook

    @field_validator("command")
    @classmethod
    def _names_a_program(cls, command: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if command is not None and not (command if isinstance(command, str) else command[0]).strip():
            raise ValueError("names no program; write for example command: [mail, -s, done, me@example.org]")
        return command

    @model_validator(mode="after")
    def _somebody_is_told(self) -> Notify:
        if self.webhook is None and self.command is None:
            raise refusal((), None, f"nobody is told: give webhook or command, {_EXAMPLE}")
        return self

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the environment variables that the webhook's address is made of."""
        return tuple(dict.fromkeys(_VARIABLE.findall(self.webhook or "")))

    def address(self, environment: Mapping[str, str]) -> str | None:
        """The webhook's whole address, which may be a secret; None where there is no webhook.

        Raises `ValueError` for a variable that is missing and for what is no address, without showing values.
        """
        if self.webhook is None:
            return None
        for name in self.variables:
            if not environment.get(name, "").strip():
                raise ValueError(f"the environment variable {name} is not set here; export it where `train` runs")
        address = _VARIABLE.sub(lambda found: environment[found[1]].strip(), self.webhook)
        refuse_address(address, f"what is in {' and '.join(self.variables)}" if self.variables else "the webhook")
        return address


def refuse_address(address: str, what: str) -> None:
    """Raises `ValueError` for what is no http address, without showing it."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f\x7f]", address):
        raise ValueError(f"{what} is no http or https address; {_EXAMPLE}")

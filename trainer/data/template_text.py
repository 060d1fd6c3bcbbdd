"""The text of a chat template: from a named file, or the tokenizer's own."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from configs.paths import expand_home
from trainer.data.rendering import HINT
from trainer.errors import ConfigError, foreign_errors

MAX_TEMPLATE_CHARACTERS = 2**20
TOOL_USE = "tool_use"


def tools_text(tokenizer: PreTrainedTokenizerBase, path_override: str | Path | None) -> str | None:
    """The template of a tokenizer with several that is for conversations with tools, as transformers names it."""
    if path_override is not None or not isinstance(tokenizer.chat_template, dict):
        return None
    return tokenizer.chat_template.get(TOOL_USE)


def template_text(tokenizer: PreTrainedTokenizerBase, path_override: str | Path | None) -> str | None:
    """None where there is none. Raises `ConfigError` for one that cannot be read."""
    if path_override is not None:
        return _read_template(path_override)
    if not tokenizer.chat_template:
        return None
    with foreign_errors("cannot read the chat template of the teacher's tokenizer", hint=HINT):
        text = str(tokenizer.get_chat_template())
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(f"the teacher's chat template has {len(text)} characters, too many to be one; {HINT}")
    return text


def _read_template(named: str | Path) -> str:
    """A template file; devices and files without end are none."""
    with foreign_errors(f"teacher.chat_template: cannot read {named}"):
        path = expand_home(named)
        if path.exists() and not path.is_file():
            raise ConfigError(f"teacher.chat_template: {named} is no file; name a jinja file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEMPLATE_CHARACTERS + 1)
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"teacher.chat_template: {named} has over {MAX_TEMPLATE_CHARACTERS} characters, too many for a template"
        )
    return text

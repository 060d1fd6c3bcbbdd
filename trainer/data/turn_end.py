"""What a chat template puts behind an answer, found by rendering a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trainer.data.rendering import HINT, Messages
from trainer.errors import ConfigError

_PROBE_QUESTION, _PROBE_ANSWER = "question", "sentinel"


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What the template puts behind an answer."""

    suffix: str  # all of it: "<|im_end|>\n"
    num_characters: int  # of it up to the end of the end-of-turn token, which the student learns
    token_id: int
    generation_prompt: str  # what add_generation_prompt puts behind a question, white space apart
    special: frozenset[str]  # the tokenizer's special tokens

    def last_special(self, text: str) -> tuple[int, int] | None:
        """Where the last special token in a text begins and ends."""
        found = [(text.rfind(token), text.rfind(token) + len(token)) for token in self.special if token in text]
        return max(found, key=lambda place: (place[1], -place[0]), default=None)


def find_turn_end(tokenizer: PreTrainedTokenizerBase, render: Callable[..., str]) -> TurnEnd:
    """`render` is a template as a function of messages. Raises `ConfigError` for one from which no student could learn
    to stop."""
    question: Messages = ({"role": "user", "content": _PROBE_QUESTION},)
    rendered = render((*question, {"role": "assistant", "content": _PROBE_ANSWER}))
    before, found, suffix = rendered.rpartition(_PROBE_ANSWER)
    if not found:
        raise ConfigError(f"the chat template leaves out the content of an assistant turn; {HINT}")
    bare, header = render(question), render(question, generation_prompt=True)
    if bare == header and before.startswith(bare) and before[len(bare) :].strip():
        raise ConfigError(
            f"the chat template ignores add_generation_prompt: an answer begins with {before[len(bare) :]!r}, "
            f"which no prompt contains; {HINT}"
        )
    token = _first_special(tokenizer, suffix)
    if token is None:
        raise ConfigError(
            f"the chat template puts no special token behind an answer (only {suffix!r}), so the student could not "
            f"learn to stop; {HINT}"
        )
    end = suffix.index(token) + len(token)
    generation_prompt = header.removeprefix(bare).strip()
    return TurnEnd(
        suffix, end, tokenizer.convert_tokens_to_ids(token), generation_prompt, frozenset(_special(tokenizer))
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The first special token in a text; where there is none, the first added one that is not white space."""
    special, added = _special(tokenizer), tokenizer.added_tokens_decoder.values()
    for candidates in (special, {token.content for token in added if token.content.strip()}):
        found = [(text.index(token), -len(token), token) for token in candidates if token in text]
        if found:
            return min(found)[2]
    return None

"""Which variables a chat template may be given beside the conversation: those that it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from configs.refusal import did_you_mean

RESERVED = {
    "messages": "is what the rows say",
    "tools": "is what the rows say in their field tools",
    "add_generation_prompt": "is decided at each rendering",
    "continue_final_message": "is decided at each rendering",
    "return_assistant_tokens_mask": "is decided at each rendering",
    "conversations": "is what the rows say",
    "chat_template": "is named beside it, as teacher.chat_template",
    "raise_exception": "is transformers' own",
    "strftime_now": "is transformers' own",
}


def argument_problem(
    arguments: Mapping[str, Any], *, read: Collection[str], own: Collection[str], place: str
) -> str | None:
    """What is wrong with the first bad one of these variables, or None.

    `read`: the variables that the template reads; `own`: those that the tokenizer gives it, such as bos_token. `place`
    stands before the name in the message.
    """
    known = sorted(set(read) - RESERVED.keys() - set(own))
    for name in arguments:
        if name in RESERVED:
            return f"{place}.{name}: cannot be given, since it {RESERVED[name]}; remove it"
        if name in own:
            return f"{place}.{name}: cannot be given, since it is the tokenizer's; remove it"
        if name not in known:
            there = f"it reads {', '.join(known)}" if known else "it reads no variable of its own"
            return f"{place}.{name}: the chat template never reads this variable{did_you_mean(name, known)} ({there})"
    return None

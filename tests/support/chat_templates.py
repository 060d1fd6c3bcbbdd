"""Chat templates of the shapes that published models have, each as small as shows the shape.

In those of ANSWERS_MARKED transformers finds the answers by itself (`return_assistant_tokens_mask`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
_RESULTS = (  # those that follow each other are one user turn
    "{% if m.role == 'tool' %}{% if loop.previtem is undefined or loop.previtem.role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
HERMES = (
    _TOOLS + "{% for m in messages %}" + _RESULTS + "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content }}" + _CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Tools as ChatML: Qwen2.5, Hermes, SmolLM3."""

_LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = (
    "{{ bos_token }}{% if tools %}{{ '" + _LLAMA.format("system") + "' + tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '" + _LLAMA.format("assistant") + "' }}{% generation %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{% set call = m.tool_calls[0].function %}{{ \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson + '}<|eom_id|>' }}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endgeneration %}{% elif m.role == 'tool' %}{{ '" + _LLAMA.format("ipython") + "' + m.content | tojson }}"
    "{{ '<|eot_id|>' }}{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + _LLAMA.format("assistant") + "' }}{% endif %}"
)
"""Another token ends a turn that calls, content beside a call is left out, results are JSON strings: Llama 3.1."""

MISTRAL = (
    "{{ bos_token }}{% set last = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == last.at %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]' + {'content': m.content, 'call_id': m.tool_call_id} | tojson + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{% generation %}{{ '[TOOL_CALLS][' }}{% for call in m.tool_calls %}"
    "{{ call.function | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']</s>' }}"
    "{% endgeneration %}"
    "{% else %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
"""No generation prompt, and the tools before the last question alone: Mistral."""

QWEN3 = (
    _TOOLS + "{% set last = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    + _RESULTS
    + "{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% set reasoning = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{% if loop.index0 > last.at and (loop.last or reasoning) %}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}" + _CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Reasoning is dropped from all turns before the last question: Qwen3."""

DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ m.content.split('</think>')[-1].strip() + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Reasoning is dropped from every turn, and the prompt begins it: DeepSeek-R1."""

EMPTY_BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""An empty block of reasoning that only the prompt has."""

ANSWERS_MARKED = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3}

SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "</s>")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def tokenizer_with(text: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = text
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields, **({"tool_calls": list(calls)} if calls else {})}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call{number:05}", "function": {"name": "get_weather", "arguments": arguments}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": "get_weather", "tool_call_id": f"call{number:05}"}


ONE_CALL = [
    user("Rain in Bern?"),
    assistant("", call(1, city='Bärn "old"', days=3)),
    result(1, '{"rain": true}'),
    assistant("Yes, rain."),
]
PARALLEL = [
    user("Bern or Rome?"),
    assistant("", call(1, city="Bern", days=1), call(2, city="Rome", days=1)),
    result(1, "rain"),
    result(2, "sun"),
    assistant("Rome."),
    user("thanks"),
    assistant("sure"),
]
BESIDE = [user("Rain?"), assistant("I look it up.", call(1, city="Bern")), result(1, "rain"), assistant("Yes.")]
REASONED = [
    user("What is a still?"),
    assistant("A vessel.", reasoning_content="spirits are made in it"),
    user("Thanks, naïve 你好?"),
    assistant("Grüezi,\nwelcome.", reasoning_content="be kind"),
]

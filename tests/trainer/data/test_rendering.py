"""Chat templates as code of somebody else: bounded in time and memory, and rendered as transformers does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import CHATML, tiny_tokenizer

from trainer.data.chat import MAX_ANSWERS, Template, TooManyTokens
from trainer.data.rendering import Renderer
from trainer.errors import ConfigError, DataError

TALK = ({"role": "user", "content": "who?"}, {"role": "assistant", "content": "the fox"})


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(cpu_s=1.0, memory_bytes=256 * 2**20)
    yield made
    made.close()


def rendered(renderer: Renderer, template: str, *, num: int = 2, **variables: str) -> str:
    return renderer.render(template, TALK, variables=variables, num_messages=num, generation_prompt=False)


DOUBLING = "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
BRANCHING = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"

TIME = {"power": "{{ 10**(10**8) }}", "loops": LOOPS, "recursion": BRANCHING}
MEMORY = {
    "product": "{{ 'a' * 10**12 }}",
    "variable": "{% set n = messages | length %}{{ ('a' * n) * 10**12 }}",
    "doubling": DOUBLING,
    "padding": "{{ 'a'.ljust(10**12) }}",
    "centre": "{{ 'a' | center(10**12) }}",
}


@pytest.mark.parametrize("name", [*TIME, *MEMORY])
def test_a_template_without_end_is_ended_and_the_next_one_is_rendered(renderer: Renderer, name: str) -> None:
    what = "1 s of processor time" if name in TIME else "256 MiB of memory"
    with pytest.raises(ConfigError, match=f"the chat template needs more than {what} .*teacher.chat_template"):
        rendered(renderer, (TIME | MEMORY)[name])
    assert rendered(renderer, "{{ messages[0].content }}") == "who?"


@pytest.mark.parametrize(
    "template", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}", "{{ '%999999d' % 'x' }}"]
)
def test_whatever_a_template_raises_is_a_refusal(renderer: Renderer, template: str) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses the conversation: \w+"):
        rendered(renderer, template)


def test_templates_are_rendered_as_transformers_does(renderer: Renderer) -> None:
    tokenizer = tiny_tokenizer()
    odd = (
        "{{ bos_token }}{% generation %}{{ messages | tojson }}{% endgeneration %}{% for m in messages %}\n"
        "  {% if loop.last %}{% break %}{% endif %}\n{{ m.name }}{% endfor %}"
    )
    messages = ({"role": "user", "content": "<é😀>", "name": "Ann"}, {"role": "assistant", "content": "ß"})
    for template in (CHATML, odd):
        expected = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
        variables = dict(tokenizer.special_tokens_map)
        found = renderer.render(template, messages, variables=variables, num_messages=2, generation_prompt=False)
        assert found == expected


def test_only_what_changed_between_calls_is_what_changes(renderer: Renderer) -> None:
    assert rendered(renderer, "{{ messages | length }}{{ x }}", x="a") == "2a"
    assert rendered(renderer, "{{ messages | length }}{{ x }}", x="b", num=1) == "1b"
    assert rendered(renderer, "{{ messages | length }}{{ x }}") == "2"


def test_a_process_that_was_killed_from_outside_is_started_again(renderer: Renderer) -> None:
    process = "{{ messages[1].content }}"
    assert rendered(renderer, process) == "the fox"
    os.kill(renderer._process.pid, signal.SIGKILL)
    assert rendered(renderer, process) == "the fox"


def test_signals_that_ask_a_run_to_stop_leave_rendering_alone(renderer: Renderer) -> None:
    rendered(renderer, "a")
    before = renderer._process.pid
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(before, name)
    assert rendered(renderer, "b") == "b"
    assert renderer._process.pid == before


def test_files_that_are_no_template_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large.jinja").write_text("a" * (2**20 + 1))
    for path, message in (
        ("/dev/zero", "is no file; name a jinja file"),
        (tmp_path, "is no file; name a jinja file"),
        (tmp_path / "large.jinja", "too many for a template"),
        ("~nosuchuser/x", "there is no user"),
        ("/" + "a" * 300, "cannot read"),
    ):
        with pytest.raises(ConfigError, match=f"teacher.chat_template: .*{message}"):
            Template.of(tiny_tokenizer(), path)


def test_a_conversation_without_end_is_told_before_its_answers_are_looked_for() -> None:
    made = Template.of(tiny_tokenizer())
    long = [*TALK] * 5000
    started = time.process_time()
    with pytest.raises(TooManyTokens) as caught:
        made.render(long, max_tokens=2048)
    assert caught.value.num_tokens == len(made.render_prompt(long)) - len(
        made.tokenizer("<|im_start|>assistant\n").input_ids
    )
    with pytest.raises(DataError, match=f"has 5000 answers, at most {MAX_ANSWERS} are looked for: split"):
        made.render(long)
    assert time.process_time() - started < 5


def test_reasoning_that_the_template_would_drop_is_refused() -> None:
    talk = [TALK[0], {**TALK[1], "reasoning_content": "let me see"}]
    with pytest.raises(DataError, match=r"messages\[1\].reasoning_content: the chat template does not read it"):
        Template.of(tiny_tokenizer()).render(talk)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("+ m['content']", "+ (m.reasoning_content or '') + m['content']")
    made = Template.of(tokenizer)
    (text,) = made.render(talk)
    ids, mask = text.token_ids, text.loss_mask
    assert tokenizer.decode(ids[1:][mask[:-1]]) == "let me seethe fox<|im_end|>"


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ a }}{{ b.c }}{{ d['e'] }}{{ f(g) }}", {"a", "b", "d", "f", "g"}),
        ("{% set a = a | default(1) %}{{ a }}", {"a"}),
        ("{% set a = 1 %}{{ a }}", set()),
        ("{% if not a is defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
        ("{% if b %}{% set a = b %}{% endif %}{{ a }}", {"a", "b"}),
        ("{% if b %}{% set a = 1 %}{% elif c %}{% set a = 2 %}{% else %}{% set a = 3 %}{% endif %}{{ a }}", {"b", "c"}),
        ("{% for m in messages if m.x %}{{ loop.index }}{% set a = m %}{{ a }}{% endfor %}{{ a }}", {"messages", "a"}),
        ("{% macro f(x, y=z) %}{{ x }}{{ y }}{{ g() }}{% endmacro %}{% macro g() %}{% endmacro %}{{ f(1) }}", {"z"}),
        ("{% set ns = namespace(n=0) %}{% set ns.n = a %}{{ ns.n }}{{ range(3) }}{{ strftime_now('') }}", {"a"}),
        ("{% generation %}{% set b = 1 %}{{ a }}{% endgeneration %}{{ raise_exception('b') }}", {"a"}),
        ("{% set a %}{{ b }}{% endset %}{{ a }}", {"b"}),
    ],
)
def test_the_variables_of_a_template_are_those_that_it_may_read(
    renderer: Renderer, template: str, names: set[str]
) -> None:
    assert renderer.variables_of(template) == names


def test_a_template_whose_variables_cannot_be_listed_says_so(renderer: Renderer) -> None:
    with pytest.raises(ConfigError, match="no jinja template: line 1"):
        renderer.variables_of("{{ a")

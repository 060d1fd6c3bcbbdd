"""Tool calls, and templates that rewrite earlier turns: against transformers' own masks and a generator's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chat_templates as shapes
import numpy as np
import pytest
from chat_templates import BESIDE, ONE_CALL, PARALLEL, REASONED, TOOL, assistant, call, result, tokenizer_with, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHATML
from transformers import AutoTokenizer

from trainer.data.chat import Template, TooManyTokens
from trainer.errors import ConfigError, DataError
from trainer.types import RowText


def made(text: str, **arguments: Any) -> Template:
    return Template.of(tokenizer_with(text)).given(arguments)


def learnt(template: Template, text: RowText) -> list[str]:
    """The text of each run of tokens whose prediction is in the loss: row i stands for token i + 1."""
    assert not text.loss_mask[-1]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], text.loss_mask.astype(int), [0]]))).reshape(-1, 2)
    return [template.tokenizer.decode(text.token_ids[a + 1 : b + 1]) for a, b in edges]


def is_as_transformers_marks_it(template: Template, text: RowText, talk: list[dict], **given: Any) -> bool:
    """Whether a text is `talk` with the loss on exactly the answers among `of` that transformers finds."""
    of = given.pop("of", None)
    found = template.tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True, **given)
    marked = np.array(found["assistant_masks"], dtype=bool)
    if of is not None:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(int), [0]]))).reshape(-1, 2)
        marked = np.zeros_like(marked)
        for start, stop in edges[of]:
            marked[start:stop] = True
    shifted = np.concatenate([marked[1:], [False]])
    return found["input_ids"] == text.token_ids.tolist() and shifted.tolist() == text.loss_mask.tolist()


@pytest.mark.parametrize("talk", [ONE_CALL, PARALLEL, BESIDE], ids=["one call", "parallel calls", "content beside"])
def test_tool_calls_are_learnt_and_their_results_are_not(talk: list[dict]) -> None:
    template = made(shapes.HERMES)
    (text,) = template.render(talk, tools=[TOOL])
    assert is_as_transformers_marks_it(template, text, talk, tools=[TOOL])
    wrong = RowText(text.token_ids, np.concatenate([[False], text.loss_mask[:-1]]))
    assert not is_as_transformers_marks_it(template, wrong, talk, tools=[TOOL])
    assert len(learnt(template, text)) == sum(turn["role"] == "assistant" for turn in talk)
    assert all(piece.endswith("<|im_end|>") for piece in learnt(template, text))


def test_a_developer_is_a_system_turn_where_the_template_does_not_know_the_role() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, user("Rain?"), assistant("Yes.")]
    as_system = [{**turns[0], "role": "system"}, *turns[1:]]
    template = made(shapes.QWEN3)
    (text,) = template.render(turns)
    assert text.token_ids.tolist() == template.render(as_system)[0].token_ids.tolist()
    assert "Be brief." in template.tokenizer.decode(text.token_ids)
    knowing = made("{# user or developer #}" + shapes.EMPTY_BLOCK)
    (text,) = knowing.render(turns)
    assert "developer\nBe brief." in knowing.tokenizer.decode(text.token_ids)


def test_a_call_ends_with_the_token_that_its_template_puts_there() -> None:
    template = made(shapes.LLAMA)
    (text,) = template.render(ONE_CALL, tools=[TOOL])
    assert is_as_transformers_marks_it(template, text, ONE_CALL, tools=[TOOL])
    calling, answering = learnt(template, text)
    assert calling == '{"name": "get_weather", "parameters": {"city": "Bärn \\"old\\"", "days": 3}}<|eom_id|>'
    assert answering == "Yes, rain.<|eot_id|>"


def test_tools_that_stand_before_the_last_question_alone_make_a_sequence_for_each_question() -> None:
    template = made(shapes.MISTRAL)
    first, second = template.render(PARALLEL, tools=[TOOL])
    assert is_as_transformers_marks_it(template, first, PARALLEL[:5], tools=[TOOL])
    assert is_as_transformers_marks_it(template, second, PARALLEL, tools=[TOOL], of=slice(2, 3))
    assert learnt(template, first)[0].count('"Rome"') == 1


@pytest.mark.parametrize(
    ("shape", "talk", "message"),
    [
        ("LLAMA", BESIDE, r"messages\[1\].content: .* leaves it out of this answer beside tool calls.*chat_template"),
        ("LLAMA", PARALLEL, "refuses the conversation: TemplateError: one call at once"),
        ("DEEPSEEK_R1", ONE_CALL, r"messages\[1\].tool_calls: the chat template does not read it.*chat_template"),
    ],
)
def test_a_template_that_loses_a_call_or_what_is_beside_it_is_no_template_for_the_row(
    shape: str, talk: list[dict], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        made(getattr(shapes, shape)).render(talk, tools=[TOOL] if shape == "LLAMA" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("call.function.arguments | tojson", "{} | tojson"), r"tool_calls\[0\]: .* the name of arguments.city"),
        (("{{ call.function.arguments | tojson }}", "{city: '', days: 3"), r"does not render arguments.city: 'Bern'"),
        (("call.function.name", "'x'"), r"does not render the name 'get_weather'"),
        (("m.tool_calls or []", "(m.tool_calls or [])[:1]"), r"messages\[1\].tool_calls\[1\]: "),
        (("+ m.content + '\n</tool_r", "+ '\n</tool_r"), r"messages\[2\]: .* does not render this result of a tool"),
        (("tool | tojson", "''"), r"tools: the chat template does not render the tool 'get_weather'"),
        (("{% if tools %}", "{% if false %}"), "tools: the chat template does not read them"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_render_of_a_call_is_named(change: tuple[str, str], message: str) -> None:
    text = shapes.HERMES.replace(*change)
    if "false" in change[1]:
        text = text.replace("for tool in tools", "for tool in []")
    assert text != shapes.HERMES
    with pytest.raises(DataError, match=message):
        made(text).render(PARALLEL, tools=[TOOL])


def is_what_a_generator_reads_and_writes(
    template: Template, text: RowText, before: list[dict], answers: list[str], **given: Any
) -> bool:
    """Whether the first loss row is the last token of the prompt for `before`, and what is learnt is `answers`."""
    prompt = template.tokenizer.apply_chat_template(before, add_generation_prompt=True, **given)["input_ids"]
    first = int(np.argmax(text.loss_mask)) + 1
    same = text.token_ids[:first].tolist() == prompt == template.render_prompt(before).tolist()
    return same and learnt(template, text) == answers


def test_a_template_that_drops_earlier_reasoning_gives_each_turn_its_own_sequence() -> None:
    template = made(shapes.QWEN3)
    texts = template.render(REASONED)
    assert len(texts) == 2
    for text, index in zip(texts, (1, 3), strict=True):
        turn = REASONED[index]
        answer = f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}<|im_end|>"
        assert is_what_a_generator_reads_and_writes(template, text, REASONED[:index], [answer])
        of = slice(index // 2, index // 2 + 1)
        assert is_as_transformers_marks_it(template, text, REASONED[: index + 1], of=of)
        wrong = RowText(text.token_ids, np.concatenate([[False], text.loss_mask[:-1]]))
        assert not is_what_a_generator_reads_and_writes(template, wrong, REASONED[:index], [answer])
        assert not is_as_transformers_marks_it(template, wrong, REASONED[: index + 1], of=of)
    assert "be kind" in template.tokenizer.decode(texts[1].token_ids)
    assert "spirits" not in template.tokenizer.decode(texts[1].token_ids)


def test_turns_that_later_ones_repeat_stay_in_one_sequence() -> None:
    template = made(shapes.QWEN3)
    steps = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in PARALLEL]
    first, second = template.render(steps, tools=[TOOL])
    assert len(learnt(template, first)) == 2, "the call and the answer after its results"
    assert is_as_transformers_marks_it(template, first, steps[:5], tools=[TOOL])
    assert is_as_transformers_marks_it(template, second, steps, tools=[TOOL], of=slice(2, 3))
    (single,) = template.render(steps[:5], tools=[TOOL])
    assert single.token_ids.tolist() == first.token_ids.tolist()
    assert single.loss_mask.tolist() == first.loss_mask.tolist()


def test_a_single_answer_needs_a_single_sequence_whatever_the_template_rewrites() -> None:
    template = made(shapes.QWEN3)
    (text,) = template.render(REASONED, learnt={3: 1.0})
    assert is_as_transformers_marks_it(template, text, REASONED, of=slice(1, 2))


def test_reasoning_that_the_prompt_begins_is_learnt_behind_it() -> None:
    template = made(shapes.DEEPSEEK_R1)
    for opening in ("<think>\n", "<think>", ""):
        talk = [
            user("1 + 1?"),
            assistant(opening + "add them\n</think>\n\n2"),
            user("2 + 2?"),
            assistant("<think>\nsum</think>4"),
        ]
        first, second = template.render(talk)
        assert is_what_a_generator_reads_and_writes(template, first, talk[:1], ["add them\n</think>\n\n2<|im_end|>"])
        assert is_what_a_generator_reads_and_writes(template, second, talk[:3], ["sum</think>4<|im_end|>"])
        wrong = RowText(second.token_ids, np.concatenate([[False], second.loss_mask[:-1]]))
        assert not is_what_a_generator_reads_and_writes(template, wrong, talk[:3], ["sum</think>4<|im_end|>"])
    with pytest.raises(
        DataError, match=r"messages\[1\]: the prompt of this turn ends with '<think>', which the answer"
    ):
        template.render([user("1 + 1?"), assistant("2")])


def test_an_empty_block_that_only_the_prompt_has_is_read_and_not_learnt() -> None:
    plain = [user("hi"), assistant("<b>one</b>"), user("more"), assistant("two")]
    template = made(shapes.EMPTY_BLOCK, enable_thinking=False)
    for text, index in zip(template.render(plain), (1, 3), strict=True):
        answer = [plain[index]["content"] + "<|im_end|>"]
        assert is_what_a_generator_reads_and_writes(template, text, plain[:index], answer, enable_thinking=False)
        assert "<think>\n\n</think>\n\n" + plain[index]["content"] in template.tokenizer.decode(text.token_ids)
    (whole,) = made(shapes.EMPTY_BLOCK).render(plain)
    assert len(learnt(template, whole)) == 2
    with pytest.raises(DataError, match=r"messages\[1\]: .* an empty <think>, but the answer reasons.*template_arg"):
        made(shapes.QWEN3, enable_thinking=False).render(REASONED)


def test_a_prompt_that_is_another_than_the_answers_beginning_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"messages\[1\]: the chat template is not prefix-stable.*<\|im_end\|>"):
        made(shapes.EMPTY_BLOCK.replace("<think>\n\n</think>\n\n", "<|im_end|>"), enable_thinking=False).render(
            [user("hi"), assistant("a")]
        )
    late = shapes.HERMES.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    )
    with pytest.raises(DataError, match=r"messages\[3\]: the prompt of this turn lacks '<\|im_start\|>assistant'"):
        made(late).render(ONE_CALL, tools=[TOOL])


def test_a_prompt_may_end_with_a_tag_and_a_template_may_need_tools() -> None:
    tagged = shapes.HERMES.replace("<|im_start|>assistant\n", "<assistant>")
    (text,) = made(tagged).render([user("hi"), assistant("one"), user("more"), assistant("two")])
    assert learnt(made(tagged), text) == ["one<|im_end|>", "two<|im_end|>"]
    refusing = "{% if not tools and messages | selectattr('tool_calls', 'defined') | list %}"
    template = made(refusing + "{{ raise_exception('calls of what?') }}{% endif %}" + shapes.HERMES)
    (text,) = template.render(ONE_CALL, tools=[TOOL])
    assert is_as_transformers_marks_it(template, text, ONE_CALL, tools=[TOOL])


def test_reasoning_that_is_read_and_not_written_is_an_error() -> None:
    dropped = shapes.QWEN3.replace("(loop.last or reasoning)", "false")
    with pytest.raises(DataError, match=r"messages\[1\].reasoning_content: the chat template leaves it out"):
        made(dropped).render(REASONED)


def test_too_many_tokens_are_those_of_a_conversation_that_is_one_text() -> None:
    talk = [user("hi"), assistant("one " * 50), user("more"), assistant("two " * 50)]
    with pytest.raises(TooManyTokens):
        made(shapes.HERMES).render(talk, max_tokens=200)
    assert len(made(shapes.QWEN3).render(talk, max_tokens=200)) == 2, "the reader measures each"


def test_each_answer_has_its_weight_in_whichever_sequence_it_is() -> None:
    weights = {1: 0.5, 3: 2.0}
    (text,) = made(shapes.HERMES).render([user("hi"), assistant("one"), user("more"), assistant("two")], learnt=weights)
    changes = text.row_weights[text.loss_mask]
    assert sorted(set(changes.tolist())) == [0.5, 2.0]
    assert (changes == 0.5).sum() == len(made(shapes.HERMES).tokenizer("one<|im_end|>")["input_ids"])
    assert not text.row_weights[~text.loss_mask].any()
    split = made(shapes.QWEN3).render(REASONED, learnt=weights)
    assert [set(text.row_weights[text.loss_mask].tolist()) for text in split] == [{0.5}, {2.0}]
    assert all(text.row_weights is None for text in made(shapes.QWEN3).render(REASONED))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, r"template_arguments.enable_thinkin: .* never reads this variable; did you mean "
                                    r"'enable_thinking'\? \(it reads enable_thinking\)"),
        ({"messages": []}, "template_arguments.messages: cannot be given, since it is what the rows say"),
        ({"tools": []}, "template_arguments.tools: cannot be given"),
        ({"add_generation_prompt": True}, "add_generation_prompt: cannot be given"),
        ({"content": "x"}, "template_arguments.content: the chat template never reads this variable"),
        ({"eos_token": "x"}, "template_arguments.eos_token: cannot be given, since it is the tokenizer's"),
    ],
)  # fmt: skip
def test_template_arguments_are_variables_that_the_template_reads(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(shapes.QWEN3, **arguments)
    with pytest.raises(DataError, match=message.replace("template_arguments", "chat_template_kwargs")):
        made(shapes.QWEN3).render(REASONED, arguments=arguments)


def test_the_arguments_of_a_row_win_over_those_of_the_run() -> None:
    template = made(shapes.QWEN3, enable_thinking=False)
    bare, empty = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    read = lambda **given: template.tokenizer.decode(template.render_prompt([user("hi")], **given))  # noqa: E731
    assert read().endswith(empty)
    assert read(arguments={"enable_thinking": True}).endswith(bare)
    assert read().endswith(empty), "and only for that row"


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": shapes.HERMES}
    template = Template.of(tokenizer)
    (text,) = template.render(ONE_CALL, tools=[TOOL])
    assert is_as_transformers_marks_it(template, text, ONE_CALL, tools=[TOOL])
    plain = ONE_CALL[:1] + ONE_CALL[3:]
    (text,) = template.render(plain)
    assert text.token_ids.tolist() == tokenizer.apply_chat_template(plain)["input_ids"]
    tokenizer.chat_template = template.saved
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    (tmp_path / "own.jinja").write_text(CHATML)
    with pytest.raises(DataError, match="tools: the chat template does not read them"):
        Template.of(tokenizer, tmp_path / "own.jinja").render(ONE_CALL, tools=[TOOL])


words = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(lambda t: t.strip() == t)
values = st.one_of(words, st.integers(-9, 9), st.booleans(), st.none(), st.lists(words, max_size=2))
reasons = st.none() | words.filter(lambda text: "think>" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Questions, each answered after some rounds of calls and their results."""
    talk: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        talk.append(user(draw(words)))
        for _ in range(draw(st.integers(0, 2))):
            calls = [call(n, **{draw(words): draw(values)}) for n in range(draw(st.integers(1, 2)))]
            talk += [assistant(draw(st.just("") | words), *calls), *(result(n, draw(words)) for n in range(len(calls)))]
        talk.append(assistant(draw(words)))
    for turn in talk:
        if turn["role"] == "assistant" and (reason := draw(reasons)) is not None:
            turn["reasoning_content"] = reason
    return talk


SHAPES = {"thinking": made(shapes.QWEN3), "not thinking": made(shapes.QWEN3, enable_thinking=False)}
SHAPES["stable"] = made(shapes.HERMES)


@settings(max_examples=40, deadline=None)
@given(conversations(), st.sampled_from(sorted(SHAPES)))
def test_any_conversation_is_learnt_turn_by_turn_as_it_is_generated(talk: list[dict[str, Any]], shape: str) -> None:
    """Against transformers' prompt and text of each turn by itself."""
    template, options = SHAPES[shape], {"tools": [TOOL], **SHAPES[shape].arguments}
    if shape != "thinking":
        talk = [{name: value for name, value in turn.items() if name != "reasoning_content"} for turn in talk]
    render = template.tokenizer.apply_chat_template
    learnt_at: list[tuple[list[int], list[int]]] = []
    texts = template.render(talk, tools=[TOOL])
    for text in texts:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], text.loss_mask.astype(int), [0]]))).reshape(-1, 2)
        ids = text.token_ids.tolist()
        learnt_at += [(ids[: a + 1], ids[a + 1 : b + 1]) for a, b in edges]
    answers = [index for index, turn in enumerate(talk) if turn["role"] == "assistant"]
    assert len(learnt_at) == len(answers)
    for (before, answer), index in zip(learnt_at, answers, strict=True):
        assert before == render(talk[:index], add_generation_prompt=True, **options)["input_ids"]
        whole = render(talk[: index + 1], **options)["input_ids"]
        assert answer == whole[len(before) : len(before) + len(answer)]
        assert template.tokenizer.decode(whole[len(before) + len(answer) :]) == "\n"
    if shape == "stable":
        assert len(texts) == 1
        assert is_as_transformers_marks_it(template, texts[0], talk, tools=[TOOL])

"""Loss masks: exactly the answers and their end of turn, by an oracle that concatenates what each turn must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trainer.data.chat import Template
from trainer.errors import ConfigError, DataError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']"
    " | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DROPS_EARLIER_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a still?"},
    {"role": "assistant", "content": "A vessel for spirits, drop by drop."},
    {"role": "user", "content": "Thanks, naïve 你好 👩‍🚀?"},
    {"role": "assistant", "content": "Grüezi 🇨🇭, and\nwelcome."},
]


def template(text: str | None = CHATML, specials: tuple[str, ...] = ()) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = text
    return Template.of(tokenizer)


def one(made: Template, talk: list[dict], **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a conversation that is a single text."""
    (text,) = made.render(talk, **options)
    assert text.row_weights is None
    return text.token_ids, text.loss_mask


def learnt(made: Template, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each run of tokens whose prediction is in the loss: row i stands for token i + 1."""
    assert len(ids) == len(mask)
    assert not mask[-1]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
    return [made.tokenizer.decode(ids[a + 1 : b + 1]) for a, b in edges]


def test_the_loss_holds_the_assistant_turns_of_a_chatml_conversation_and_nothing_else() -> None:
    made = template()
    ids, mask = one(made, TALK)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert made.tokenizer.decode(ids) == whole
    assert ids.tolist() == made.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert learnt(made, ids, mask) == [TALK[2]["content"] + "<|im_end|>", TALK[4]["content"] + "<|im_end|>"]
    shifted_wrongly = np.concatenate([[False], mask[:-1]])
    assert learnt(made, ids, shifted_wrongly)[0] != TALK[2]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "end", "specials"),
    [
        (SMOLLM2, "<|im_end|>", ()),
        (LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
        (GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    ],
    ids=["smollm2", "llama3", "gemma"],
)
def test_other_families_are_masked_alike_and_trim_is_respected(text: str, end: str, specials: tuple[str, ...]) -> None:
    made = template(text, specials)
    talk = [dict(turn) for turn in TALK[1:]]
    if text is not SMOLLM2:
        talk[1]["content"] = talk[1]["content"] + "  \n"  # these templates trim
    ids, mask = one(made, talk)
    assert learnt(made, ids, mask) == [TALK[2]["content"] + end, TALK[4]["content"] + end]
    assert made.end_of_turn_ids == (made.tokenizer.convert_tokens_to_ids(end),)
    assert ids.tolist() == made.tokenizer.apply_chat_template(talk)["input_ids"]


def test_a_default_system_turn_appears_once_and_only_without_one() -> None:
    made = template(SMOLLM2)
    for talk in (TALK, TALK[1:]):
        ids, mask = one(made, talk)
        assert made.tokenizer.decode(ids).count("<|im_start|>system") == 1
        assert len(learnt(made, ids, mask)) == 2


def test_a_prompt_is_exactly_what_precedes_its_answer() -> None:
    made = template(SMOLLM2)
    ids, mask = one(made, TALK[:3])
    first = int(np.argmax(mask)) + 1
    assert made.render_prompt(TALK[:2]).tolist() == ids[:first].tolist()


def test_assistant_turns_of_the_prompt_are_context() -> None:
    made = template()
    assert learnt(made, *one(made, TALK, learnt={4: 1.0})) == [TALK[4]["content"] + "<|im_end|>"]


def test_a_turn_marked_as_context_is_read_and_not_learnt() -> None:
    made = template()
    ids, mask = one(made, TALK, learnt={4: 1.0})
    assert ids.tolist() == one(made, TALK)[0].tolist()
    assert learnt(made, ids, mask) == [TALK[4]["content"] + "<|im_end|>"]


def test_an_eos_that_only_ends_the_text_is_not_learnt() -> None:
    made = template(PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"))
    assert learnt(made, *one(made, TALK))[0] == TALK[2]["content"] + "<|end|>"


def test_a_template_that_writes_into_the_last_turn_alone_gives_each_turn_its_own_text() -> None:
    made = template(DROPS_EARLIER_THINKING)
    texts = made.render(TALK)
    assert [learnt(made, text.token_ids, text.loss_mask) for text in texts] == [
        ["<think>\n\n</think>\n\n" + TALK[index]["content"] + "<|im_end|>"] for index in (2, 4)
    ]
    for text, index in zip(texts, (2, 4), strict=True):
        assert text.token_ids.tolist() == made.tokenizer.apply_chat_template(TALK[: index + 1])["input_ids"]
        first = int(np.argmax(text.loss_mask)) + 1
        assert made.render_prompt(TALK[:index]).tolist() == text.token_ids[:first].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHATML.split("{% if add_generation_prompt")[0], "ignores add_generation_prompt"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", "no special token behind an answer"),
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", "leaves out the content"),
        (None, "no chat template"),
    ],
)  # fmt: skip
def test_templates_no_student_could_learn_from_are_refused(text: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template(text).render(TALK)


def test_a_template_that_changes_the_answer_is_refused() -> None:
    changing = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    talk = [TALK[1], {"role": "assistant", "content": "let me see</think>42"}]
    with pytest.raises(ConfigError, match=r"messages\[1\].*does not render this answer as it stands"):
        template(changing).render(talk)


@pytest.mark.parametrize(
    "cut",
    [
        "m['content'][:6]",
        "m['content'][6:]",
        "'' if loop.first else m['content']",
        "m['content'].split('</think>')[-1]",
    ],
)
def test_a_template_that_cuts_a_user_turn_is_refused(cut: str) -> None:
    asks = ("let me think</think>what is this?", "and that, as asked before?")
    talk = [{"role": role, "content": text} for ask in asks for role, text in (("user", ask), ("assistant", "a fox"))]
    written = f"({cut}) if m['role'] == 'user' else m['content']"
    changed = template(CHATML.replace("m['content']", f"({written})"))
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves out the user turn, or a part of it"):
        changed.render(talk)
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves out"):
        changed.render_prompt(talk[:3])
    trims = template(CHATML.replace("m['content']", "(m['content'] | trim | replace('  ', ' '))"))
    spaced = [talk[0] | {"content": f"  {asks[0]}  again\n"}, talk[1]]
    assert trims.render(spaced)[0].loss_mask.any()


def test_a_user_turn_that_stands_in_another_turn_alone_is_missed() -> None:
    """Each is looked for behind the one before it."""
    once = "'' if m['role'] == 'user' and loop.index0 == 2 else m['content']"
    talk = [{"role": role, "content": text} for role, text in (("user", "go on"), ("assistant", "a fox")) * 2]
    with pytest.raises(DataError, match=r"messages\[2\]: the chat template leaves out the user turn"):
        template(CHATML.replace("m['content']", f"({once})")).render(talk)


def test_a_template_that_raises_or_is_broken_says_so() -> None:
    with pytest.raises(DataError, match="System role not supported"):
        template(GEMMA, ("<start_of_turn>", "<end_of_turn>")).render(TALK)
    with pytest.raises(ConfigError, match="no jinja template: line 2"):  # no row is to blame
        template("{% for m in messages %}\n{{ m['content' }}").render(TALK)


def test_an_answer_that_merges_with_its_header_is_refused() -> None:
    made = template(CHATML.replace("assistant\n'", "assistant: br'").replace("m['role'] + '\n'", "m['role'] + ': br'"))
    assert learnt(made, *one(made, [TALK[1], {"role": "assistant", "content": "? yes"}])) == ["? yes<|im_end|>"]
    with pytest.raises(DataError, match=r"'own fox.*merges into one token"):
        one(made, [TALK[1], {"role": "assistant", "content": "own fox"}])


def test_a_named_template_wins_and_a_missing_one_is_an_error(tmp_path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(SMOLLM2)
    assert Template.of(tiny_tokenizer(), path).text == SMOLLM2
    assert Template.of(tiny_tokenizer()).text == CHATML
    with pytest.raises(ConfigError, match=r"teacher.chat_template: cannot read .*nowhere"):
        Template.of(tiny_tokenizer(), tmp_path / "nowhere.jinja")


def test_a_template_that_prints_the_date_renders_the_same_every_day() -> None:
    made = template("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert made.tokenizer.decode(made.render_prompt(TALK[:2])).startswith("26 Jul 2024")


def test_a_tokenizer_that_treats_the_beginning_of_a_text_specially_is_masked_alike() -> None:
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    core.train_from_iterator([t["content"] for t in TALK] * 9, trainers.BpeTrainer(special_tokens=specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    made = Template.of(tokenizer)
    ids, mask = one(made, TALK[1:])
    assert ids.tolist() == tokenizer.apply_chat_template(TALK[1:])["input_ids"]
    pieces = [tokenizer.tokenize(f" {TALK[i]['content']}</s>") for i in (2, 4)]
    assert sum(mask) == sum(len(piece) for piece in pieces)
    assert [text.split()[0] for text in learnt(made, ids, mask)] == ["A", "Grüezi"]
    assert all(text.endswith("</s>") for text in learnt(made, ids, mask))


def test_text_pairs_learn_the_completion_and_an_eos() -> None:
    made = template(None)
    ids, mask = made.render_text("the quick brown", " fox jumps")
    assert made.tokenizer.decode(ids) == "the quick brown fox jumps<|im_end|>"
    assert learnt(made, ids, mask) == [" fox jumps<|im_end|>"]
    prompt, none = made.render_text("the quick brown", None)
    assert none is None
    assert prompt.tolist() == ids[: len(prompt)].tolist()
    assert made.end_of_turn_ids == (2,)


def test_a_text_prompt_that_ends_inside_a_token_is_refused() -> None:
    made = template(None)
    with pytest.raises(DataError, match="merges into one token"):
        made.render_text("the quick br", "own fox")


def test_a_corpus_learns_every_token_but_the_first() -> None:
    made = template(None)
    ids, mask = made.render_corpus("drop by drop")
    assert mask.tolist() == [True] * (len(ids) - 1) + [False]
    assert made.tokenizer.decode(ids) == "drop by drop<|im_end|>"


def test_a_bos_of_the_tokenizer_comes_first() -> None:
    made = template(None)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    ids, mask = made.render_text("the quick", " fox")
    assert ids[0] == 1
    assert learnt(made, ids, mask) == [" fox<|im_end|>"]
    assert made.render_corpus("the")[1].sum() == len(made.render_corpus("the")[0]) - 1


words = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=30).filter(lambda t: t.strip())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.none() | words)
def test_any_conversation_is_masked_as_its_turns_say(pairs: list[tuple[str, str]], system: str | None) -> None:
    made = MADE
    talk = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, mask = one(made, talk)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk)
    assert ids.tolist() == made.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert "".join(learnt(made, ids, mask)) == "".join(answer + "<|im_end|>" for _, answer in pairs)
    last = int(np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)[-1])
    assert made.render_prompt(talk[:-1]).tolist() == ids[: last + 1].tolist()


MADE = template()


def test_writing_ends_with_a_turn_or_with_a_text() -> None:
    """A base model's tokenizer may have a chat template whose end of turn is not its eos."""
    made = Template.of(tiny_tokenizer())
    assert made.stop_ids == made.end_of_turn_ids == (2,)
    made.tokenizer.eos_token = "<pad>"
    assert made.stop_ids == (2, 0)

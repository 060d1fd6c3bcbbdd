"""Tokenizers that cut text differently, trained in code: byte-level BPE and sentencepiece with byte fallback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tiny_models import CHATML, tiny_model
from tiny_runs import tiny_run
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HUMAN = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
"""A chat template that looks nothing like ChatML."""

_TEXT = [
    "the quick brown fox jumps over the lazy dog while the teacher reads what the student wrote",
    "a still turns a large wash into a small clear spirit, drop by drop",
    "in 2024 there were 365 days and 1234567890 drops, 100 200 300 123 456 789 a day",
    "Zürich, naïve, Привет, 中文字符, 日本語",
]

ADVERSARIAL = (
    "the quick brown fox",
    " leading and  two  spaces",
    "  two leading spaces",
    "tabs\t\tand\nlines\r\n\n end ",
    "12 345 6789 2024-07-26 3.14159",
    "👩‍🚀🇨🇭 flags, 👍🏽 skin",
    "中文字符 日本語 한국어",
    "e\u0301 is é, not e; ﬁ Ⅳ",
    "a </s> b <|im_end|> c <pad> d",
    "zero\u200bwidth\u00a0space \ufeff",
    "x",
)


@cache
def digits_apart() -> PreTrainedTokenizerFast:
    """Byte-level BPE of few merges, every digit a token, `<|im_end|>` and ChatML-like ends."""
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _byte_level(pre_tokenizers.Sequence(splits), size=420, specials=("<pad>", "<|im_start|>", "<|im_end|>"))


@cache
def digits_in_threes(size: int = 520) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose numbers are cut in threes, other ids, and `</s>` as its end."""
    threes = pre_tokenizers.Split(Regex(r"\d{1,3}"), behavior="isolated")
    splits = [threes, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made = _byte_level(pre_tokenizers.Sequence(splits), size=size, specials=("<s>", "</s>", "<pad>"))
    made.chat_template = HUMAN
    return made


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE over characters, U+2581 for spaces, bytes for what it has no character for."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=8
    )
    core.train_from_iterator([text.replace("中文", "") for text in _TEXT] * 10, trainer)
    vocabulary = core.get_vocab()
    core.add_tokens([AddedToken(byte, normalized=False, special=False) for byte in bytes_])
    return _with_fallback(core, vocabulary, bytes_)


def _with_fallback(core: Tokenizer, vocabulary: dict[str, int], bytes_: list[str]) -> PreTrainedTokenizerFast:
    """The bytes in the model's own vocabulary, as sentencepiece has them, and not as added tokens."""
    content = json.loads(core.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    content["model"]["vocab"] = vocabulary | {b: len(vocabulary) + n for n, b in enumerate(bytes_)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = HUMAN
    return made


def _byte_level(
    splits: pre_tokenizers.PreTokenizer, *, size: int, specials: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = splits, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXT * (size // 10), trainer)
    end = next(token for token in specials if token in ("</s>", "<|im_end|>"))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[1], eos_token=end, pad_token="<pad>")
    made.chat_template = CHATML
    return made


METHODS: dict[str, dict[str, Any]] = {
    "overlap": {"align": {"kind": "overlap", "min_ratio": 0.05}},
    "overlap-hidden": {"align": {"kind": "overlap", "min_ratio": 0.05}, "labels": {"kind": "hidden"}},
    "chunks": {"align": "chunks", "labels": {"kind": "token"}, "objective": [{"loss": "chunk_kl"}]},
    "uld": {
        "align": "uld",
        "labels": {"kind": "hidden"},
        "objective": [{"loss": "uld"}, {"loss": "cross_entropy", "weight": 0.5}],
    },
}
"""Changes of a run whose student has another tokenizer; the tiny vocabularies share few words."""


def run_across(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A tiny run in one process, whose student reads by `digits_in_threes` and its own template."""
    config = tiny_run(folder, {"runtime": "in_process", "student": {"ranks": 1}, **changes})
    yaml = YAML(typ="safe")
    run = yaml.load(config.read_text())
    run["labels"] = changes.get("labels", {"kind": "topk", "k": 16})  # instead of the base's, not laid over it
    with config.open("w") as file:
        yaml.dump(run, file)
    shutil.rmtree(folder / "student")
    tiny_model(seed=2, num_hidden_layers=1, vocab_size=448).save_pretrained(folder / "student")
    digits_in_threes().save_pretrained(folder / "student")
    return config

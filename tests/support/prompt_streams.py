"""Streams of prompts over a tiny tokenizer."""

from __future__ import annotations

from tiny_models import tiny_tokenizer

from configs.prompts import Data, Dataset
from trainer.data.chat import Template
from trainer.data.prompt_reader import PromptReader, ToWrite
from trainer.data.prompts import PromptStream
from trainer.data.vocabulary import SharedVocabulary, fingerprint
from trainer.types import Prompt

TOKENIZER = tiny_tokenizer()
TEMPLATE = Template.of(TOKENIZER)
VOCABULARY = SharedVocabulary(
    size=len(TOKENIZER), fingerprint=fingerprint(TOKENIZER), teacher_rows=320, student_rows=320
)
BAD = {"messages": [{"role": "user", "content": "alone"}]}


def talk(number: int, words: int = 1) -> dict:
    question = {"role": "user", "content": f"question {number}?"}
    return {"messages": [question, {"role": "assistant", "content": f"answer {number}" + " drop" * (words - 1)}]}


def open_stream(dataset: Dataset, *, seed: int = 5, to_write: ToWrite | None = None, **options: object) -> PromptStream:
    of_stream = {name: options.pop(name) for name in ("quarantine", "num_epochs") if name in options}
    reader = open_reader(dataset, data=Data(**options), to_write=to_write)
    return PromptStream(reader, seed=seed, **of_stream)


def open_reader(dataset: Dataset, **options: object) -> PromptReader:
    given = {"template": TEMPLATE, "vocabulary": VOCABULARY, **options}
    return PromptReader.open(dataset, **given)


def same(first: list[Prompt], second: list[Prompt]) -> bool:
    one, other = ([(p.id, p.token_ids.tolist(), p.origin) for p in prompts] for prompts in (first, second))
    return one == other

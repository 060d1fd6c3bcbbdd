"""Let a teacher write the missing answers of a jsonl file of chat prompts, in place.

A file because shipped answers must be reproducible: the rows of configs/data were filled by it (configs/data/README.md
has the commands). Rows are `{"prompt": [...], "completion": [...] or null}`; rows with a completion are left alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from cluster.engines.plan import EnginePlan
from cluster.runtime import CPU, GENERATOR, environment
from configs.models import ModelSource
from trainer.types import GenerationRequest, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.protocols import GeneratingEngine

BATCH = 32  # rows in flight, and between two lines of progress
DEADLINE_S = 3600.0


def fill_answers(
    rows_file: Path,
    teacher: Path,
    *,
    max_new_tokens: int = 140,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    leave_every: int = 0,
) -> int:
    """Write an answer for every row without one and return how many were written; the file is replaced at the end.

    Runs one vLLM engine in float32 on the host. A row's draw depends on `seed` and its position only. `leave_every=8`
    leaves rows 7, 15, ... (from 0) without an answer, for runs that let the teacher write during training. An
    answer that reaches `max_new_tokens` is cut after its last whole sentence or line.
    """
    from transformers import AutoTokenizer

    from trainer.model.generation_settings import end_ids

    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    wanted = [i for i, row in enumerate(rows) if not row.get("completion") and not _is_left(i, leave_every)]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ends = tuple(dict.fromkeys([tokenizer.eos_token_id, *end_ids(ModelSource(path=str(teacher)))]))
    sampling = Sampling(max_new_tokens, temperature, top_p, stop_token_ids=ends, seed=seed)
    engine = _start_generator(teacher, tokenizer)
    try:
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            requests = [_request(tokenizer, rows[i]["prompt"], i, sampling) for i in batch]
            for i, text in zip(batch, _answers(engine, tokenizer, requests), strict=True):
                rows[i] = {"prompt": rows[i]["prompt"], "completion": [{"role": "assistant", "content": text}]}
            typer.echo(f"{start + len(batch)} of {len(wanted)} answers")
    finally:
        engine.close()
    rows = [{"prompt": row["prompt"], "completion": row.get("completion")} for row in rows]
    temporary = rows_file.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(rows_file)
    return len(wanted)


def whole_sentences(text: str) -> str:
    """Text that was cut at a token limit, up to its last sentence end or line end; all of it where there is none."""
    sentence = r"(?<![\s\d][0-9])(?<!^[0-9])[.!?][\"')*]*(?=\s)"  # but not the dot of "2. Second point"
    ends = [match.end() for match in re.finditer(sentence, text)]
    ends += [match.start() for match in re.finditer(r"(?<=\S)\n", text)]
    return text[: max(ends)] if ends else text


def _is_left(row: int, leave_every: int) -> bool:
    return leave_every > 0 and row % leave_every == leave_every - 1


def _request(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], row: int, sampling: Sampling
) -> GenerationRequest:
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return GenerationRequest(f"0:{row}", np.asarray(ids, dtype=np.int32), sampling, origin=f"row {row}")


def _answers(
    engine: GeneratingEngine, tokenizer: PreTrainedTokenizerBase, requests: Sequence[GenerationRequest]
) -> list[str]:
    texts = []
    for completion in asyncio.run(engine.generate(requests, deadline_s=DEADLINE_S)):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        texts.append(text if completion.finish_reason == "stop" else whole_sentences(text))
    return texts


def _start_generator(teacher: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    os.environ.update(environment(GENERATOR, CPU, offline=True))  # before vLLM is imported
    from cluster.engines.vllm import Engine

    # A batch is read whole: on hosts vLLM cannot rewind the generator of a seeded request that it reads in two parts.
    engine, max_length, dtype = Engine(max_num_batched_tokens=4096), 1024, "float32"
    arguments = engine.arguments(
        role=GENERATOR, dtype=dtype, tensor_parallel_size=1, max_length=max_length, accelerator=CPU
    )
    plan = EnginePlan(
        role=GENERATOR,
        engine=engine,
        model=str(teacher),
        revision=None,
        trust_remote_code=False,
        dtype=dtype,
        device_type=CPU,
        tensor_parallel_size=1,
        max_length=max_length,
        arguments=arguments,
        environment={},
        teacher=teacher.name,
        weights_version="0",
        tokenizer_fingerprint="",
        vocabulary_size=len(tokenizer),
    )
    return engine.start_generator(plan, "answers")


def main(
    rows_file: Annotated[Path, typer.Argument(metavar="ROWS", help="jsonl file, changed in place.")],
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Model folder of the generator.")],
    leave_every: Annotated[int, typer.Option(help="Leave every n-th row without an answer; 0: none.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 140,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option()] = 0.9,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Let TEACHER write the answers that ROWS lacks."""
    written = fill_answers(
        rows_file,
        teacher,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        leave_every=leave_every,
    )
    typer.echo(f"{written} answers written to {rows_file}")


if __name__ == "__main__":
    typer.run(main)

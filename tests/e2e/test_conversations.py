"""Conversations whose earlier turns the template rewrites, and tool calls, through the real command.

The oracle is a run on plain text: what a generator reads before each answer, by transformers, and the answer behind it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chat_templates as shapes
import pytest
import torch
from chat_templates import REASONED, assistant, result, user
from safetensors.torch import load_file
from tiny_models import tiny_folder, tiny_tokenizer
from tiny_runs import records, stillhouse, tiny_run, write_rows

from cluster.runtime import environment
from trainer.data.chat import Template

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": place}}} for place in ("Bern", "Rome")]
TOOLS = [
    user("Rain?"),
    assistant("I look.", *CALLS, reasoning_content="both"),
    result(1, "rain"),
    result(2, "sun"),
    assistant("In Bern.", reasoning_content="so it is"),
    user("thanks"),
    assistant("sure"),
]
BRIEF: dict[str, Any] = {
    "runtime": "in_process",
    "student": {"ranks": 1},
    "optimizer": {"warmup_steps": 0},
    "data": {"max_length": 512, "shuffle": False, "special_tokens_in_text": "allow"},
    "training": {"steps": 4, "micro_batch_tokens": 1024, "depth": 0},
}


CHAT = """
import json, sys
from vllm import LLM, SamplingParams
given = json.load(open(sys.argv[1]))
llm = LLM(
    given["model"], dtype="float32", enforce_eager=True, disable_log_stats=True, kv_cache_memory_bytes=2**25,
    max_model_len=512, max_num_batched_tokens=512, max_num_seqs=4,
)
for one in given["chats"]:
    (answer,) = llm.chat(
        one["messages"], SamplingParams(max_tokens=1), chat_template=one["template"], tools=one["tools"],
        chat_template_kwargs=one["arguments"], use_tqdm=False,
    )
    print("PROMPT", json.dumps(list(answer.prompt_token_ids)))
"""


def test_a_prompt_is_what_vllm_reads_when_it_is_asked_with_the_same_messages(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "teacher")
    asked = [
        (shapes.HERMES, TOOLS[:4], [LOOK], {}),
        (shapes.QWEN3, TOOLS[:6], [LOOK], {"enable_thinking": False}),
        (shapes.QWEN3, REASONED[:3], None, {}),
        (shapes.DEEPSEEK_R1, [user("1 + 1?"), assistant("<think>hm</think>2"), user("and?")], None, {}),
    ]
    chats = [dict(zip(("template", "messages", "tools", "arguments"), one, strict=True)) for one in asked]
    (tmp_path / "asked.json").write_text(json.dumps({"model": str(folder), "chats": chats}))
    changed = {**os.environ, **environment("scorer", "cpu")}
    ran = subprocess.run(
        [sys.executable, "-c", CHAT, str(tmp_path / "asked.json")],
        capture_output=True, text=True, timeout=600, env=changed, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    read = [json.loads(line.partition(" ")[2]) for line in ran.stdout.splitlines() if line.startswith("PROMPT")]
    assert len(read) == len(chats)
    for ids, one in zip(read, chats, strict=True):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = one["template"]
        template = Template.of(tokenizer).given(one["arguments"])
        if one["template"] == shapes.HERMES:  # which has no place for reasoning
            one["messages"] = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in one["messages"]]
        assert template.render_prompt(one["messages"], tools=one["tools"]).tolist() == ids
        assert template.render_prompt(one["messages"][:1]).tolist() != ids


def turns_as_text(talk: list[dict[str, Any]], weights: dict[int, float], **given: Any) -> list[dict[str, Any]]:
    """A row of plain text for each answer. The eos that is put behind a completion is the template's end of turn."""
    tokenizer = tiny_tokenizer()
    rows = []
    for index, turn in enumerate(talk):
        if turn["role"] == "assistant":
            given |= {"chat_template": shapes.QWEN3, "tokenize": False}
            prompt = tokenizer.apply_chat_template(talk[:index], add_generation_prompt=True, **given)
            whole = tokenizer.apply_chat_template(talk[: index + 1], **given)
            answer = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
            assert whole == prompt + answer + "<|im_end|>\n"
            rows.append({"prompt": prompt, "completion": answer, "weight": weights.get(index, 1.0)})
    return rows


def trained(folder: Path, rows: list[dict[str, Any]], *, per_step: int) -> tuple[list[float], list[float], Path]:
    """Loss and number of loss tokens of each step, and the student."""
    changes = {**BRIEF, "training": {**BRIEF["training"], "sequences_per_step": per_step}}
    config = tiny_run(folder, {**changes, "teacher": {"chat_template": str(folder / "chat.jinja")}})
    (folder / "chat.jinja").write_text(shapes.QWEN3)
    write_rows(folder / "train.jsonl", rows)
    ran = stillhouse("train", str(config))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = records(folder / "run", "step")
    losses, tokens = ([step[f"train/{name}"] for step in steps] for name in ("loss", "loss_tokens"))
    assert ("conversations became" in ran.stdout + ran.stderr) == ("messages" in rows[0])
    return losses, tokens, folder / "run" / "student" / "model.safetensors"


def test_a_run_on_conversations_is_one_on_what_a_generator_reads_before_each_answer(tmp_path: Path) -> None:
    weights = {1: 0.5}
    weighted = [
        {**turn, **({"weight": weights[index]} if index in weights else {})} for index, turn in enumerate(TOOLS)
    ]
    conversations = [{"messages": REASONED}, {"messages": weighted, "tools": [LOOK]}]
    texts = [*turns_as_text(REASONED, {}), *turns_as_text(TOOLS, weights, tools=[LOOK])]
    assert len(texts) == 5
    losses, tokens, student = trained(tmp_path / "conversations", conversations, per_step=2)
    expected, same_tokens, oracle = trained(tmp_path / "texts", texts, per_step=5)
    assert tokens == same_tokens
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    start = load_file(tmp_path / "texts" / "student" / "model.safetensors")
    ours, theirs = (
        torch.cat([(weight - start[name]).flatten() for name, weight in load_file(file).items()])
        for file in (student, oracle)
    )
    assert (ours - theirs).norm() < 0.005 * theirs.norm(), "they moved the same way, but for rounding"

    unweighted = [{**row, "weight": 1.0} for row in texts]
    others, _, _ = trained(tmp_path / "unweighted", unweighted, per_step=5)
    assert others[0] != pytest.approx(losses[0], rel=1e-2), "the weight is seen"

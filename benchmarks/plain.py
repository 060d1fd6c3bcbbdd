"""The plain recipe of distillation, as anyone writes it: teacher and student of transformers in one process.

Full-vocabulary forward KL on padded batches, float32 log-softmax, fused AdamW. Run as a worker of the benchmark; it
shares no code with the pipeline it is compared with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.cpu_time import CpuTime, of_this_process

TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc gives each large tensor back to the kernel otherwise, and pays for it in page faults."""


@dataclass(frozen=True, slots=True)
class PlainSetup:
    teacher: Path
    student: Path
    dtype: str
    device_type: str
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence; `loss_mask[i]` says whether the prediction of token i + 1 counts."""

    token_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L]


@dataclass(frozen=True, slots=True)
class PlainSteps:
    """A question: train these batches, one step each."""

    batches: tuple[tuple[Text, ...], ...]
    threads: int


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    cpu: CpuTime
    losses: tuple[float, ...]  # mean forward KL per loss token, by step


def prepare(setup: PlainSetup) -> Callable[[PlainSteps], PlainAnswer]:
    device, dtype = torch.device(setup.device_type), getattr(torch, setup.dtype)
    teacher = AutoModelForCausalLM.from_pretrained(setup.teacher, dtype=dtype, use_safetensors=True).to(device).eval()
    student = AutoModelForCausalLM.from_pretrained(setup.student, dtype=dtype, use_safetensors=True).to(device).train()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=setup.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def step(batch: Sequence[Text]) -> float:
        longest = max(len(text.token_ids) for text in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        attended, counted = torch.zeros_like(ids), torch.zeros(len(batch), longest)
        for row, text in enumerate(batch):
            length = len(text.token_ids)
            ids[row, :length] = torch.from_numpy(text.token_ids)
            attended[row, :length] = 1
            counted[row, :length] = torch.from_numpy(text.loss_mask)
        ids, attended, counted = ids.to(device), attended.to(device), counted.to(device)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, attention_mask=attended).logits
        logits = student(input_ids=ids, attention_mask=attended).logits
        kl = F.kl_div(
            F.log_softmax(logits.float(), dim=-1),
            F.log_softmax(wanted.float(), dim=-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        loss = (kl * counted).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def answer(question: PlainSteps) -> PlainAnswer:
        torch.set_num_threads(question.threads)
        before = of_this_process()
        losses = tuple(step(batch) for batch in question.batches)
        cpu = of_this_process() - before
        _give_memory_back()
        return PlainAnswer(cpu, losses)

    return answer


def _give_memory_back() -> None:
    """While the others have their turn, an allocator told to keep its memory would leave them too little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)

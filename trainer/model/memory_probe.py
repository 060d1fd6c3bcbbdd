"""What one forward and backward pass through a student's body holds in memory, seen by running transformers' own code
without weights.

Formulas of activations hold for the architectures that somebody wrote them down for. So the model is built on the meta
device, where tensors have a size and no numbers, a micro-batch goes through it and back, and every storage is counted
from where it is made to where it is dropped: casts of norms, copies of rotary embeddings, what activation checkpointing
keeps, what frozen weights spare. The head is not run: its loss works in chunks and is counted by formula.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from configs.models import EVERYTHING, ModelSource, Trained
from trainer.model.attention import Borders, LayerMask, layer_mask, told
from trainer.model.load import build_on_meta
from trainer.model.sizes import PassMemory
from trainer.model.trained import choose_trained

_PROBE = "stillhouse_memory_probe"


def pass_memory(
    source: ModelSource,
    config: Any,
    *,
    tokens: int,
    longest: int,
    dtype: torch.dtype,
    trained: Trained = EVERYTHING,
    activation_checkpointing: bool = False,
    copies_output: bool = True,
    keeps_states: bool = False,
) -> PassMemory | None:
    """Of sequences of `longest` tokens packed into one row of `tokens`; None where the body cannot be run without
    numbers, as with experts that are chosen by them, or does not take this attention. `copies_output`: the attention
    joins the outputs of sequences; `keeps_states`: the states after all layers are asked for, as terms on them do."""
    options = {"dtype": dtype, "attn_implementation": _PROBE}
    try:
        causal = build_on_meta(source, copy.deepcopy(config), role="student.model", **options)
        if not causal._supports_attention_backend:  # as a student it is refused, and Mamba's scan would take minutes
            return None
        with torch.device("meta"):
            choose_trained(causal, trained, revision=None)
        if activation_checkpointing:
            causal.gradient_checkpointing_enable({"use_reentrant": False})
        causal.train()
        lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
        asked = {"output_hidden_states": True} if keeps_states else {}
        return _run(causal.base_model, tokens, lengths, asked, copies_output=copies_output)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None


def _run(
    body: torch.nn.Module, tokens: int, lengths: list[int], asked: dict[str, bool], *, copies_output: bool
) -> PassMemory:
    for parameter in body.parameters():
        if parameter.requires_grad:  # ZeRO takes each gradient as soon as it is made
            parameter.register_post_accumulate_grad_hook(_drop)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    places = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    counter = _LiveBytes(own=[*body.parameters(), *body.buffers(), ids, places])
    with _probing(_Probe(lengths, copies_output)), told(Borders()), counter:
        # A cache, because without one the masks look for borders in the position ids, which have no values here.
        found = body(input_ids=ids, position_ids=places, past_key_values=_Empty(), use_cache=True, **asked)
        saved, hidden = counter.now, found.last_hidden_state
        del found
        hidden.backward(torch.empty_like(hidden))
    return PassMemory(tokens, saved, counter.most)


def _drop(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still held."""

    def __init__(self, own: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes


class _Empty(DynamicCache):
    """Keeps nothing."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


@dataclass(frozen=True, slots=True)
class _Probe:
    lengths: list[int]
    copies_output: bool


_running: list[_Probe] = []


@contextmanager
def _probing(probe: _Probe) -> Iterator[None]:
    _running.append(probe)
    try:
        yield
    finally:
        _running.pop()


class _Kernel(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output, and a number per head and query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _SoftCapped(torch.autograd.Function):
    """Without a fused kernel the scores of each sequence are kept, as `_attend_soft_capped` makes them: capped, as
    weights in float32, and those again where the model computes in another dtype."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        dtypes = [query.dtype, torch.float32] + ([query.dtype] if query.dtype is not torch.float32 else [])
        scores = [
            query.new_empty(query.shape[1], length, length, dtype=dtype)
            for length in _running[-1].lengths
            for dtype in dtypes
        ]
        ctx.save_for_backward(query, key, value, out, *scores)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    *,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The contract of transformers' attention functions."""
    out = (_Kernel if softcap is None else _SoftCapped).apply(query, key, value)
    return (out.clone() if _running[-1].copies_output else out), None


AttentionInterface.register(_PROBE, _attend)
AttentionMaskInterface.register(_PROBE, layer_mask)

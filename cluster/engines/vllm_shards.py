"""Labels of a teacher in tensor-parallel shards: each sends what it keeps of its part of the vocabulary, and not all of
its logits. Imported inside vLLM's workers.

    every rank:  hidden -> compute_logits without its gather -> [n, V / ranks] -> encode_shard -> [n, width] --gather-->
    rank 0:      merge_shards -> columns                                   2 k + 2 numbers a row and rank, instead of V

What a model does to logits beside the product (soft caps, scales) is element-wise and happens on each shard. A model
that does more, such as mask some ids, is found out by comparing both ways once: its logits are gathered as vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_gather,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from trainer.labels.encoding import Encoding

logger = init_logger(f"vllm.{__name__}")


class Shards:
    """The shard of the vocabulary whose logits this rank computes. Not a module: it refers to the one that holds it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._usable: bool | None = None  # not known before the first rows

    def columns(
        self,
        encoding: Encoding,
        hidden: torch.Tensor,
        target_ids: torch.Tensor,
        extra: dict[str, torch.Tensor],
        vocabulary_size: int,
    ) -> dict[str, torch.Tensor] | None:
        """What `encoding.encode` makes of the logits of these rows, on rank 0; None on the others. A collective."""
        logits, first_id = self._logits(hidden, vocabulary_size)
        share = {"share": _share} if encoding.needs_row_keys else {}
        made = encoding.encode_shard(logits, target_ids, first_id, **extra, **share)
        gathered = self._gather(made)
        return None if gathered is None else encoding.merge_shards(gathered.split(made.shape[1], 1), vocabulary_size)

    def serve(self, encoding: Encoding, hidden: torch.Tensor, vocabulary_size: int) -> bool:
        """Whether the labels are made of shards: the same answer on every rank. A collective the first time."""
        ranks = get_tensor_model_parallel_world_size()
        width = getattr(encoding, "shard_width", None)
        if ranks == 1 or width is None or width * ranks >= vocabulary_size:
            return False
        if self._usable is None:
            why = self._obstacle(hidden, vocabulary_size)
            self._usable = why is None
            logger.info("Labels: %s", f"whole logits are gathered ({why})" if why else "shards send what they keep")
        return self._usable

    def _obstacle(self, hidden: torch.Tensor, vocabulary_size: int) -> str | None:
        """Why shards cannot be used; None where they can. `hidden` [n, H] are rows to try it on."""
        if len(self._processors()) != 1:
            return f"the model has {len(self._processors())} logits processors"
        with self._ungathered() as heads:
            local = self._model.compute_logits(hidden)
        if len(heads) != 1:
            return "its logits are not one product"
        first_of_last = (heads[0].tp_size - 1) * heads[0].num_embeddings_per_partition
        if heads[0].shard_indices.num_added_elements or first_of_last >= vocabulary_size:
            return "a shard holds other ids than one range of the vocabulary"
        apart, whole = tensor_model_parallel_all_gather(local, dim=-1), self._model.compute_logits(hidden)
        same = whole is not None and torch.allclose(
            apart[:, :vocabulary_size].float(), whole[:, :vocabulary_size].float(), rtol=1e-3, atol=1e-3
        )
        told = torch.full((1,), float(same and get_tensor_model_parallel_rank() == 0), device=hidden.device)
        return None if tensor_model_parallel_all_reduce(told).item() > 0 else "the model changes logits by their ids"

    def _logits(self, hidden: torch.Tensor, vocabulary_size: int) -> tuple[torch.Tensor, int]:
        """[n, v] of this rank's ids, and the first of them."""
        with self._ungathered() as heads:
            logits = self._model.compute_logits(hidden)
        indices = heads[0].shard_indices
        first, end = indices.org_vocab_start_index, min(indices.org_vocab_end_index, vocabulary_size)
        return logits[:, : end - first], first

    @contextmanager
    def _ungathered(self) -> Iterator[list[Any]]:
        """While `compute_logits` gives a shard's logits, padding included; the heads that it multiplies by."""
        (processor,) = self._processors()
        original, heads = processor._get_logits, []

        def local(hidden: torch.Tensor, head: Any, bias: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
            heads.append(head)
            return original(hidden, head, bias, True)

        processor._get_logits = local
        try:
            yield heads
        finally:
            del processor._get_logits

    def _processors(self) -> list[LogitsProcessor]:
        return [module for module in self._model.modules() if isinstance(module, LogitsProcessor)]

    def _gather(self, made: torch.Tensor) -> torch.Tensor | None:
        """[n, ranks x width] on rank 0, as vLLM gathers logits on this platform."""
        (processor,) = self._processors()
        if processor.use_all_gather:
            gathered = tensor_model_parallel_all_gather(made, dim=-1)
            return gathered if get_tensor_model_parallel_rank() == 0 else None
        return tensor_model_parallel_gather(made, dim=-1)


def _share(totals: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """float64 [n, w] of every rank, in order, and which of them is this one's. A collective, in float32 as all others:
    halves of the same bits."""
    gathered = tensor_model_parallel_all_gather(totals.contiguous().view(torch.float32), dim=-1)
    each = gathered.split(2 * totals.shape[1], dim=1)
    return [part.contiguous().view(torch.float64) for part in each], get_tensor_model_parallel_rank()

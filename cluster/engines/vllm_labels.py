"""Soft labels inside the vLLM worker: the pooling twin of a causal LM. A file of its own because vLLM imports it.

vLLM calls `register` in every process of an engine (entry point `vllm.general_plugins`). It replaces the teacher's
architecture in vLLM's registry by a twin: the same class, weights and lm_head, with a pooler that turns final hidden
states into packed label rows.

    request: token ids + asked spans + encoding                                         uint8 [rows, bytes]
        |                                                                                       ^
        scheduler (chunked, many requests a step) -> model -> hidden [T, H] -> LabelPooler: gather the asked rows,
                                        chunk: compute_logits -> slice to V -> Encoding.encode -> pack_rows
                                        (in shards of the vocabulary: cluster/engines/vllm_shards.py)

The twin keeps the base's architecture name, so vLLM resolves it, and all that it configures by that name, as always.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.pooling_params import PoolingParams
from vllm.v1.pool.metadata import PoolingMetadata

from cluster.engines.plan import LABEL_CHUNK_ROWS
from cluster.engines.vllm_shards import Shards
from configs.labels import LABELS, Hidden
from trainer.build import check_build
from trainer.errors import ConfigError
from trainer.labels.encoding import Encoding, TeacherShape, load_encoding, pack_rows, row_keys

ARCHITECTURE_VARIABLE = "STILLHOUSE_TEACHER_ARCHITECTURE"
"""Names the architecture to replace; inherited by tensor-parallel workers. Unset: this process scores nothing."""

LAYERS_VARIABLE = "STILLHOUSE_TEACHER_LAYERS"
"""Numbers of the layers whose states are asked for, with commas between them; likewise."""

TASK = "token_classify"
"""The pooling task that both of vLLM's model runners pass through to a pooler of our own."""


def register() -> None:
    """Put the twin of the teacher's architecture into vLLM's registry; does nothing twice or without the variable.

    Raises `ConfigError` in a process whose code is not the controller's: its labels would be others.
    """
    architecture = os.environ.get(ARCHITECTURE_VARIABLE)
    if architecture is None:
        return
    check_build()
    for name in registered_names(architecture):
        base = ModelRegistry.models[name].load_model_cls()
        if not issubclass(base, LabelTwin):
            ModelRegistry.register_model(name, twin_of(base))


def registered_names(architecture: str) -> list[str]:
    """The registry entries vLLM will resolve an architecture to: its own, else those of its Transformers backend."""
    known = ModelRegistry.get_supported_archs()
    if architecture in known:
        return [architecture]
    return [name for name in known if name.startswith("Transformers") and name.endswith("ForCausalLM")]


class LabelTwin(VllmModelForPooling):
    """Marks the twins."""

    is_pooling_model = True


def twin_of(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class object of a twin; a class and not a path, so that vLLM need not inspect it in a process of its own."""

    class Twin(base, LabelTwin):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:  # vLLM reads this signature
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            places = asked_layers(self, vllm_config.model_config.hf_text_config)
            self.pooler = LabelPooler(self.compute_logits, Shards(self), places)

        @wraps(base.forward)  # vLLM reads this signature too
        def forward(self, *args: object, **kwargs: object) -> object:
            return side_by_side(super().forward(*args, **kwargs))

    Twin.__name__ = base.__name__
    Twin.__qualname__ = base.__qualname__
    return Twin


def asked_layers(model: torch.nn.Module, config: Any) -> dict[int, int]:
    """Let the model give the states after the layers that this process is told of, in the way of speculative decoding
    (EAGLE-3). By layer the place of its states in what `side_by_side` makes; the last one's are the final states, at
    place 0. Raises `ConfigError` where the model has no such layer, or gives no states."""
    told = os.environ.get(LAYERS_VARIABLE)
    if not told:
        return {}
    layers, num_layers = [int(layer) for layer in told.split(",")], config.num_hidden_layers
    if beyond := [layer for layer in layers if layer > num_layers]:
        raise ConfigError(f"labels.layers: the teacher has layers 0 to {num_layers}, not {beyond[0]}")
    inner = [layer for layer in layers if layer < num_layers]
    if inner:
        # The backend for models of transformers counts from the end where it is asked for layer 0.
        if not supports_eagle3(model) or (0 in inner and hasattr(model, "_layer_names")):
            raise ConfigError(
                f"labels.layers: vLLM's {type(model).__name__} does not give the states between its layers; write "
                "engine: {kind: hf}, or choose another teacher"
            )
        model.set_aux_hidden_state_layers(tuple(inner))
    return {layer: place for place, layer in enumerate(inner, start=1)} | {num_layers: 0}


def side_by_side(output: object) -> object:
    """What vLLM's runner hands on to the pooler: final states [T, H], or with states after K layers [T, (1 + K) H]."""
    if not isinstance(output, tuple):
        return output
    last, states = output
    return torch.cat([last, *states], dim=-1)


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request wants, as it travels in `PoolingParams.extra_kwargs`."""

    labels: dict[str, object]  # flat: the kind and its parameters
    vocabulary_size: int
    spans: list[int]  # start, end, start, end, ... of the asked rows
    given_ids: bytes = b""  # int32 [asked rows, K], of encodings that take ids: bytes, which vLLM copies for free

    def to_params(self) -> PoolingParams:
        return PoolingParams(
            task=TASK,
            use_activation=False,
            skip_reading_prefix_cache=True,
            extra_kwargs={
                "labels": self.labels,
                "vocabulary_size": self.vocabulary_size,
                "spans": self.spans,
                "given_ids": self.given_ids,
            },
        )

    def positions(self, start: int, end: int) -> torch.Tensor:
        """int64: the asked rows inside the scheduled part [start, end) of the sequence."""
        pairs = zip(self.spans[::2], self.spans[1::2], strict=True)
        clipped = ((max(a, start), min(b, end)) for a, b in pairs)
        return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(a, b) for a, b in clipped if a < b)])

    def given_between(self, start: int, end: int) -> torch.Tensor:
        """int32 [n, K]: the ids given for `positions(start, end)`; [n, 0] where the encoding takes none."""
        before, num_rows = (len(self.positions(0, border)) for border in (start, self.spans[-1]))
        ids = np.frombuffer(self.given_ids, dtype=np.int32).reshape(num_rows, -1)
        return torch.from_numpy(ids[before : before + len(self.positions(start, end))].copy())


@dataclass(frozen=True, slots=True)
class Part:
    """The asked rows of one request in the running step."""

    request: int  # index in the batch
    rows: torch.Tensor  # int64 [n] rows of the step's hidden states
    target_ids: torch.Tensor  # int64 [n]
    extra: dict[str, torch.Tensor]  # what `encode` is given of each row besides: row_keys, given_ids


class LabelPooler(Pooler):
    """Packed label rows of the asked positions, one uint8 tensor per finished request."""

    def __init__(
        self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], shards: Shards, places: dict[int, int]
    ) -> None:
        """`places`: of `asked_layers`."""
        super().__init__()
        self.compute_logits = compute_logits
        self.shards = shards
        self.places = places
        self.num_states = 1 + max(places.values(), default=0)  # of each token, side by side
        self.encodings: dict[str, Encoding] = {}

    def get_supported_tasks(self) -> set[str]:
        return {TASK}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """`hidden_states` [T, H], or as `side_by_side`, of all tokens scheduled in this step, request after request."""
        asks = [params.extra_kwargs for params in pooling_metadata.pooling_params]
        if any(ask is None for ask in asks):
            return self._profile(hidden_states, num_requests=len(asks))
        states = pooling_metadata.pooling_states
        for ask, parts in self._parts(pooling_metadata, [Ask(**ask) for ask in asks]):
            packed = self._labels(ask, parts, hidden_states)
            sizes = [len(part.rows) for part in parts]
            for part, rows in zip(parts, packed.split(sizes), strict=True):
                states[part.request].hidden_states_cache.append(rows)
        finished = pooling_metadata.get_pooling_cursor().get_finished_mask()
        return [self._finish(state) if done else None for state, done in zip(states, finished, strict=True)]

    def _parts(self, metadata: PoolingMetadata, asks: list[Ask]) -> Iterator[tuple[Ask, list[Part]]]:
        """The asked rows of this step, grouped by encoding: rows of many requests share one product with lm_head."""
        cursor = metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        token_ids = metadata.get_prompt_token_ids_cpu()
        groups: dict[str, tuple[Ask, list[Part]]] = {}
        offset = 0
        for i, (ask, num, end) in enumerate(zip(asks, scheduled, ends, strict=True)):
            start = end - num
            if start == 0:
                # First chunk, or a preempted request that starts again: rows made before would come out twice.
                metadata.pooling_states[i].clean()
            at = ask.positions(start, end)
            if len(at):
                extra = {"row_keys": row_keys(token_ids[i], at)} if self._encoding(ask).needs_row_keys else {}
                if ask.given_ids:
                    extra["given_ids"] = ask.given_between(start, end)
                part = Part(i, at - start + offset, token_ids[i][at + 1].to(torch.int64), extra)
                groups.setdefault(encoding_key(ask), (ask, []))[1].append(part)
            offset += num
        yield from groups.values()

    def _labels(self, ask: Ask, parts: list[Part], hidden_states: torch.Tensor) -> torch.Tensor:
        """uint8 [rows of all parts, bytes]; own memory, since vLLM reuses the buffer of the hidden states."""
        device = hidden_states.device
        encoding = self._encoding(ask)
        rows, target_ids, *extra = (
            torch.cat(tensors).to(device, non_blocking=True)
            for tensors in zip(*((part.rows, part.target_ids, *part.extra.values()) for part in parts), strict=True)
        )
        width = hidden_states.shape[-1] // self.num_states
        layout = encoding.layout(TeacherShape(ask.vocabulary_size, width, hidden_states.dtype))
        chunks = []
        for start in range(0, len(rows), LABEL_CHUNK_ROWS):
            here = slice(start, start + LABEL_CHUNK_ROWS)
            chunk = rows[here]
            more = {name: values[here] for name, values in zip(parts[0].extra, extra, strict=True)}
            hidden = hidden_states[chunk]
            if self.places:
                states = hidden.unflatten(1, (self.num_states, width))
                hidden = states[:, 0].contiguous()
                if isinstance(encoding, Hidden) and encoding.layers:
                    more["states"] = states[:, [self.places[layer] for layer in encoding.layers]]
            columns = self._columns(encoding, hidden, target_ids[here], more, ask.vocabulary_size)
            empty = chunk.new_empty(len(chunk), 0, dtype=torch.uint8)
            chunks.append(empty if columns is None else pack_rows(columns, layout))
        return torch.cat(chunks)

    def _columns(
        self,
        encoding: Encoding,
        hidden: torch.Tensor,
        target_ids: torch.Tensor,
        extra: dict[str, torch.Tensor],
        vocabulary_size: int,
    ) -> dict[str, torch.Tensor] | None:
        """The labels of a chunk of rows [n, H], on rank 0. A collective: every rank computes as many chunks."""
        source: torch.Tensor | None = hidden
        if encoding.needs == "logits":
            if self.shards.serve(encoding, hidden, vocabulary_size):
                return self.shards.columns(encoding, hidden, target_ids, extra, vocabulary_size)
            logits = self.compute_logits(hidden)
            source = None if logits is None else logits[:, :vocabulary_size]
        if source is None or get_tensor_model_parallel_rank() != 0:
            return None
        return encoding.encode(source, target_ids, **extra)

    def _encoding(self, ask: Ask) -> Encoding:
        key = encoding_key(ask)
        if key not in self.encodings:
            self.encodings[key] = load_encoding(LABELS.validate(ask.labels))
        return self.encodings[key]

    @staticmethod
    def _finish(state: object) -> torch.Tensor:
        # A copy even of a single part: pickled to another process, a view would take its neighbours' rows along.
        rows = torch.cat(state.hidden_states_cache)
        state.clean()
        return rows

    def _profile(self, hidden_states: torch.Tensor, *, num_requests: int) -> list[torch.Tensor]:
        """vLLM measures the memory of a step with dummy requests: use what a chunk of labels uses at its peak."""
        width = hidden_states.shape[-1] // self.num_states
        logits = self.compute_logits(hidden_states[:LABEL_CHUNK_ROWS, :width].contiguous())
        if logits is not None:
            logits.float().log_softmax(dim=-1)
        return [torch.empty(0, 0, dtype=torch.uint8, device=hidden_states.device) for _ in range(num_requests)]


def encoding_key(ask: Ask) -> str:
    return f"{sorted(ask.labels.items())} {ask.vocabulary_size}"

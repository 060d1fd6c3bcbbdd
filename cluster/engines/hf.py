"""The transformers engine: `engine: {kind: hf}`. Plain, exact and the same bits every time; no Ray, no vLLM.

For tests, for `runtime: in_process`, and as the reference that other engines are held against. One sequence at a time:
no padding, and no label depends on what else is in a batch.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from cluster.engines.hf_generator import HfGenerator
from cluster.engines.hf_loop import SequenceLoop
from cluster.engines.plan import EnginePlan
from cluster.engines.refusals import start_errors
from cluster.engines.units import (
    EngineStatistics,
    check_given,
    check_unit,
    label_block,
    teacher_shape,
    unit_report,
    with_given,
)
from configs.engines import Hf
from configs.labels import Hidden, Labels
from configs.models import ModelSource
from trainer.errors import ConfigError
from trainer.labels.encoding import Column, Encoding, load_encoding, pack_rows, row_keys
from trainer.model.attention import REFERENCE
from trainer.model.load import load_causal
from trainer.types import RowIds, Sequence, SoftLabelBlock, Unit, UnitReport, tokens_to_read


class Engine(Hf):
    """How the model is loaded, and what holds it."""

    def arguments(
        self,
        *,
        role: Literal["scorer", "generator"],
        dtype: str,
        tensor_parallel_size: int,
        max_length: int,
        accelerator: Literal["cpu", "gpu"],
        stop_strings: bool = False,
    ) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`. Pure."""
        if tensor_parallel_size != 1:
            raise ConfigError(
                f"engine hf has no tensor parallelism (tensor_parallel_size: {tensor_parallel_size}); "
                "write engine: {kind: vllm} or tensor_parallel_size: 1"
            )
        return {"dtype": dtype}

    def start_scorer(self, plan: EnginePlan, name: str) -> HfScorer:
        return HfScorer(plan, load_model(plan), name)

    def start_generator(self, plan: EnginePlan, name: str) -> HfGenerator:
        return HfGenerator(plan, load_model(plan), name)


def load_model(plan: EnginePlan) -> PreTrainedModel:
    source = ModelSource(path=plan.model, revision=plan.revision, trust_remote_code=plan.trust_remote_code)
    with start_errors(f"transformers cannot load the teacher {plan.model}"):
        model = load_causal(source, role="teacher.model", **plan.arguments)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None and getattr(model, "hf_quantizer", None) is None:
        raise ConfigError(
            f"the teacher {plan.model} is quantised in a way that transformers does not know ({str(quantised)[:80]}), "
            "and would read its weights as they lie there; choose an unquantised teacher, or engine: {kind: vllm}"
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation(REFERENCE)  # eager: the only one that soft-caps attention scores
    with start_errors(f"the teacher {plan.model} cannot be moved to the device"):
        model = model.to(torch.device(plan.device_type))
    return model.eval().requires_grad_(False)


class HfScorer:
    """`ScoringEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, model: PreTrainedModel, name: str) -> None:
        self._plan = plan
        self._model = model
        self._loop = SequenceLoop(name)
        self._shape = teacher_shape(plan, model.get_output_embeddings().weight.shape[1])

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: RowIds | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """See the protocol."""
        check_unit(unit, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        check_given(unit, given, encoding=encoding, vocabulary_size=self._plan.vocabulary_size)
        made = load_encoding(encoding)
        layout = made.layout(self._shape)
        started_s, started_at = time.time(), time.monotonic()
        packed = await self._loop.run(
            with_given(unit, given),
            lambda asked: self._labels(*asked, made, layout),
            name=f"unit {unit.id}",
            deadline_s=deadline_s,
        )
        self._loop.count(num_tokens=unit.num_tokens, num_rows=unit.num_rows)
        hidden_size = self._shape.hidden_size
        block = label_block(unit, packed, plan=self._plan, spec=encoding, layout=layout, hidden_size=hidden_size)
        report = unit_report(
            unit,
            block,
            replica=self._loop.name,
            encoding=made,
            layout=layout,
            score_s=time.monotonic() - started_at,
            started_s=started_s,
        )
        return report, block

    @torch.inference_mode()
    def _labels(
        self, sequence: Sequence, given: np.ndarray | None, encoding: Encoding, layout: tuple[Column, ...]
    ) -> np.ndarray:
        """uint8 [n, bytes] of one sequence. Logits come from the model itself, whatever its head does."""
        device = self._model.device
        token_ids = torch.from_numpy(tokens_to_read(sequence)).long().to(device)
        rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask)).to(device)
        if encoding.needs == "hidden":
            source, extra = self._states(token_ids, rows, encoding.layers if isinstance(encoding, Hidden) else ())
        else:
            logits = self._model(input_ids=token_ids[None], use_cache=False, logits_to_keep=rows).logits[0]
            source, extra = logits[:, : self._plan.vocabulary_size], {}
        if encoding.needs_row_keys:
            extra["row_keys"] = row_keys(token_ids.cpu(), rows.cpu()).to(device)
        if given is not None:
            extra["given_ids"] = torch.from_numpy(given.astype(np.int64)).to(device)
        return pack_rows(encoding.encode(source, token_ids[rows + 1], **extra), layout).cpu().numpy()

    def _states(
        self, token_ids: torch.Tensor, rows: torch.Tensor, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The last hidden states [n, H] of these rows, and as `states` [n, K, H] those after the layers, if any."""
        found = self._model.base_model(input_ids=token_ids[None], use_cache=False, output_hidden_states=bool(layers))
        last = found.last_hidden_state[0, rows]
        if not layers:
            return last, {}
        return last, {"states": torch.stack([found.hidden_states[layer][0, rows] for layer in layers], dim=1)}

    def statistics(self) -> EngineStatistics:
        return self._loop.statistics()

    def close(self) -> None:
        self._loop.close()

"""The transformers engine: `engine: {kind: hf}`. Plain, exact and the same bits every time; no Ray, no vLLM.

For tests, for `runtime: in_process`, and as the reference that other engines are held against. One sequence at a time:
no padding, and no label depends on what else is in a batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from cluster.engines.plan import EnginePlan, Sampling
from cluster.engines.refusals import start_errors
from cluster.engines.units import (
    EngineStatistics,
    check_prompt,
    check_unit,
    label_block,
    prompt_seed,
    teacher_shape,
    tokens_to_read,
    unit_report,
)
from configs.engines import Hf
from configs.labels import Labels
from configs.models import ModelSource
from trainer.errors import ConfigError, DeadlineExceeded
from trainer.labels.encoding import Column, Encoding, load_encoding, pack_rows
from trainer.model.attention import REFERENCE
from trainer.model.load import load_causal
from trainer.types import Prompt, Sequence, SoftLabelBlock, Unit, UnitReport


class Engine(Hf):
    """How the model is loaded, and what holds it."""

    def arguments(
        self,
        *,
        role: Literal["scorer", "writer"],
        dtype: str,
        tensor_parallel_size: int,
        max_length: int,
        accelerator: Literal["cpu", "gpu"],
        kept_events: int,
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

    def start_writer(self, plan: EnginePlan, name: str) -> HfWriter:
        if plan.sampling is None:
            raise ConfigError(f"the writer {name} got no sampling settings")
        return HfWriter(plan, plan.sampling, load_model(plan), name)


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


class SequenceLoop:
    """Runs work for asyncio in one thread, sequence by sequence, so that the event loop stays free; and counts it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{name}")
        self._cpu_at_start = time.process_time()
        self._inside = self._peak = 0
        self._units = self._tokens = self._rows = self._steps = 0
        self._busy_s = 0.0

    async def run(
        self, items: AbstractSequence[Any], work: Callable[[Any], np.ndarray], *, name: str, deadline_s: float
    ) -> list[np.ndarray]:
        """The result of `work` for each item. Raises `DeadlineExceeded`; the items not begun by then never run."""
        loop = asyncio.get_running_loop()
        results: list[np.ndarray] = []
        self._inside += 1
        self._peak = max(self._peak, self._inside)
        try:
            async with asyncio.timeout(deadline_s):
                for item in items:
                    results.append(await loop.run_in_executor(self._executor, self._timed, work, item))
        except TimeoutError:
            raise DeadlineExceeded(
                f"{name}: {len(results)} of {len(items)} sequences left {self.name} within {deadline_s:.1f} s"
            ) from None
        finally:
            self._inside -= 1
        return results

    def _timed(self, work: Callable[[Any], np.ndarray], item: Any) -> np.ndarray:
        started = time.monotonic()
        result = work(item)
        self._steps += 1
        self._busy_s += time.monotonic() - started
        return result

    def count(self, *, num_tokens: int, num_rows: int) -> None:
        """A unit is done."""
        self._units += 1
        self._tokens += num_tokens
        self._rows += num_rows

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            num_units=self._units,
            num_tokens=self._tokens,
            num_rows=self._rows,
            num_steps=self._steps,
            busy_s=self._busy_s,
            cpu_s=time.process_time() - self._cpu_at_start,
            max_concurrent_units=self._peak,
        )

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class HfScorer:
    """`ScoringEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, model: PreTrainedModel, name: str) -> None:
        self._plan = plan
        self._model = model
        self._loop = SequenceLoop(name)
        self._shape = teacher_shape(plan, model.get_output_embeddings().weight.shape[1])

    async def score(self, unit: Unit, encoding: Labels, *, deadline_s: float) -> tuple[UnitReport, SoftLabelBlock]:
        """See the protocol."""
        check_unit(unit, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        made = load_encoding(encoding)
        layout = made.layout(self._shape)
        started_s, started_at = time.time(), time.monotonic()
        packed = await self._loop.run(
            [sequence for sequence in unit.sequences if sequence.num_loss_tokens],
            lambda sequence: self._labels(sequence, made, layout),
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
    def _labels(self, sequence: Sequence, encoding: Encoding, layout: tuple[Column, ...]) -> np.ndarray:
        """uint8 [n, bytes] of one sequence. Logits come from the model itself, whatever its head does."""
        device = self._model.device
        token_ids = torch.from_numpy(tokens_to_read(sequence)).long().to(device)
        rows = torch.from_numpy(np.flatnonzero(sequence.loss_mask)).to(device)
        if encoding.needs == "hidden":
            source = self._model.base_model(input_ids=token_ids[None], use_cache=False).last_hidden_state[0, rows]
        else:
            logits = self._model(input_ids=token_ids[None], use_cache=False, logits_to_keep=rows).logits[0]
            source = logits[:, : self._plan.vocabulary_size]
        return pack_rows(encoding.make(source, token_ids[rows + 1]), layout).cpu().numpy()

    def statistics(self) -> EngineStatistics:
        return self._loop.statistics()

    def close(self) -> None:
        self._loop.close()


class HfWriter:
    """`WritingEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, sampling: Sampling, model: PreTrainedModel, name: str) -> None:
        self._plan = plan
        self._sampling = sampling
        self._model = model
        self._loop = SequenceLoop(name)

    async def write(self, prompts: AbstractSequence[Prompt], *, deadline_s: float) -> list[np.ndarray]:
        """int32 ids of each answer, in the order of the prompts, the stop token included where one was produced."""
        for prompt in prompts:
            check_prompt(prompt, vocabulary_size=self._plan.vocabulary_size, max_length=self._plan.max_length)
        answers = await self._loop.run(
            prompts, self._answer, name=f"the answers to {len(prompts)} prompts", deadline_s=deadline_s
        )
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts) + sum(len(answer) for answer in answers)
        self._loop.count(num_tokens=num_tokens, num_rows=0)
        return answers

    @torch.inference_mode()
    def _answer(self, prompt: Prompt) -> np.ndarray:
        sampling = self._sampling
        generator = torch.Generator(self._model.device).manual_seed(prompt_seed(sampling.seed, prompt.id))
        token_ids = torch.from_numpy(prompt.token_ids).long().to(self._model.device)[None]
        cache, answer = None, []
        for _ in range(min(sampling.max_new_tokens, self._plan.max_length - len(prompt.token_ids))):
            output = self._model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token_ids = draw(output.logits[0, -1, : self._plan.vocabulary_size].float(), sampling, generator).view(1, 1)
            answer.append(int(token_ids))
            if answer[-1] in sampling.stop_token_ids:
                break
        return np.asarray(answer, dtype=np.int32)

    def statistics(self) -> EngineStatistics:
        return self._loop.statistics()

    def close(self) -> None:
        self._loop.close()


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One id from logits [V]: the best one at temperature 0, else from the nucleus of mass `top_p` (1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax()
    probabilities, ids = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    return ids[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)]

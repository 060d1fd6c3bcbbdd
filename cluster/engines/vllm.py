"""The vLLM engine: `engine: {kind: vllm}`. What it is told per role and device, and its scorer and generator.

The engine runs inside the actor's process, without vLLM's own front-end process: `VLLM_ENABLE_V1_MULTIPROCESSING=0`
must be in the process environment. Only tensor parallelism adds processes, one per shard.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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
from cluster.engines.vllm_generator import VllmGenerator, sampling_params
from cluster.engines.vllm_loop import EngineLoop, Request
from configs.engines import Vllm
from configs.labels import HELD_OUT, Hidden, Labels
from trainer.errors import ConfigError, InfrastructureError
from trainer.heap import give_back
from trainer.imports import uncollected
from trainer.labels.encoding import load_encoding
from trainer.model.head import head_width
from trainer.types import RowIds, Sampling, Sequence, SoftLabelBlock, Unit, UnitReport, tokens_to_read

if TYPE_CHECKING:
    import torch
    from vllm import PoolingParams
    from vllm.v1.engine.llm_engine import LLMEngine

CPU_KV_CACHE_BYTES = 256 * 2**20
"""On CPU vLLM would take gigabytes. This holds some thousand tokens of a model of 100-500 million parameters."""

APPLY_TIMEOUT_S = 60.0

CPU_BLOCK_SIZE = 32
"""vLLM's kernels want a multiple of 32; its own default of 128 wastes most of a block on short sequences."""


class Engine(Vllm):
    """How an engine of this role and device is started."""

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
        """Keyword arguments of `vllm.EngineArgs`, complete but for the model's own name. Pure.

        `stop_strings`: a generator must know the text of what it writes.
        """
        arguments = {
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            # Inside a placement group vLLM would choose its ray executor by itself and take that group's first GPUs.
            "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else "uni",
            "max_model_len": max_length,
            "enable_chunked_prefill": True,
            "skip_tokenizer_init": True,  # ids go in, ids or labels come out
            "generation_config": "vllm",  # sampling is what the config says, not what a model folder says
            "load_format": self.load_format,
            "use_tqdm_on_load": False,
            "seed": 0,
            "disable_log_stats": True,
            **(self._scorer() if role == "scorer" else self._generator(stop_strings)),
            **(self._cpu() if accelerator == "cpu" else self._gpu()),
        }
        if role == "generator" and accelerator == "cpu":
            # vLLM's seeded sampling fails on a CPU when a prompt is read in parts: read each whole.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(arguments["max_num_batched_tokens"], max_length)
        arguments.update(self._given())
        # With chunked prefill a step must hold one token of each running sequence.
        arguments["max_num_seqs"] = min(arguments["max_num_seqs"], arguments["max_num_batched_tokens"])
        return arguments

    def _given(self) -> dict[str, Any]:
        """What the configuration says."""
        given = {
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enforce_eager": self.enforce_eager,
        }
        return {key: value for key, value in given.items() if value is not None}

    @staticmethod
    def _scorer() -> dict[str, Any]:
        return {
            "runner": "pooling",
            "convert": "none",  # the twin is a pooling model already, and keeps its lm_head
            "hf_overrides": {"head_dtype": "model"},  # else logits and labels in float32, twice the bytes
            "enable_prefix_caching": False,  # a cached row is a row without a label
        }

    @staticmethod
    def _generator(stop_strings: bool) -> dict[str, Any]:
        return {
            "runner": "generate",
            "convert": "none",
            "enable_prefix_caching": True,
            "skip_tokenizer_init": not stop_strings,
            "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        }

    @staticmethod
    def _cpu() -> dict[str, Any]:
        return {
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "block_size": CPU_BLOCK_SIZE,
            "enforce_eager": True,  # compiling costs a minute and gives 5-15 %
            "max_num_seqs": 32,
            "max_num_batched_tokens": 1024,
        }

    def _gpu(self) -> dict[str, Any]:
        return {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": False,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
        }

    def start_scorer(self, plan: EnginePlan, name: str) -> VllmScorer:
        """Load the model's pooling twin; returns when it can score. `name` is the replica's, for messages."""
        with teacher_architecture(plan) as config:
            width = head_width(config, trust_remote_code=plan.trust_remote_code)
            return VllmScorer(plan, EngineLoop(lambda: build_engine(plan), name=name), hidden_size=width)

    def start_generator(self, plan: EnginePlan, name: str) -> VllmGenerator:
        """Load the model for generation; returns when it can write."""
        return VllmGenerator(plan, EngineLoop(lambda: build_engine(plan), name=name))

    @staticmethod
    def share_weights(scorer: VllmScorer, generator: VllmGenerator) -> None:
        """Let both engines of one model, in one process on a host, compute with the generator's weights."""
        source = apply(generator.loop, lambda model: model)
        apply(scorer.loop, lambda model: take_weights(model, source))


def apply(loop: EngineLoop, function: Callable[[torch.nn.Module], Any]) -> Any:
    """What a function of the engine's model gives, run in the engine's thread while the engine starts."""
    (result,) = asyncio.run(
        loop.run(lambda engine: engine.apply_model(function), name="its model", deadline_s=APPLY_TIMEOUT_S)
    )
    return result


def take_weights(model: torch.nn.Module, source: torch.nn.Module) -> None:
    """Replace the weights of a model by those of another, whose modules have the same names and hold the same numbers.
    What vLLM laid out anew for this processor lies in the function by which a layer multiplies."""
    sources = dict(source.named_modules())
    for name, module in model.named_modules():
        if (same := sources.get(name)) is None:
            continue  # the twin's pooler
        module._parameters.update(same._parameters)
        if "cpu_linear" in vars(same):
            module.cpu_linear = same.cpu_linear
    give_back()


@contextmanager
def teacher_architecture(plan: EnginePlan) -> Iterator[Any]:
    """Tell the vLLM plug-in of this process, and of the workers it starts, whose twin to make. Yields the teacher's
    transformers config."""
    with uncollected():
        from transformers import AutoConfig

    with start_errors(f"the engine cannot read the configuration of {plan.model}"):
        config = AutoConfig.from_pretrained(
            plan.model, revision=plan.revision, trust_remote_code=plan.trust_remote_code
        )
    if not config.architectures:
        raise ConfigError(f'{plan.model}/config.json names no architecture; add "architectures": ["LlamaForCausalLM"]')

    with uncollected():
        from cluster.engines import vllm_labels

    os.environ[vllm_labels.ARCHITECTURE_VARIABLE] = config.architectures[0]
    os.environ[vllm_labels.LAYERS_VARIABLE] = ",".join(map(str, layers_asked(plan.encodings)))
    try:
        # vLLM runs its plug-ins once per process: this covers a second engine of another architecture.
        with start_errors(f"vLLM has no usable model for {config.architectures[0]} of {plan.model}"):
            vllm_labels.register()
        yield config
    finally:
        del os.environ[vllm_labels.ARCHITECTURE_VARIABLE], os.environ[vllm_labels.LAYERS_VARIABLE]


def layers_asked(encodings: Iterable[Labels]) -> list[int]:
    """Of all encodings that have layers."""
    return sorted({layer for one in encodings if isinstance(one, Hidden) for layer in one.layers})


def build_engine(plan: EnginePlan) -> LLMEngine:
    """Runs in the engine's thread. Raises `ConfigError` for what vLLM refuses, whatever type its refusal has, and
    `InfrastructureError` for what is the machine's fault or happened in a process of its own."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise InfrastructureError(
            "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 in the environment of a process that runs a vLLM engine"
        )
    source = {"model": plan.model, "revision": plan.revision, "trust_remote_code": plan.trust_remote_code}
    with start_errors(
        f"vLLM cannot run {plan.model} as a {plan.role} ({plan.dtype}, {plan.max_length} tokens)",
        hint="gpu_memory_utilization and kv_cache_bytes are parameters of engine, max_model_len is data.max_length",
    ):
        with uncollected():
            import torch
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

        # The kernel gives a process the tiles of AMX when it asks. vLLM's attention uses them and does not: in a model
        # whose products ask for none it would be the first, and die of an illegal instruction.
        torch.cpu._init_amx()
        if plan.device_type == "cpu" and plan.dtype == "float32":
            from cluster.engines.vllm_products import choose_products

            choose_products()
        engine = LLMEngine.from_engine_args(EngineArgs(**source, **plan.arguments))
        try_out(engine, plan)
        give_back()  # weights as they were read, before they were packed for this processor
        return engine


def try_out(engine: LLMEngine, plan: EnginePlan) -> None:
    """The shortest requests there are: kernels that do not take this model say so at its first pass, and not before."""
    if plan.role == "scorer":
        encoding = plan.encodings[0] if plan.encodings else HELD_OUT
        given = np.arange(encoding.num_given)[None] if encoding.takes_ids else None
        trials = [([0, 0], label_request(encoding, plan, spans=[0, 1], given=given))]
    else:
        ways = Sampling(max_tokens=1), Sampling(max_tokens=1, temperature=1.0, top_p=0.9, top_k=2, min_p=0.1)
        trials = [([0], sampling_params(way, max_tokens=1, seed=0, logit_bias=None)) for way in ways]
    for number, (token_ids, params) in enumerate(trials):
        engine.add_request(f"trial-{number}", {"type": "token", "prompt_token_ids": token_ids}, params)
    while engine.has_unfinished_requests():
        engine.step()


def label_request(
    encoding: Labels, plan: EnginePlan, *, spans: list[int], given: np.ndarray | None = None
) -> PoolingParams:
    """`spans` are start, end, start, end, ... of the asked rows; `given` int [rows, num_given] are their ids."""
    from cluster.engines.vllm_labels import Ask

    given_ids = b"" if given is None else np.ascontiguousarray(given, dtype=np.int32).tobytes()
    ask = Ask(encoding.flat(), plan.vocabulary_size, spans, given_ids)
    return ask.to_params()


class VllmScorer:
    """`ScoringEngine` (trainer/protocols.py)."""

    def __init__(self, plan: EnginePlan, loop: EngineLoop, *, hidden_size: int) -> None:
        self._plan = plan
        self.loop = loop
        self._hidden_size = hidden_size

    async def score(
        self, unit: Unit, encoding: Labels, *, deadline_s: float, given: RowIds | None = None
    ) -> tuple[UnitReport, SoftLabelBlock]:
        """See the protocol. Several calls at once share the engine's batches."""
        plan = self._plan
        check_unit(unit, vocabulary_size=plan.vocabulary_size, max_length=plan.max_length)
        check_given(unit, given, encoding=encoding, vocabulary_size=plan.vocabulary_size)
        made = load_encoding(encoding)
        finished = await self.loop.submit(
            [self._request(sequence, encoding, ids) for sequence, ids in with_given(unit, given)],
            name=f"unit {unit.id}",
            num_tokens=unit.num_tokens,
            num_rows=unit.num_rows,
            deadline_s=deadline_s,
        )
        layout = made.layout(teacher_shape(plan, self._hidden_size))
        packed = [output.outputs.data.numpy() for output in finished.outputs]
        block = label_block(unit, packed, plan=plan, spec=encoding, layout=layout, hidden_size=self._hidden_size)
        report = unit_report(
            unit,
            block,
            replica=self.loop.name,
            encoding=made,
            layout=layout,
            score_s=finished.took_s,
            started_s=finished.started_s,
        )
        return report, block

    def _request(self, sequence: Sequence, encoding: Labels, given: np.ndarray | None) -> Request:
        spans = [edge for span in sequence.spans() for edge in span]
        asked = label_request(encoding, self._plan, spans=spans, given=given)
        return Request(tokens_to_read(sequence).tolist(), asked)

    def statistics(self) -> EngineStatistics:
        return self.loop.statistics

    def close(self) -> None:
        self.loop.close()

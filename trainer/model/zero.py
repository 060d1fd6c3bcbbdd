"""All of DeepSpeed: one process group, one sharded model and its optimizer. The only file that imports deepspeed.

    start_processes -> [sharded_loading: build the model] -> ZeroModel(module) -> forward, backward ... step

DeepSpeed's state is global to its process, so a process has one `ZeroModel` at a time. Every method is collective: all
ranks call it, with equal arguments where nothing else is said.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from deepspeed.utils.tensor_fragment import fragment_address
from torch import distributed
from torch.distributed import distributed_c10d
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from configs.schema import Optimizer
from trainer.build import LOG_LEVEL
from trainer.errors import ConfigError, InfrastructureError
from trainer.model.optimizer import parameter_groups

TAG = "zero"
"""Folder of DeepSpeed's files inside a checkpoint; which checkpoint is loaded is decided above, never by DeepSpeed."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimizer step did, equal on all ranks."""

    grad_norm: float  # before clipping; inf or NaN where the step was skipped
    skipped: bool


def start_processes(*, backend: str, timeout_s: float, rank: int, world: int, device: torch.device) -> bool:
    """Join the process group; with more than one rank the environment names the address (MASTER_ADDR, MASTER_PORT).

    Every collective ends after `timeout_s`, DeepSpeed's own groups included. False in a process that had joined before.
    """
    if os.environ.get(LOG_LEVEL) in ("debug", "error"):
        deepspeed.utils.logging.set_log_level_from_string(os.environ[LOG_LEVEL])
    # An operator for inference only, compiled with g++ at this point and leaving files in /dev/shm when killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    new = not distributed.is_initialized()
    if new:
        place = {"store": distributed.HashStore()} if world == 1 else {"init_method": "env://"}
        if device.index is not None:
            place["device_id"] = device
        distributed.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, **place)
    joined = (distributed.get_rank(), distributed.get_world_size())
    if joined != (rank, world):
        raise InfrastructureError(f"this process joined as rank {joined[0]} of {joined[1]}, not {rank} of {world}")
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    # DeepSpeed makes its group without a timeout of its own and keeps no way to pass one.
    for group in (distributed.group.WORLD, groups._get_data_parallel_group()):
        distributed_c10d._set_pg_timeout(timeout, group)
    return new


def stop_processes() -> None:
    """Leave the process group; the process cannot join another one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def sharded_loading(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, at ZeRO-3, transformers builds models whose parameters are sharded from the moment they exist."""
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    # transformers holds only a weak reference, and asks it while a model is built.
    announced = HfDeepSpeedConfig(_mutable(config))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del announced


@contextlib.contextmanager
def whole(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, sharded parameters hold their full values on every rank, to be read; others always do. Collective."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, sharded or not."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


class TensorsOnly(TorchCheckpointEngine):
    """DeepSpeed's own files, read as tensors, plain values and the few classes that it writes into them; anything
    else in a pickle is refused before it runs."""

    def save(self, state_dict: Any, path: str) -> None:
        """torch.save writes all of the memory behind a tensor, and a partition may be a part of the weights."""
        shards = state_dict.get(OPTIMIZER_STATE_DICT)
        if isinstance(shards, dict) and SINGLE_PARTITION_OF_FP32_GROUPS in shards:
            own = [partition.detach().clone() for partition in shards[SINGLE_PARTITION_OF_FP32_GROUPS]]
            shards = {**shards, SINGLE_PARTITION_OF_FP32_GROUPS: own}
            state_dict = {**state_dict, OPTIMIZER_STATE_DICT: shards}
        super().save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ConfigError(f"{path} holds more than tensors, so no run wrote it: {error}") from None


class ZeroModel:
    """A module whose optimizer states (1), gradients (2) and parameters (3) are sharded over the ranks.

    ZeRO: arXiv 1910.02054. The module's forward must return a tensor or a tuple of tensors.
    """

    def __init__(
        self, module: torch.nn.Module, *, config: Mapping[str, Any], optimizer: Optimizer, device: torch.device
    ) -> None:
        self._frozen = not all(p.requires_grad for p in module.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_make_optimizer(module, config=config, settings=optimizer),
            config=_mutable(config),
            dist_init_required=False,
        )
        self._engine.checkpoint_engine = TensorsOnly(self._engine._config)
        share_master_weights(self._engine.optimizer)
        if self._engine.device.type != device.type:
            raise ConfigError(f"DeepSpeed chose the device {self._engine.device}, the run is planned for {device}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward. Calls that need no gradient go here too, inside `torch.no_grad()`."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to the step's. DeepSpeed averages over ranks at `step`, over nothing else."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepOutcome:
        """One clipped optimizer step over all gradients since the last one.

        A gradient that is not finite on any rank leaves weights and optimizer as they are, on all ranks.
        """
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(grad_norm=float(norm), skipped=bool(optimizer.overflow))

    def save(self, folder: Path) -> None:
        """Every rank writes its shards into an existing folder and sees them on disk. Frozen weights are left out."""
        self._engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self._frozen, client_state={}
        )
        rank = distributed.get_rank()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and _written_by(file.name, rank):
                flush_to_disk(file)
        flush_to_disk(folder / TAG)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote at the same world size, stage and dtype. Only before the first step."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._frozen)
        if loaded is None:
            raise ConfigError(f"{folder} holds no DeepSpeed checkpoint named {TAG!r}")

    def close(self) -> None:
        """Release hooks and buffers. The process group stays."""
        self._engine.destroy()


def share_master_weights(optimizer: Any) -> None:
    """Where the weights are float32, let the master weights of a partition be the weights themselves.

    At stages 1 and 2 DeepSpeed updates a float32 copy of its partition and casts it into the weights. Of weights that
    are float32 that copy is the same numbers a second time.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = distributed.get_rank(optimizer.real_dp_process_group[index])
        weights = optimizer.parallel_partitioned_bit16_groups[index][rank]
        if weights.dtype == master.dtype and weights.device == master.device:
            master.data = weights.detach()
    optimizer._link_all_hp_params()  # each parameter knows its part of the master weights


def _make_optimizer(
    module: torch.nn.Module, *, config: Mapping[str, Any], settings: Optimizer
) -> torch.optim.Optimizer:
    parameters = parameter_groups(module.parameters(), settings=settings)
    options = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    offloaded = "offload_optimizer" in config["zero_optimization"]
    if offloaded and config["zero_force_ds_cpu_optimizer"]:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    # fused, on the host too: one pass over the flat shard. (foreach is several times slower there.)
    return torch.optim.AdamW(parameters, fused=True, **options)


def _mutable(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed and transformers write into the configuration they are given."""
    return {key: _mutable(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def _written_by(name: str, rank: int) -> bool:
    """Whether DeepSpeed's rank wrote a file of this name: shards name their rank, the rest is rank 0's."""
    _, found, tail = name.partition("pp_rank_")
    owner = int(tail.partition("_")[0]) if found else 0
    return owner == rank


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

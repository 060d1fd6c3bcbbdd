"""Which library multiplies float32 matrices inside a vLLM engine on a CPU: measured once in its process.

vLLM gives every linear layer to oneDNN, with weights packed for it. With AVX2 alone torch's own product (MKL on x86)
may be faster by a tenth to a third; both are tried on one shape of layers and one of heads, and the faster is taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers import utils

from trainer.build import FAST
from trainer.model.fast.libraries import CLEARLY_FASTER, TRIED, seconds
from trainer.model.fast.product import BLAS, ONEDNN, width_of

logger = init_logger("vllm.stillhouse")


def choose_products() -> None:
    """From now on in this process. Does nothing where vLLM has one library, where the environment asks for nothing of
    this kind (STILLHOUSE_FAST=0), and a second time."""
    dispatch = utils.dispatch_cpu_unquantized_gemm
    value = os.environ.get(FAST, "1")
    if value == "0" or not getattr(ops, "_supports_onednn", False) or hasattr(dispatch, "chosen"):
        return
    chosen = dict.fromkeys(TRIED, value) if value in (ONEDNN, BLAS) else measured()
    logger.info("Products: %s", ", ".join(f"{width} {library}" for width, library in chosen.items()))
    if BLAS in chosen.values():
        utils.dispatch_cpu_unquantized_gemm = _Dispatch(dispatch, chosen)


def measured() -> dict[str, str]:
    """The library of each width (`libraries.TRIED`), by vLLM's own oneDNN product against torch's."""
    chosen = {}
    for width, (n, k, m) in TRIED.items():
        x, weight = torch.full((n, k), 0.5), torch.full((m, k), 0.5)
        handler = ops.create_onednn_mm(weight.t(), 32)
        ways = {
            ONEDNN: lambda x=x, handler=handler: ops.onednn_mm(handler, x, None),
            BLAS: lambda x=x, weight=weight: torch.nn.functional.linear(x, weight),
        }
        spent = seconds(ways)
        chosen[width] = BLAS if spent[ONEDNN] > CLEARLY_FASTER * spent[BLAS] else ONEDNN
    return chosen


class _Dispatch:
    """vLLM's choice of a layer's product, except for float32 layers that MKL multiplies faster: these keep their
    weights as they are, so that new ones need no packing."""

    def __init__(self, dispatch: object, chosen: Mapping[str, str]) -> None:
        self._dispatch = dispatch
        self.chosen = chosen

    def __call__(self, layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        plain = not weight.is_meta and weight.ndim == 2 and weight.dtype is torch.float32
        if plain and self.chosen[width_of(*weight.shape)] == BLAS:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            self._dispatch(layer, remove_weight)

"""Which library multiplies inside an engine: measured, fixed by the environment, equal in what it computes."""

from __future__ import annotations

import pytest
import torch

from trainer.build import FAST
from trainer.model.fast.product import BLAS, ONEDNN

pytestmark = pytest.mark.stack


@pytest.mark.parametrize("value", ["1", ONEDNN, BLAS, "0"])
def test_layers_of_an_engine_multiply_equally_by_whichever_library(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from cluster.engines import vllm_products as products

    utils = products.utils
    monkeypatch.setenv(FAST, value)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    monkeypatch.setattr(products, "measured", lambda: {"narrow": BLAS, "wide": ONEDNN})
    own = utils.dispatch_cpu_unquantized_gemm
    products.choose_products()
    products.choose_products()  # a second engine of the process changes nothing
    dispatch = utils.dispatch_cpu_unquantized_gemm
    assert (dispatch is own) == (value in (ONEDNN, "0"))
    for width, rows in (("narrow", 96), ("wide", 8192)):
        layer = torch.nn.Linear(64, rows)
        x, weight = torch.randn(5, 64), layer.weight.detach().clone()
        dispatch(layer, remove_weight=True)
        by_blas = value == BLAS or (value == "1" and width == "narrow")
        assert (layer.weight.numel() > 0) == by_blas, "oneDNN packed it and took the original"
        result = layer.cpu_linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(result, x @ weight.t() + layer.bias, rtol=1e-4, atol=1e-4)


def test_an_engine_measures_its_own_product_of_both_widths() -> None:
    pytest.importorskip("vllm")
    from cluster.engines import vllm_products as products

    chosen = products.measured()
    assert set(chosen) == {"narrow", "wide"}
    assert set(chosen.values()) <= {ONEDNN, BLAS}

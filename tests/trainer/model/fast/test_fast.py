"""What is fast on one kind of processor: equal to the formulas, chosen when a process starts, switched off in one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainer.build import FAST
from trainer.errors import ConfigError
from trainer.model import fast
from trainer.model.fast import cpu, plain

SUPPORT = Path(__file__).resolve().parents[3] / "support"
MODULES = pytest.mark.parametrize("functions", [cpu, plain], ids=["cpu", "plain"])


@MODULES
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100])
def test_matrix_products_equal_float64_also_of_transposed_views(functions: ModuleType, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    rows, weight, states = (torch.randn(a, b, generator=g) for a, b in ((n, 65), (65, 24), (n, 24)))
    for a, b in ((states, weight), (rows, weight.t()), (rows.t(), states.t())):
        expected = (a.double() @ b.double().T).float()
        torch.testing.assert_close(functions.matmul_nt(a, b), expected, atol=1e-4, rtol=1e-5)
    assert functions.matmul_nt(rows[:0], weight.t()).shape == (0, 24)


def test_whole_rows_appends_zeros_only_where_rows_are_missing() -> None:
    rows = torch.randn(33, 5)
    padded = cpu.whole_rows(rows)
    assert padded.shape == (64, 5)
    assert torch.equal(padded[:33], rows)
    assert (padded[33:] == 0).all()
    assert cpu.whole_rows(padded) is padded


def test_cache_blocks_cover_every_row_once_in_order() -> None:
    for n, width in ((0, 10), (1, 10), (100, 50_000), (3, 10_000_000)):
        covered = [i for block in cpu.cache_blocks(torch.empty(n, width, device="meta")) for i in range(n)[block]]
        assert covered == list(range(n))
    blocks = list(cpu.cache_blocks(torch.empty(50, 49_152)))
    assert [i for block in blocks for i in range(50)[block]] == list(range(50))
    assert len(blocks) == 5


@MODULES
@pytest.mark.parametrize(("v", "k"), [(1000, 3), (997, 7), (4096, 64), (49_152, 64), (64, 64), (513, 32)])
def test_the_search_for_the_largest_finds_what_a_sort_finds(functions: ModuleType, v: int, k: int) -> None:
    for logits in (
        torch.randn(6, v, generator=torch.Generator().manual_seed(2)),
        torch.randint(5, (6, v), generator=torch.Generator().manual_seed(3)).float(),  # ties everywhere
        torch.arange(6 * v).view(6, v).float(),  # the best are the last, in the leftover columns
        torch.full((6, v), -math.inf).scatter(1, torch.tensor([[v - 1]] * 6), 0.0),
    ):
        values, ids = functions.top_k(logits, k)
        assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :k])
        assert torch.equal(values, logits.gather(1, ids))
        assert all(len(set(row.tolist())) == k for row in ids)


@MODULES
def test_softmax_and_log_sum_exp_equal_float64_with_their_gradients(functions: ModuleType) -> None:
    z = (torch.randn(5, 301, generator=torch.Generator().manual_seed(4)) * 9).requires_grad_()
    exact = z.double()
    probabilities, value = functions.softmax_and_log_sum_exp(z)
    torch.testing.assert_close(probabilities.double(), exact.softmax(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(value.double(), exact.logsumexp(1, keepdim=True).detach(), atol=1e-5, rtol=1e-6)
    weights = torch.arange(1.0, 6.0)
    (gradient,) = torch.autograd.grad(functions.log_sum_exp(z), z, weights)
    torch.testing.assert_close(gradient.double(), exact.softmax(1) * weights[:, None], atol=1e-5, rtol=1e-5)


@MODULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_log_sum_exp_of_all_other_columns_equals_float64(
    functions: ModuleType, temperature: float, dtype: torch.dtype
) -> None:
    """Also where exp of them would overflow, or vanish, or where one column holds nearly everything."""
    logits = 4 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(5))
    logits[1] += 300
    logits[2] -= 300
    logits[3, 7] += 150
    logits[4, 7:] = -torch.inf
    logits[5] += 70
    logits = logits.to(dtype)
    ids = torch.stack([torch.arange(7), torch.tensor([7, 7, 8, 9, 10, 11, 12])])[[0, 1, 1, 1, 0, 1, 1, 0]]
    exact = logits.double().scatter(1, ids, -torch.inf) / temperature
    found = functions.log_sum_exp_without(logits, ids, temperature)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact.logsumexp(1, keepdim=True), atol=2e-5, rtol=1e-6)
    everything = functions.log_sum_exp_without(logits, ids[:, :0], temperature).double()
    torch.testing.assert_close(everything, (logits.double() / temperature).logsumexp(1, keepdim=True))
    assert (everything - found)[3] > 100, "what is left out matters"


@MODULES
def test_products_of_rows_equal_float64(functions: ModuleType) -> None:
    a, b = torch.rand(2, 5, 3001, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(functions.row_dots(a, b).double(), (a.double() * b.double()).sum(1, keepdim=True))


@MODULES
def test_a_factor_is_known_to_be_one_only_where_it_is(functions: ModuleType) -> None:
    assert functions.known_to_be_one(torch.tensor(1.0)) == (functions is cpu)
    assert not functions.known_to_be_one(torch.tensor(0.5))
    assert not functions.known_to_be_one(torch.empty((), device="meta"))


def test_both_modules_have_every_function_of_the_folder() -> None:
    names = {name for name, value in vars(fast).items() if value is getattr(fast.chosen, name, None) is not None}
    assert len(names & set(cpu.__all__)) == len(cpu.__all__) == 11
    assert all(hasattr(plain, name) for name in cpu.__all__)


@pytest.mark.parametrize(("value", "module"), [(None, cpu), ("1", cpu), ("0", plain), ("blas", cpu)])
def test_the_environment_chooses(value: str | None, module: ModuleType) -> None:
    assert fast.choose({} if value is None else {FAST: value}) is module


def test_another_value_is_refused_and_not_guessed() -> None:
    with pytest.raises(ConfigError, match="STILLHOUSE_FAST is 'off': write 1"):
        fast.choose({FAST: "off"})


def in_a_process(value: str, file: Path) -> dict[str, Any]:
    """What `tests/support/fast_cases.py` computes with STILLHOUSE_FAST at this value."""
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
    environment = {**os.environ, FAST: value, "PYTHONPATH": path}
    subprocess.run([sys.executable, SUPPORT / "fast_cases.py", file], env=environment, check=True, timeout=300)
    return torch.load(file)


def test_labels_losses_and_training_steps_are_equal_with_and_without_what_is_fast(tmp_path: Path) -> None:
    """To the rounding of float32 sums in another order: 1e-5 of a label, 1e-4 of a gradient's largest entry."""
    on, off = (in_a_process(value, tmp_path / value) for value in "10")
    assert (on["module"], off["module"]) == ("trainer.model.fast.cpu", "trainer.model.fast.plain")
    if torch.backends.mkldnn.is_available():
        assert "mkldnn._linear_pointwise" in on["operators"], "the switch switches what runs"
    assert "mkldnn._linear_pointwise" not in off["operators"]
    assert (on["layers"], off["layers"]) == (14, 0)
    assert on["tensors"].keys() == off["tensors"].keys()
    assert len(on["tensors"]) > 30
    for name, value in on["tensors"].items():
        other = off["tensors"][name]
        if value.is_floating_point():
            scale = max(1e-6, float(other.abs().max()))
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-4 * scale, msg=name)
        else:
            assert torch.equal(value, other), name

"""Which library multiplies: measured, told, and one choice for all ranks and for a run that goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from tiny_models import tiny_model

from trainer.build import FAST
from trainer.model import products
from trainer.model.fast import libraries, product
from trainer.model.fast.product import BLAS, KINDS, ONEDNN, Choice, add_matmul_nt, matmul_nt, whole_rows

HOST = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has one library")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FAST, raising=False)
    before = product.used()
    yield
    product.use(before)


def test_measuring_takes_less_than_half_a_second_and_leaves_random_numbers_alone() -> None:
    libraries.measured.cache_clear()
    state, started = torch.get_rng_state(), time.thread_time()
    choice = libraries.measured()
    assert time.thread_time() - started < 1.0  # a fifth to a third of a second; slower machines than these exist
    assert torch.equal(state, torch.get_rng_state())
    assert libraries.measured() is choice, "once in a process"
    assert set(choice.libraries) == set(choice.gflops) == set(KINDS)
    for kind, rates in choice.gflops.items():
        faster = rates[BLAS] > libraries.CLEARLY_FASTER * rates[ONEDNN]
        assert choice.libraries[kind] == (BLAS if faster else ONEDNN)
        assert f"{kind} " in libraries.told(choice)


def test_products_are_told_apart_by_layout_and_width() -> None:
    x, w, d = torch.empty(64, 384), torch.empty(16384, 384), torch.empty(64, 16384)
    assert product.kind_of(x, w) == "wide/nt"
    assert product.kind_of(d, w.t()) == "wide/nn"
    assert product.kind_of(d.t(), x.t()) == "wide/tn"
    assert product.kind_of(torch.empty(512, 512), torch.empty(512, 512)) == "narrow/nt"
    assert product.kind_of(torch.empty(8, 8), torch.empty(8, 8)) == ""
    product.use(product.fixed(BLAS))
    assert product.library_for(torch.empty(8, 8), torch.empty(8, 8)) == ONEDNN, (
        "small products are the same on every machine"
    )


@pytest.mark.parametrize("library", [ONEDNN, BLAS])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_where_it_is_sent_with_equal_results(kind: str, library: str) -> None:
    other = {ONEDNN: BLAS, BLAS: ONEDNN}[library]
    product.use(Choice(libraries=dict.fromkeys(KINDS, other) | {kind: library}))
    width, layout = kind.split("/")
    n, k, m = (64, 24, 8192) if width == "wide" else (128, 256, 256)
    g = torch.Generator().manual_seed(0)
    x, w, d = torch.randn(n, k, generator=g), torch.randn(m, k, generator=g), torch.randn(n, m, generator=g)
    a, b = {"nt": (x, w), "nn": (d, w.t()), "tn": (d.t(), x.t())}[layout]
    assert product.kind_of(a, b) == kind
    with torch.profiler.profile() as profile:
        result = matmul_nt(a, b)
    names = {event.key for event in profile.key_averages()}
    assert ("mkldnn::_linear_pointwise" in names) == (library == ONEDNN)
    torch.testing.assert_close(result.double(), a.double() @ b.double().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("library", [ONEDNN, BLAS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_a_total_in_place(library: str, dtype: torch.dtype) -> None:
    product.use(product.fixed(library))
    g = torch.Generator().manual_seed(1)
    d, x = (torch.randn(64, width, generator=g).to(dtype) for width in (8192, 24))
    total = torch.ones(8192, 24)
    add_matmul_nt(total, d.t(), x.t())
    tolerance = 1e-4 if dtype is torch.float32 else 0.3
    expected = d.double().T @ x.double()
    torch.testing.assert_close(total.double(), 1 + expected, rtol=tolerance / 10, atol=tolerance)
    total.fill_(torch.nan)  # as memory may be that nobody has written to
    add_matmul_nt(total, d.t(), x.t(), fresh=True)
    torch.testing.assert_close(total.double(), expected, rtol=tolerance / 10, atol=tolerance)


@pytest.mark.parametrize("library", [ONEDNN, BLAS])
def test_the_gradient_of_a_head_is_added_without_a_tensor_of_its_size(library: str) -> None:
    """Neither the product nor a transposed copy exists whole: the kernel would clear their pages."""
    product.use(product.fixed(library))
    d, x, total = torch.ones(256, 16_384), torch.ones(256, 256), torch.zeros(16_384, 256)
    with torch.profiler.profile(profile_memory=True) as profile:
        add_matmul_nt(total, d.t(), x.t())
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < total.nbytes / 2
    assert torch.equal(total, torch.full_like(total, 256.0))


@pytest.mark.parametrize("library", [ONEDNN, BLAS])
def test_a_product_is_written_where_it_shall_lie_and_a_weight_is_cast_by_parts(library: str) -> None:
    product.use(product.fixed(library))
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(64, 48, generator=g), torch.randn(40_000, 48, generator=g)
    buffer = torch.full((96, 40_000), torch.nan)
    made = matmul_nt(x, w, buffer[:64])
    assert made.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(made, matmul_nt(x, w), rtol=1e-5, atol=1e-4)
    assert buffer[64:].isnan().all()
    stored = w.bfloat16()
    torch.testing.assert_close(matmul_nt(x, stored), x @ stored.float().T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matmul_nt(x, stored, buffer[:64]), matmul_nt(x, stored), rtol=0, atol=0)


def test_rows_are_padded_only_for_the_library_that_wants_it() -> None:
    rows = torch.ones(33, 4)
    product.use(product.fixed(BLAS))
    assert whole_rows(rows) is rows
    product.use(Choice(libraries={"wide/nt": ONEDNN}))
    assert whole_rows(rows).shape == (64, 4)


@pytest.mark.parametrize(("value", "expected"), [("0", BLAS), ("onednn", ONEDNN), ("blas", BLAS)])
def test_the_environment_names_a_library_instead_of_a_measurement(value: str, expected: str) -> None:
    choice = libraries.chosen_by({FAST: value})
    assert (set(choice.libraries.values()), choice.gflops) == ({expected}, {})
    assert libraries.told(choice).endswith("not measured")


def test_a_run_that_goes_on_multiplies_as_before_whatever_is_measured_now(monkeypatch: pytest.MonkeyPatch) -> None:
    before = product.fixed(BLAS)
    product.use(before)
    state = products.products_state()
    product.use(product.fixed(ONEDNN))
    products.restore_products(state | {"here": "another processor"}, device=HOST)
    assert product.used() == product.fixed(ONEDNN)
    products.restore_products(None, device=HOST)  # a checkpoint of an earlier version
    assert product.used() == product.fixed(ONEDNN)
    monkeypatch.setenv(FAST, "onednn")
    products.restore_products(state, device=HOST)
    assert product.used() == product.fixed(ONEDNN)
    monkeypatch.delenv(FAST)
    products.restore_products(state, device=HOST)
    assert product.used() == libraries.recorded(before)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_multiply_by_what_rank_0_measured(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = product.fixed(BLAS), []
    monkeypatch.setattr(products, "WORTH_MEASURING", 1)
    monkeypatch.setattr(libraries, "chosen_by", lambda environment: asked.append(1) or found)
    monkeypatch.setattr(products, "all_gather_objects", lambda own: [found, own])
    products.choose_products(tiny_model(), rank=rank, device=HOST, dtype=torch.float32)
    assert product.used() is found
    assert len(asked) == (rank == 0)


def test_a_tiny_student_has_the_default_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "measured", lambda: pytest.fail("measured"))
    product.use(product.fixed(BLAS))
    products.choose_products(tiny_model(), rank=0, device=HOST, dtype=torch.float32)
    assert product.used() == product.fixed()
    assert products.products_told(HOST, torch.bfloat16) == ""

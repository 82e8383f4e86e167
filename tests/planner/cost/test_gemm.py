"""Rates of matrix products by shape: what was measured, between and beyond it, and where nothing was."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from planner.cost.compute.gemm import MIN_SAMPLES, GemmModel, centre, table_shares
from planner.hardware import measured_tables as measured
from planner.hardware.catalog import device_names, load_device
from planner.model.workload import Precision
from tests.planner import instances

M = [1, 7, 64, 256, 300, 1024, 5000, 8192, 40_000, 1_000_000]
WIDTHS = [16, 64, 128, 300, 724, 1024, 4096, 9000, 30_000]
OWN = [table.products[0] for table in measured.tables().values()]


def gemm(name: str, precision: Precision = Precision.BF16) -> GemmModel:
    return GemmModel(load_device(name).device(), precision)


def rate(model: GemmModel, m: float, n: float, k: float) -> float:
    found = model.rate_flops(m, n, k)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("name", OWN)
def test_the_grid_gives_back_the_measured_medians(name: str) -> None:
    table = measured.table_of(name, "products")
    assert table is not None
    model = gemm(name)
    assert model.origin == "interpolated", "another host's measurement is never called measured"
    exact = 0
    for row in measured.products(table):
        if row.precision != "bf16" or row.samples < MIN_SAMPLES:
            continue
        value = rate(model, row.m, centre(row), 4 * centre(row)) / 1e12
        if name == "gb200" and row.m >= 4096 and row.min_nk_from > 2048:
            continue  # held back, see below
        assert value >= row.median_tflops * (1 - 1e-9), "raised only where a wider product would be faster"
        assert value == pytest.approx(row.median_tflops, rel=0.15 if row.min_nk_from == 1 else 1e-3)
        exact += value == pytest.approx(row.median_tflops, rel=1e-9)
    assert exact >= 28


def test_published_medians_of_an_h100() -> None:
    """aiconfigurator-core 0.12.0, vllm 0.24.0: 697 TFLOP/s at m = 4096 for min(n, k) in 513..1024."""
    model = gemm("h100-sxm-80gb")
    assert rate(model, 4096, 725, 4096) == pytest.approx(697.1e12, rel=1e-3)
    assert rate(model, 4096, 5793, 28_672) == pytest.approx(787.7e12, rel=1e-3)
    assert rate(model, 4096, 28_672, 5793) == rate(model, 4096, 5793, 28_672)


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_a_rate_under_its_peak_or_none(name: str) -> None:
    device = load_device(name).device()
    for precision in (Precision.FP32, Precision.BF16, Precision.FP16):
        model, peak = GemmModel(device, precision), device.peak_flops(precision)
        if peak is None:
            assert model.rate_flops(4096, 4096, 4096) is None
            continue
        rates = [rate(model, m, d, d) for m, d in itertools.product(M, WIDTHS)]
        assert all(0 < r <= peak for r in rates)
        assert rate(model, 8192, 8192, 8192) > 0.3 * peak


@pytest.mark.parametrize("name", [*OWN, "mi300x", "tpu-v5e", "v100-sxm-16gb"])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_no_cliffs_and_more_work_is_never_quicker_by_width(name: str, precision: Precision) -> None:
    model = gemm(name, precision)
    if model.peak_flops is None:
        return
    for m, d in itertools.product([1, 127, 128, 129, 256, 512, 4096, 8192, 32_768], WIDTHS):
        here = rate(model, m, d, d)
        for factor in (0.999, 1.001):
            assert rate(model, m * factor, d, d) == pytest.approx(here, rel=0.004)
            assert rate(model, m, d * factor, d * factor) == pytest.approx(here, rel=0.004)
        seconds = [m * n * 65_536 / rate(model, m, n, 65_536) for n in WIDTHS]
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(seconds))


def test_a_host_that_was_held_back_is_raised_to_what_other_engines_reach() -> None:
    """GB200: 1519 and 1525 TFLOP/s, medians over m, n, k >= 4096 of two other engines (AIC)."""
    assert [name for name, table in measured.tables().items() if table.bf16_floor] == ["gb200"]
    model = gemm("gb200")
    large = [rate(model, m, d, d) / 1e12 for m in (8192, 16_384, 32_768) for d in (5793, 11_585)]
    assert all(value == pytest.approx(1520, rel=0.01) for value in large)
    assert rate(model, 8192, 2897, 8192) == pytest.approx(1807e12, rel=0.01), "and others stay"


def test_small_products_fall_with_their_size() -> None:
    model = gemm("a100-sxm-80gb")
    assert rate(model, 64, 4096, 4096) == pytest.approx(rate(model, 256, 4096, 4096) / 4)
    assert rate(model, 4096, 32, 4096) == pytest.approx(rate(model, 4096, 128, 4096) / 4)


def test_a_device_without_a_table_borrows_the_nearest_shape() -> None:
    near, far = table_shares("a100_sxm", "bf16"), gemm("v100-sxm-16gb", Precision.FP16)
    assert near is not None and far.origin == "datasheet"
    assert rate(far, 4096, 1024, 4096) == pytest.approx(125e12 * near.at(4096, 1024))


def test_a_measured_maximum_sets_the_height() -> None:
    """MI300X: 668.4 TFLOP/s were measured, of 1307 dense."""
    model = gemm("mi300x")
    assert model.origin == "fitted"
    assert max(rate(model, m, d, d) for m, d in itertools.product(M, WIDTHS)) == pytest.approx(
        668.4e12, rel=0.03
    )


def test_an_unknown_device_takes_the_mean_of_all() -> None:
    unknown = instances.device(flops=1e14)
    model = GemmModel(unknown, Precision.BF16)
    assert model.origin == "datasheet"
    shares = [table_shares(name, "bf16") for name in measured.tables()]
    values = [grid.at(4096, 1449) for grid in shares if grid is not None]
    assert len(values) == 9
    assert min(values) < rate(model, 4096, 1449, 1449) / 1e14 < max(values)


def test_rates_scale_with_the_peak_and_unknown_stays_unknown() -> None:
    device = load_device("h100-sxm-80gb").device()
    double = dataclasses.replace(device, peak_bf16_flops=2 * 989e12)
    one, two = (GemmModel(d, Precision.BF16) for d in (device, double))
    assert rate(two, 512, 700, 900) == pytest.approx(2 * rate(one, 512, 700, 900))
    blank = dataclasses.replace(device, peak_bf16_flops=None)
    assert GemmModel(blank, Precision.BF16).rate_flops(512, 700, 900) is None

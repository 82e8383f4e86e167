"""The rate that matrix products reach, by shape: the dense peak times a share that was measured.

The shipped tables (`planner.hardware.measured_tables.products`, taken in inference engines on other hosts of
the
same kinds) give the median rate of products (m, k) x (k, n) for each m and bucket of min(n, k). Over the
peak of the table's device they are shares, at knots m and at the buckets' geometric centres d:

    rate(m, n, k) = peak * share(m, min(n, k)),    log share bilinear in log m and log d between knots

Below the first knot the share falls with m or d: reading the operands takes as long for fewer rows, and
tiles are padded. Above the last it stays. Cells of fewer than MIN_SAMPLES shapes are no knots, and where a
wider product would take less time than a narrower one (the narrowest bucket is mostly products far below its
centre), the share of the narrower is raised to the same time. A table whose host was held back at large
products has a floor (`bf16_floor`): a share of the best rate among products no larger in m and d.

- The device's own table: "interpolated".
- A device without one takes the share of the nearest architecture (`tables.toml`, `shares`), and one of
  which nothing is known the geometric mean over all tables: "datasheet". Where the catalog holds a measured
  rate of large products in bf16, the shares are scaled so that the largest is that rate: "fitted".
- fp16 runs at bf16's rate; fp32 borrows bf16's shares. So does fp8, times FP8_SHARE: its tables were taken
  with the cast of the input in every call, which hides the product where n is small.
- A device whose peak is unknown has no rate.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from functools import cache

from planner.hardware import measured_tables as measured
from planner.hardware.catalog import device_names, load_device
from planner.hardware.cluster import Device
from planner.hardware.device_file import DeviceFile
from planner.hardware.measured_rows import ProductRow
from planner.model.workload import Precision

MIN_SAMPLES = 5
"""Fewer shapes than this make no median: the widest bucket has three, and one of them dips by 40 %."""

NARROWEST_KNOT, NARROWEST_END = 128, 512
"""Where the bucket of min(n, k) up to 512 has its knot: the shapes double from 32 to 512."""


FP8_SHARE = 0.87
"""Share of its peak that a product in fp8 reaches over that of the same product in bf16. Over the tables, the
best shapes with m >= 4096 and min(n, k) of 2049 to 8192, where a cast is least of a call: H100 0.65 to 0.79
of 0.87 to 0.93, H200 0.76 to 0.80 of 0.85 to 0.90, B200 to GB300 0.70 to 0.81 of 0.78 to 0.93
(aiconfigurator-core 0.12.0, vllm 0.24.0)."""


class GemmModel:
    """Rates of matrix products on one device in one precision."""

    def __init__(self, device: Device, precision: Precision) -> None:
        self.peak_flops = device.peak_flops(precision)
        self._shares, self.origin = _shares(device)
        self._factor = FP8_SHARE if precision is Precision.FP8 else 1.0

    def rate_flops(self, m: float, n: float, k: float) -> tuple[float, str] | None:
        """FLOP/s of an (m, k) x (k, n) product and the origin of the figure; None: the peak is unknown."""
        if self.peak_flops is None:
            return None
        return self.peak_flops * self._factor * self._shares.at(m, min(n, k)), self.origin


class ShareGrid:
    """Shares of the peak at knots of m and d, and between them."""

    def __init__(self, rows: Mapping[tuple[int, int], float]) -> None:
        self._m = sorted({m for m, _ in rows})
        self._d = sorted({d for _, d in rows if all((m, d) in rows for m in self._m)})
        self._log = [_never_faster([rows[(m, d)] for d in self._d], self._d) for m in self._m]

    def at(self, m: float, d: float) -> float:
        """The share at (m, d)."""
        row, in_row, below_m = _place(self._m, m)
        column, in_column, below_d = _place(self._d, d)
        upper, lower = self._log[row], self._log[row + 1]
        first = (1 - in_column) * upper[column] + in_column * upper[column + 1]
        second = (1 - in_column) * lower[column] + in_column * lower[column + 1]
        return min(1.0, below_m * below_d * math.exp((1 - in_row) * first + in_row * second))

    def scaled(self, factor: float) -> ShareGrid:
        """The same shape at another height."""
        return ShareGrid({knot: share * factor for knot, share in self.knots().items()})

    def knots(self) -> dict[tuple[int, int], float]:
        """The share at each knot."""
        return {
            (m, d): math.exp(log_share)
            for m, row in zip(self._m, self._log, strict=True)
            for d, log_share in zip(self._d, row, strict=True)
        }


def _never_faster(shares: Sequence[float], widths: Sequence[int]) -> list[float]:
    """Log shares of rising widths such that time, width over share, never falls; from the widest down."""
    kept = list(shares)
    for i in reversed(range(len(kept) - 1)):
        kept[i] = max(kept[i], kept[i + 1] * widths[i] / widths[i + 1])
    return [math.log(share) for share in kept]


def _place(knots: Sequence[int], value: float) -> tuple[int, float, float]:
    """The knot at or below, the log share of the way to the next, and value over the first where below."""
    if value <= knots[0]:
        return 0, 0.0, value / knots[0]
    index = min(bisect.bisect_right(knots, value), len(knots) - 1) - 1
    within = math.log(value / knots[index]) / math.log(knots[index + 1] / knots[index])
    return index, min(1.0, within), 1.0


def _shares(device: Device) -> tuple[ShareGrid, str]:
    """The grid of shares in bf16 that speaks for a device, and the origin of what follows from it."""
    own = measured.table_of(device.name, "products")
    if own is not None:
        return table_shares(own, "bf16") or usual_shares("bf16"), "interpolated"
    near = measured.table_of(device.name, "shares")
    grid = (table_shares(near, "bf16") if near else None) or usual_shares("bf16")
    facts = load_device(device.name) if device.name in device_names() else None
    reached = _reached_share(facts) if facts else None
    if reached is None:
        return grid, "datasheet"
    return grid.scaled(reached / max(grid.knots().values())), "fitted"


def _reached_share(facts: DeviceFile) -> float | None:
    """The share of the bf16 peak that large products were measured to reach."""
    if facts.measured is None or facts.peak_tflops.bf16 is None:
        return None
    return facts.measured.bf16_gemm_tflops / facts.peak_tflops.bf16


@cache
def table_shares(table: str, precision: str) -> ShareGrid | None:
    """A table's grid in a format, over the peak of the device that it was taken on; None: not measured."""
    facts = load_device(measured.tables()[table].products[0])
    peak = facts.peak_tflops.fp8 if precision == "fp8" else facts.peak_tflops.bf16
    rows = [row for row in measured.products(table) if row.precision == precision]
    if peak is None or not rows:
        return None
    kept = {(row.m, centre(row)): row.median_tflops / peak for row in rows if row.samples >= MIN_SAMPLES}
    floor = measured.tables()[table].bf16_floor
    return ShareGrid(_raised(kept, floor) if floor and precision == "bf16" else kept)


def _raised(shares: Mapping[tuple[int, int], float], floor: float) -> dict[tuple[int, int], float]:
    """Each share, or `floor` of the best one of a product no larger where that is more."""
    return {
        (m, d): max(share, floor * max(s for (a, b), s in shares.items() if a <= m and b <= d))
        for (m, d), share in shares.items()
    }


@cache
def usual_shares(precision: str) -> ShareGrid:
    """The geometric mean of all tables at the knots that all of them have."""
    grids = [table_shares(table, precision) for table in measured.tables()]
    knots = [grid.knots() for grid in grids if grid is not None]
    common = set.intersection(*(set(grid) for grid in knots))
    return ShareGrid(
        {knot: math.exp(sum(math.log(grid[knot]) for grid in knots) / len(knots)) for knot in common}
    )


def centre(row: ProductRow) -> int:
    """The knot of a bucket of min(n, k)."""
    if row.min_nk_to == NARROWEST_END:
        return NARROWEST_KNOT
    return round(math.sqrt(row.min_nk_from * (row.min_nk_to or 2 * row.min_nk_from)))

"""Ticks of logarithmic axes, and what stands beside them."""

from __future__ import annotations

import math

MOST_TICKS = 8
"""Of an axis of a small chart."""


STEPS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Ticks of one decade, the most first."""


def log_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Round numbers of every decade within a range: as many a decade as `most` in all allow, or the tens."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values: list[float] = []
    for steps in STEPS:
        every = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
        values = [value for value in every if low <= value <= high]
        if len(values) <= most:
            break
    return values


def power_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Powers of two within a range: each, or every second or fourth and so on where they are many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    stride = 1
    while (last - first) // stride >= most:
        stride *= 2
    return [2.0**power for power in range(first, last + 1) if (power - first) % stride == 0]


def scaled_label(scales: tuple[tuple[float, str], ...]) -> str:
    """The Vega expression of a label in the largest unit that a value has one of; the least first.

    `scales` are factors and names: `((1, "B"), (1024, "KiB"))` makes 2048 `2 KiB`.
    """
    (least, name), *others = scales
    text = _one(least, name)
    for factor, larger in others:
        text = f"datum.value >= {factor * 0.999!r} ? {_one(factor, larger)} : {text}"
    return text


def _one(factor: float, name: str) -> str:
    return f"format(datum.value / {factor!r}, '~g') + ' {name}'"


SECONDS = scaled_label(((1e-6, "µs"), (1e-3, "ms"), (1.0, "s")))
BYTES = scaled_label(((1, "B"), (1024, "KiB"), (1024**2, "MiB"), (1024**3, "GiB")))
BYTES_PER_S = scaled_label(((1e3, "kB/s"), (1e6, "MB/s"), (1e9, "GB/s"), (1e12, "TB/s")))
FLOPS = scaled_label(((1e6, "MFLOP/s"), (1e9, "GFLOP/s"), (1e12, "TFLOP/s"), (1e15, "PFLOP/s")))
COUNT = scaled_label(((1, ""), (1024, "k"), (1024**2, "M"), (1024**3, "G")))
FLOPS_OF_WORK = scaled_label(((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")))

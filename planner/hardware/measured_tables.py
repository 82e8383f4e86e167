"""Shipped measurements: collectives, links and matrix products, read strictly from profiles/measured/*.csv.

Other people took them on other hosts of the same kinds of device, so a planner may call what follows from
them interpolated or fitted, never measured. `tables.toml` says for which device each table speaks. A wrong
file is answered with every fault by line and column.

Collective time over message size and group size, from the shipped measurements of a kind of device.

Each (op, ranks) has samples of time over bytes. Times are made to rise with the message (isotonic in log
time: neighbours that fall are replaced by their mean), then interpolated in log bytes and log time. Below the
first sample the time is the first one's, above the last the bandwidth is the last one's.

Between measured group sizes a < n < b, the time of a wire-byte is interpolated in log n. With the wire
factor f(n) = (n - 1) / n, twice that for an all-reduce, and w = log(n / a) / log(b / a):

    t(n, S) = f(n) * (t(a, S) / f(a)) ^ (1 - w) * (t(b, S) / f(b)) ^ w

Beyond the largest measured size b, whose bus bandwidth stays: libraries use trees or the switch for small
messages, so each doubling of the group adds what the last doubling added to the smallest message's time:

    t(n, S) = f(n) / f(b) * t(b, S) + log2(n / b) * (t(b, S0) - t(b / 2, S0))

A send of S bytes is an all-to-all of 2 S between two devices: both move S each way.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import profiles
from planner.foundation.decode import decode, load_toml_object
from planner.hardware.measured_rows import (
    COLLECTIVE_COLUMNS,
    PRODUCT_COLUMNS,
    CollectiveRow,
    InternodeRow,
    MeasuredTable,
    ProductRow,
    load_internode,
    load_rows,
)


def folder() -> Path:
    """Where the shipped measurements are."""
    return Path(str(profiles.__file__)).parent / "measured"


@cache
def tables() -> Mapping[str, MeasuredTable]:
    """The tables by name."""
    path = folder() / "tables.toml"
    return decode(dict[str, MeasuredTable], load_toml_object(path), source=path.name)


@cache
def collectives(table: str) -> tuple[CollectiveRow, ...]:
    """The collectives of a table, an installed package's or else ours; none of one that is rejected."""
    from planner.hardware.aiconfigurator import installed_collectives

    if tables()[table].rejected:
        return ()
    return installed_collectives(table) or load_rows(
        folder() / "collectives.csv", CollectiveRow, COLLECTIVE_COLUMNS, only=table
    )


@cache
def products(table: str) -> tuple[ProductRow, ...]:
    """The matrix products of a table, in each of our formats an installed package's or else ours."""
    from planner.hardware.aiconfigurator import installed_products

    shipped = load_rows(folder() / "gemm.csv", ProductRow, PRODUCT_COLUMNS, only=table)
    ours = {row.precision for row in shipped}
    installed = tuple(row for row in installed_products(table) if row.precision in ours)
    theirs = {row.precision for row in installed}
    return (*(row for row in shipped if row.precision not in theirs), *installed)


@cache
def internode() -> tuple[InternodeRow, ...]:
    """The shipped collectives between nodes, rejected rows left out."""
    return tuple(row for row in load_internode(folder() / "internode.csv") if not row.rejected)


def table_of(device: str, use: str) -> str | None:
    """The table that speaks for a catalog device in `use`: collectives, products or shares."""
    for name, table in tables().items():
        if device in getattr(table, use):
            return name
    return None


class CollectiveCurves:
    """The curves of one kind of device inside a node. Origins: interpolated, or fitted where extrapolated.

    An `op` is a value of `profile.Op`.
    """

    def __init__(self, rows: Sequence[CollectiveRow]) -> None:
        samples: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in rows:
            samples.setdefault((row.op, row.ranks), []).append((row.bytes, row.latency_us / 1e6))
        self._curves = {key: _Curve(sorted(points)) for key, points in samples.items()}
        self._ranks = {op: sorted(ranks for o, ranks in self._curves if o == op) for op, _ in self._curves}

    def seconds(self, op: str, ranks: int, size_bytes: float) -> tuple[float, str]:
        """Seconds of a collective over `ranks` >= 2 devices, and the origin of the figure."""
        if op == "p2p":
            return self.seconds("all_to_all", 2, 2 * size_bytes)
        sizes = self._ranks[op]
        if ranks in sizes:
            return self._curves[(op, ranks)].seconds(size_bytes)
        if ranks > sizes[-1]:
            return self._beyond(op, ranks, size_bytes), "fitted"
        above = bisect.bisect(sizes, ranks)
        a, b = sizes[above - 1], sizes[above]
        weight = math.log(ranks / a) / math.log(b / a)
        (seconds_a, origin_a), (seconds_b, _) = (self._curves[(op, n)].seconds(size_bytes) for n in (a, b))
        log_s = (1 - weight) * math.log(seconds_a / wire_factor(op, a)) + weight * math.log(
            seconds_b / wire_factor(op, b)
        )
        return wire_factor(op, ranks) * math.exp(log_s), origin_a

    def _beyond(self, op: str, ranks: int, size_bytes: float) -> float:
        largest = self._ranks[op][-1]
        curve, half = self._curves[(op, largest)], self._curves.get((op, largest // 2))
        step_s = max(0.0, curve.first_s - half.first_s) if half else curve.first_s
        whole_s = curve.seconds(size_bytes)[0] * wire_factor(op, ranks) / wire_factor(op, largest)
        return whole_s + math.log2(ranks / largest) * step_s

    def bus_bytes_per_s(self, op: str) -> float:
        """Bus bandwidth of the largest message over the largest measured group."""
        ranks = self._ranks[op][-1]
        size_bytes = self._curves[(op, ranks)].last_bytes
        return wire_factor(op, ranks) * size_bytes / self.seconds(op, ranks, size_bytes)[0]

    def ranks(self, op: str) -> list[int]:
        """The group sizes that were measured."""
        return list(self._ranks[op])


class _Curve:
    """Time over message size that never falls."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self._log_bytes = [math.log(size) for size, _ in points]
        self._log_s = rising([math.log(seconds) for _, seconds in points])
        self.first_s = math.exp(self._log_s[0])
        self.last_bytes = points[-1][0]

    def seconds(self, size_bytes: float) -> tuple[float, str]:
        log_bytes = math.log(size_bytes)
        if log_bytes <= self._log_bytes[0]:
            return self.first_s, "interpolated"
        if log_bytes > self._log_bytes[-1]:
            return math.exp(self._log_s[-1] + log_bytes - self._log_bytes[-1]), "fitted"
        high = min(bisect.bisect_right(self._log_bytes, log_bytes), len(self._log_bytes) - 1)
        a, b = self._log_bytes[high - 1], self._log_bytes[high]
        share = (log_bytes - a) / (b - a)
        return math.exp((1 - share) * self._log_s[high - 1] + share * self._log_s[high]), "interpolated"


def rising(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence of least squared distance: falling neighbours share their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, width = pools.pop()
            total, count = total + before, count + width
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def wire_factor(op: str, ranks: int) -> float:
    """Bytes over a device's link for each byte of the full message, by the best algorithm on a ring.

    `op` is a value of `profile.Op`; any other raises, so that no unknown communication is free.
    """
    match str(op):
        case "p2p":
            return 1.0
        case "all_reduce":
            return 2 * (ranks - 1) / ranks
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return (ranks - 1) / ranks
    raise ValueError(f"no communication is called '{op}'")


@cache
def curves_of(device: str) -> CollectiveCurves | None:
    """The shipped curves that speak for a device of the catalog, or None."""
    table = table_of(device, "collectives")
    return None if table is None else CollectiveCurves(collectives(table))

"""Time of a collective: measured curves where the profile has them, else latency and bandwidth.

For n ranks and a full message of S bytes over a link with latency a and bandwidth B, in ring form:

    all-gather, reduce-scatter, all-to-all    (n - 1) a + (n - 1) / n * S / B
    all-reduce                              2 (n - 1) a + 2 (n - 1) / n * S / B
    send                                            a + S / B

An all-reduce is a reduce-scatter and an all-gather. A group that spans nodes uses the slower link.
"""

from __future__ import annotations

import bisect
import math
import statistics

from planner.codec import noun
from planner.cost import constants
from planner.problem import PlanningProblem
from planner.profile import CommSample, Op


@noun
class Group:
    """`ranks` ranks, `groups` such groups at work at once in a node, inside a node or across nodes."""

    ranks: int
    groups: int
    spans_nodes: bool


@noun
class CommCost:
    """Seconds of a communication and where the figure comes from."""

    seconds: float
    origin: str


NOISY_SPREAD = 0.25
FREE = CommCost(seconds=0.0, origin="measured")


class CommModel:
    """Communication costs of one planning problem."""

    def __init__(self, problem: PlanningProblem) -> None:
        self.cluster = problem.cluster
        self._curves: dict[tuple[Op, int, int], list[CommSample]] = {}
        for sample in problem.profile.comms if problem.profile else ():
            self._curves.setdefault((sample.op, sample.ranks, sample.groups), []).append(sample)
        for curve in self._curves.values():
            curve.sort(key=lambda s: s.bytes)

    def cost(self, op: Op, size_bytes: float, group: Group) -> CommCost:
        """Seconds of `op` over `group` for a full message of `size_bytes`."""
        if group.ranks == 1 or size_bytes <= 0:
            return FREE
        curve = self._curve(op, group)
        if curve and not group.spans_nodes:
            return _fitted(curve, size_bytes) if _noisy(curve) else _along(curve, size_bytes)
        return CommCost(seconds=self._analytic_s(op, size_bytes, group), origin="datasheet")

    def _curve(self, op: Op, group: Group) -> list[CommSample] | None:
        """The curve of this group size, with as many groups at once, or the nearest number of groups."""
        counts = [groups for (o, ranks, groups) in self._curves if o is op and ranks == group.ranks]
        if not counts:
            return None
        nearest = min(counts, key=lambda groups: (abs(groups - group.groups), -groups))
        return self._curves[(op, group.ranks, nearest)]

    def _analytic_s(self, op: Op, size_bytes: float, group: Group) -> float:
        link = self.cluster.inter if group.spans_nodes else self.cluster.intra
        if link.bytes_per_s is None:
            return 0.0
        n, latency_s = group.ranks, link.latency_s or constants.DEFAULT_LATENCY_S
        match op:
            case Op.P2P:
                return latency_s + size_bytes / link.bytes_per_s
            case Op.ALL_REDUCE:
                return 2 * (n - 1) * latency_s + 2 * (n - 1) / n * size_bytes / link.bytes_per_s
            case Op.ALL_GATHER | Op.REDUCE_SCATTER | Op.ALL_TO_ALL:
                return (n - 1) * latency_s + (n - 1) / n * size_bytes / link.bytes_per_s


def _noisy(curve: list[CommSample]) -> bool:
    """Whether the samples scatter more than a quarter: then their trend says more than each of them."""
    return len(curve) > 2 and statistics.median(sample.spread for sample in curve) > NOISY_SPREAD


def _fitted(curve: list[CommSample], size_bytes: float) -> CommCost:
    """Latency and seconds a byte, both at least 0, with the least squared relative error over the curve.

    Minimises sum ((a + b S_i) / t_i - 1)^2: two normal equations, or one where the other figure is 0.
    """
    u = [1 / s.seconds for s in curve if s.seconds > 0]
    v = [s.bytes / s.seconds for s in curve if s.seconds > 0]
    if not u:
        return FREE
    uu, uv, vv = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    latency_s = (sum(u) * vv - sum(v) * uv) / determinant if determinant > 0 else -1.0
    byte_s = (sum(v) * uu - sum(u) * uv) / determinant if determinant > 0 else -1.0
    if latency_s < 0:
        latency_s, byte_s = 0.0, sum(v) / vv
    elif byte_s < 0:
        latency_s, byte_s = sum(u) / uu, 0.0
    inside = curve[0].bytes <= size_bytes <= curve[-1].bytes
    return CommCost(seconds=latency_s + byte_s * size_bytes, origin="measured" if inside else "interpolated")


def _along(curve: list[CommSample], size_bytes: float) -> CommCost:
    """Log-log interpolation; below the first sample its latency, above the last its bandwidth."""
    sizes = [sample.bytes for sample in curve]
    if size_bytes <= sizes[0]:
        return CommCost(seconds=curve[0].seconds, origin="measured")
    if size_bytes >= sizes[-1]:
        origin = "measured" if size_bytes == sizes[-1] else "interpolated"
        return CommCost(seconds=curve[-1].seconds * size_bytes / sizes[-1], origin=origin)
    high = bisect.bisect_right(sizes, size_bytes)
    a, b = curve[high - 1], curve[high]
    share = math.log(size_bytes / a.bytes) / math.log(b.bytes / a.bytes)
    seconds = math.exp((1 - share) * math.log(a.seconds) + share * math.log(b.seconds))
    return CommCost(seconds=seconds, origin="measured" if share == 0 else "interpolated")

"""Time of a collective: measured curves where there are some, else latency and bandwidth.

In this order: the profile's curve for this op and as many ranks on as many nodes, of groups whose ranks are
most nearly as far apart, then of which most nearly as many are at work; the curves shipped for this kind of
device (`planner.hardware.measured_tables`, taken on other hosts, so "interpolated" at best); the form
below.

For n ranks and a full message of S bytes over a link with latency a and bandwidth B, in ring form:

    all-gather, reduce-scatter, all-to-all    (n - 1) a + (n - 1) / n * S / B
    all-reduce                              2 (n - 1) a + 2 (n - 1) / n * S / B
    send                                            a + S / B

An all-reduce is a reduce-scatter and an all-gather. Where it is known what part of B large messages reach
(`Link.share`), B is that part, and the transfer time x fills a pipeline that small messages do not need:

    t = L + x + SATURATION * L * x / (x + SATURATION_KNEE * L)          L the latency term

A group of n ranks on k nodes, g = n / k on each, has its ring's rate bounded by the slower of the link in the
node and the ports (each device has its share of them), and its latency is a ring in the node and a tree
between nodes:

    B = min(B_inside, B_between * (n - 1) / (k - 1))                    L = rounds * ((g - 1) a + log2(k) a')

An all-to-all sends (n - g) / n of S through a device's port, whatever the ring would do.

Overlap: what a message shows that runs beside work, and how much both are slowed by each other.

Work slows by the share w while both run (arXiv 2507.03114), a message by the share c. Of a message of t
seconds, work of s seconds hides as much as it lasts; what is left goes on alone at its own rate:

    shown(t, s) = (t' - h) / (1 + c) + w h,    t' = (1 + c) t,    h = min(t', s)

A profile may hold both shares, measured by products beside copies; else w is usual and c 0.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any

from planner.cost.constants import OVERLAP_SLOWDOWN
from planner.foundation.arrays import smaller
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec, Link
from planner.hardware.measured_tables import CollectiveCurves, curves_of, rising, wire_factor
from planner.job.problem import PlanningProblem
from planner.profile.profile import NOISY_SPREAD, CommSample, Op, Profile

DEFAULT_LATENCY_S = 10e-6
"""Latency of one hop where a link states none: launch and handshake of one NCCL step."""


@frozen
class Group:
    """`ranks` ranks, `groups` such groups at work at once in a node, inside a node or across nodes.

    `nodes` is how many nodes the group touches, evenly; None: as many as it has ranks, or as there are. Its
    ranks are `stride` apart.
    """

    ranks: int
    groups: int
    spans_nodes: bool
    nodes: int | None = None
    stride: int = 1


@frozen
class CommCost:
    """Seconds of a communication and where the figure comes from."""

    seconds: float
    origin: str


SATURATION, SATURATION_KNEE = 2.0, 0.5
"""Latencies that a large message takes more than a small one, and the transfer time, in latencies, at which
half of them are felt. Fitted to the shipped curves inside nodes (mean error 8 %; 17 % without) and the four
between nodes (16 %), aiconfigurator-core 0.12.0 and published NCCL tests."""
FREE = CommCost(seconds=0.0, origin="measured")


class CommModel:
    """Communication costs of one planning problem."""

    def __init__(self, problem: PlanningProblem) -> None:
        self.cluster, self._profile = problem.cluster, problem.profile
        self._known: dict[tuple[Op, float, Group], CommCost] = {}
        self._constants: dict[str, float] = {}
        measured: dict[tuple[Op, int, int], dict[tuple[int, int], list[CommSample]]] = {}
        for sample in problem.profile.comms if problem.profile else ():
            if sample.seconds > 0:
                shapes = measured.setdefault((sample.op, sample.ranks, sample.nodes), {})
                shapes.setdefault((sample.stride, sample.groups), []).append(sample)
        self._curves = {
            key: {shape: _curve_of(samples) for shape, samples in shapes.items()}
            for key, shapes in measured.items()
        }
        self._shipped = _shipped_curves(self.cluster)
        self._all_nodes = sum(group.nodes for group in self.cluster.groups)

    def cost(self, op: Op, size_bytes: float, group: Group) -> CommCost:
        """Seconds of `op` over `group` for a full message of `size_bytes`."""
        key = op, size_bytes, group
        if key not in self._known:
            self._known[key] = self._cost(op, size_bytes, group)
        return self._known[key]

    def constant(self, name: str) -> float:
        """A constant that the profile measured, or 0."""
        if name not in self._constants:
            self._constants[name] = (self._profile.constant(name) or 0.0) if self._profile else 0.0
        return self._constants[name]

    def _cost(self, op: Op, size_bytes: float, group: Group) -> CommCost:
        if group.ranks == 1 or size_bytes <= 0:
            return FREE
        curve = self._curve(op, group)
        if curve:
            return _fitted(curve, size_bytes) if _noisy(curve) else _along(curve, size_bytes)
        if group.spans_nodes:
            return CommCost(
                seconds=self._between_s(op, size_bytes, group), origin=self.cluster.inter.share_origin
            )
        if self._shipped:
            return max(
                (
                    CommCost(seconds=seconds, origin=origin)
                    for seconds, origin in (c.seconds(op, group.ranks, size_bytes) for c in self._shipped)
                ),
                key=lambda cost: cost.seconds,
            )
        return CommCost(
            seconds=self._inside_s(op, size_bytes, group.ranks), origin=self.cluster.intra.share_origin
        )

    def _curve(self, op: Op, group: Group) -> list[CommSample] | None:
        """The curve of this group size, most nearly as far apart, then with most nearly as many at once."""
        shapes = self._curves.get((op, group.ranks, self._nodes_of(group) if group.spans_nodes else 1))
        if not shapes:
            return None
        return shapes[min(shapes, key=lambda shape: _unlikeness(shape, group))]

    def _nodes_of(self, group: Group) -> int:
        """Nodes that a group over nodes touches."""
        return max(2, min(group.ranks, group.nodes or self._all_nodes))

    def _inside_s(self, op: Op, size_bytes: float, ranks: int) -> float:
        """A group inside a node, by the form of the module's docstring."""
        link = self.cluster.intra
        if link.bytes_per_s is None:
            return 0.0
        steps = 1 if op is Op.P2P else ranks - 1
        latency_s = _rounds(op) * steps * _latency_s(link)
        return _saturating_s(link, latency_s, wire_factor(op, ranks) * size_bytes / _rate(link))

    def _between_s(self, op: Op, size_bytes: float, group: Group) -> float:
        """A group over several nodes, by the form of the module's docstring."""
        intra, inter = self.cluster.intra, self.cluster.inter
        if inter.bytes_per_s is None:
            return 0.0
        n, port = group.ranks, _rate(inter)
        if op is Op.P2P:
            return _saturating_s(inter, _latency_s(inter), size_bytes / port)
        k = self._nodes_of(group)
        in_node = n / k
        latency_s = _rounds(op) * ((in_node - 1) * _latency_s(intra) + math.log2(k) * _latency_s(inter))
        inside = self._inside_rate(op) if in_node > 1 else math.inf
        if op is Op.ALL_TO_ALL:
            transfer_s = max((n - in_node) / n * size_bytes / port, (in_node - 1) / n * size_bytes / inside)
        else:
            transfer_s = wire_factor(op, n) * size_bytes / min(inside, port * (n - 1) / (k - 1))
        return _saturating_s(inter, latency_s, transfer_s)

    def _inside_rate(self, op: Op) -> float:
        """Bytes a second that large messages reach inside a node."""
        if self._shipped:
            return min(curves.bus_bytes_per_s(op) for curves in self._shipped)
        return math.inf if self.cluster.intra.bytes_per_s is None else _rate(self.cluster.intra)


def _unlikeness(shape: tuple[int, int], group: Group) -> tuple[float, int, int]:
    """How far groups that were measured, (stride, groups at once), are from one: by stride, by number."""
    stride, groups = shape
    return abs(math.log2(stride / group.stride)), abs(groups - group.groups), -groups


def _shipped_curves(cluster: ClusterSpec) -> tuple[CollectiveCurves, ...]:
    """Curves of every kind of device that has neighbours in its node; none unless all have some.

    They hold for a device's own link: where the nodes' link is another (PCIe beyond the domain, one that the
    user stated, none), there are none.
    """
    devices = {g.device.name: g.device for g in cluster.groups if g.devices_per_node > 1}
    own = {(device.link, device.link_bytes_per_s) for device in devices.values()}
    if cluster.intra.bytes_per_s is None or (cluster.intra.name, cluster.intra.bytes_per_s) not in own:
        return ()
    curves = [curves_of(name) for name in devices]
    return tuple(found for found in curves if found) if all(curves) else ()


def _rounds(op: Op) -> int:
    return 2 if op is Op.ALL_REDUCE else 1


def _latency_s(link: Link) -> float:
    return link.latency_s or DEFAULT_LATENCY_S


def _rate(link: Link) -> float:
    """Bytes a second that large messages reach: the nominal rate where nothing else is known."""
    assert link.bytes_per_s is not None
    return link.bytes_per_s * (1.0 if link.share is None else link.share)


def _saturating_s(link: Link, latency_s: float, transfer_s: float) -> float:
    """Latency and transfer, and what large messages take besides where the link's share is known."""
    if link.share is None:
        return latency_s + transfer_s
    fill_s = SATURATION * latency_s * transfer_s / (transfer_s + SATURATION_KNEE * latency_s)
    return latency_s + transfer_s + fill_s


def _curve_of(samples: list[CommSample]) -> list[CommSample]:
    """Samples by size. Those of a curve that is followed rise: neighbours that fall share their mean."""
    curve = sorted(samples, key=lambda s: s.bytes)
    if _noisy(curve):
        return curve
    seconds = rising([sample.seconds for sample in curve])
    return [dataclasses.replace(s, seconds=each) for s, each in zip(curve, seconds, strict=True)]


def _noisy(curve: list[CommSample]) -> bool:
    """Whether the samples scatter more than a quarter: then their trend says more than each of them."""
    import statistics

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


@frozen
class Overlap:
    """How much longer work and messages take while both run, as shares."""

    work_slowdown: float
    message_slowdown: float

    def shown_s(self, message_s: Any, work_s: Any) -> Any:
        """Seconds that a message adds to the work beside it; of one or, as arrays, of many."""
        slowed_s = (1 + self.message_slowdown) * message_s
        hidden_s = smaller(slowed_s, work_s)
        return (slowed_s - hidden_s) / (1 + self.message_slowdown) + self.work_slowdown * hidden_s


def overlap_of(profile: Profile | None) -> Overlap:
    """The shares of a profile, where it measured them."""
    work = profile.constant("overlap_slowdown") if profile else None
    message = profile.constant("overlap_message_slowdown") if profile else None
    return Overlap(
        work_slowdown=OVERLAP_SLOWDOWN if work is None else work,
        message_slowdown=message or 0.0,
    )

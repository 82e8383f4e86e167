"""Parts of a cluster that a plan may use alone, and what no plan on them can beat.

With C the price of an hour, T tokens in all, t of them a step, and s a bound of the step time,

    seconds >= ramp-up + T / t x u / share kept      u = max(s, t / loader) and evaluation
    dollars >= C x seconds / 3600                    C with the spare nodes

with the share kept of planner.cost.goodput for k steps between checkpoints (one, where the best interval was
asked for), restarts that load nothing, and nodes in repair: waiting for checkpoints and for the slowest
device only adds to it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from planner.cost.evaluate import CostModel
from planner.cost.goodput import evaluation_s, most_kept, spares_factor
from planner.cost.stage.layer_cost import LayerModel
from planner.hardware.cluster import ClusterSpec
from planner.job.problem import PlanningProblem
from planner.search.quick_bounds import space_bounds_s
from planner.search.space import space_of
from planner.strategy.fixed_choices import FixedChoices

EVERY_COUNT = 16
"""Up to this many nodes every number is tried."""
MOST_BESIDE_BATCH = 8
"""Beyond it, what of a number of nodes does not divide the batch is left to the pipeline: at most this."""

_LEADING_COUNT = re.compile(r"^([0-9]+)(?=\s*[x*])")


def node_counts(cluster: ClusterSpec, batch: int) -> list[int]:
    """Numbers of nodes to try, of 1 up to all, which is last.

    Of a cluster of several kinds only all: the price of a part is not known.
    """
    if len(cluster.groups) > 1:
        return [sum(group.nodes for group in cluster.groups)]
    whole = cluster.groups[0].nodes
    return [n for n in range(1, whole + 1) if n <= EVERY_COUNT or _sensible(n, whole, batch)]


def _sensible(nodes: int, whole: int, batch: int) -> bool:
    return whole % nodes == 0 or nodes // math.gcd(nodes, batch) <= MOST_BESIDE_BATCH


def part_of(cluster: ClusterSpec, nodes: int) -> ClusterSpec:
    """So many nodes of a cluster, at their share of its price."""
    whole = sum(group.nodes for group in cluster.groups)
    if nodes == whole:
        return cluster
    (group,) = cluster.groups
    price = cluster.price_usd_per_hour
    return dataclasses.replace(
        cluster,
        name=_name(cluster.name, nodes, whole),
        groups=(dataclasses.replace(group, nodes=nodes),),
        price_usd_per_hour=None if price is None else price * nodes / whole,
    )


def _name(name: str, nodes: int, whole: int) -> str:
    """The name with its own number of nodes changed, where it begins with that."""
    found = _LEADING_COUNT.match(name)
    if found and int(found.group(1)) == whole:
        return f"{nodes}{name[found.end() :]}"
    return f"{nodes} of {whole} nodes of {name}"


class StepBounds:
    """Times that no strategy of any shape on a part of the cluster beats. Parts share the costs of layers."""

    def __init__(self, pins: FixedChoices) -> None:
        self.pins = pins
        self._layers: dict[str, LayerModel] = {}

    def of(self, problem: PlanningProblem) -> float:
        """A bound of the step time; infinite where no shape is legal."""
        network = problem.cluster.network
        model = CostModel(problem, self._layers.get(network))
        self._layers.setdefault(network, model.layers)
        quick_s, _, _ = space_bounds_s(model, space_of(problem, self.pins), self.pins.recomputes)
        return float(quick_s.min(initial=math.inf))


def run_bound_s(problem: PlanningProblem, step_s: float) -> float:
    """Seconds that the whole run takes at least with steps of `step_s`."""
    workload, upkeep = problem.workload, problem.upkeep
    assert workload.tokens is not None, "checked when the goal was read"
    each_s = step_s
    if upkeep.data_tokens_per_s is not None:
        each_s = max(step_s, workload.tokens_per_step / upkeep.data_tokens_per_s)
    each_s += evaluation_s(upkeep)
    steps = workload.tokens / workload.tokens_per_step
    kept = most_kept(problem.cluster, upkeep, steps, each_s)
    return (upkeep.ramp_up_s or 0.0) + steps * each_s / kept if kept > 0 else math.inf


def dollars(problem: PlanningProblem, seconds: float) -> float:
    """What the cluster and its spare nodes cost for so long; infinite where its price is not known."""
    cluster = problem.cluster
    if cluster.price_usd_per_hour is None:
        return math.inf
    nodes = sum(group.nodes for group in cluster.groups)
    return cluster.price_usd_per_hour * spares_factor(problem.upkeep, nodes) * seconds / 3600


def parts(problem: PlanningProblem) -> Iterator[tuple[int, PlanningProblem]]:
    """The problem on each number of nodes."""
    for nodes in node_counts(problem.cluster, problem.workload.batch):
        yield nodes, dataclasses.replace(problem, cluster=part_of(problem.cluster, nodes))

"""The memory of pipeline ranks against their limits: which rank is nearest to its own, and the verdict.

Ranks on equal devices are judged together. The answer is that of the worst verdict, and among equal ones of
the rank that takes the largest part of its limit: in a mixed cluster not always that of the most bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.cost.fit.run_memory import memory_figures
from planner.cost.fit.verdict import memory_band, verdict
from planner.cost.stage.stage import ShapeModel
from planner.cost.stage.stage_cost import StageCost
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Coverage, MemoryBreakdown, MemoryFigures, Verdict


class RankMemory(NamedTuple):
    """The stages that a pipeline rank holds, their tenants, and what of them lies in host memory."""

    held: dict[int, StageCost]
    parts: dict[int, MemoryBreakdown]
    host_bytes: float = 0.0

    @property
    def peak_bytes(self) -> int:
        return sum(part.total_bytes for part in self.parts.values())


class JudgedMemory(NamedTuple):
    """The peak of a rank, its limit, the interval around it, what it is made of, and whether it fits."""

    peak_bytes: int
    limit_bytes: int
    interval_bytes: tuple[int, int]
    figures: MemoryFigures
    verdict: Verdict

    @property
    def pressure(self) -> tuple[int, float]:
        """How bad the verdict is, then the part of the limit that is taken."""
        return list(Verdict).index(self.verdict), self.peak_bytes / max(self.limit_bytes, 1)


def most_pressed(
    shapes: Sequence[ShapeModel], ranks: Sequence[RankMemory], known: Iterable[tuple[ShapeModel, Coverage]]
) -> JudgedMemory:
    """The judged memory of the worst of some ranks. `known` are the distinct shapes and their coverage."""
    judged = []
    for shape, coverage in known:
        own = [rank for rank, other in zip(ranks, shapes, strict=True) if other is shape]
        judged.append(_judged(shape, own, coverage))
    return max(judged, key=lambda each: each.pressure)


def _judged(shape: ShapeModel, ranks: Sequence[RankMemory], coverage: Coverage) -> JudgedMemory:
    """Equal devices: the rank of the largest peak, and the node whose ranks offload most."""
    fullest = max(ranks, key=lambda rank: rank.peak_bytes)
    hosted = max(rank.host_bytes for rank in ranks)
    figures = memory_figures(shape, fullest.held, fullest.parts, hosted)
    problem, peak = shape.problem, fullest.peak_bytes
    error = memory_band(problem, coverage)
    fits = verdict(peak, problem.memory_limit_bytes, error)
    return JudgedMemory(
        peak_bytes=peak,
        limit_bytes=problem.memory_limit_bytes,
        interval_bytes=(round(peak * (1 - error.lower)), round(peak * (1 + error.upper))),
        figures=figures,
        verdict=fits if _host_holds(problem, figures) else Verdict.NO,
    )


def _host_holds(problem: PlanningProblem, figures: MemoryFigures) -> bool:
    """Whether the memory of a node, if known, holds what is offloaded to it."""
    share = problem.cluster.host_memory_bytes_per_device
    if not figures.hosted_bytes or share is None:
        return True
    return figures.host_bytes <= share * problem.cluster.devices_per_node

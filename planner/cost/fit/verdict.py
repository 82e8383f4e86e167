"""Whether a predicted peak fits: SAFE, RISKY or NO, by a band of errors.

The band is of measured over predicted, less 1: from -lower to +upper. Where a calibration left quantiles of
its residuals in the profile (memory_error_lower, memory_error_upper), they are the band; else the priors by
origin, weighted by how much of an estimate rests on each.

    SAFE    peak (1 + upper) <= limit
    NO      peak (1 - lower) > limit
    RISKY   between

The memory of pipeline ranks against their limits: which rank is nearest to its own, and the verdict.

Ranks on equal devices are judged together. The answer is that of the worst verdict, and among equal ones of
the rank that takes the largest part of its limit: in a mixed cluster not always that of the most bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.cost import constants
from planner.cost.fit.peak_memory import memory_figures
from planner.cost.memory_constants import fitted_constant, memory_constants
from planner.cost.stage.stage import ShapeModel, StageCost
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Coverage, MemoryBreakdown, MemoryFigures, Verdict

ORIGINS = ("measured", "interpolated", "fitted", "datasheet")


@frozen
class ErrorBand:
    """How far a measured peak may lie below and above its prediction, as shares of the prediction."""

    lower: float
    upper: float


def band(errors: dict[str, float], coverage: Coverage) -> float:
    """The error of a mixture of origins: their errors weighted by share."""
    return float(sum(errors[origin] * getattr(coverage, origin) for origin in ORIGINS))


@frozen
class MemoryLimits:
    """What a problem says of peaks: its limit, the band where runs left one, the allocator's slack."""

    limit_bytes: int
    lower: float | None
    upper: float | None
    slack: float

    def band(self, coverage: Coverage) -> ErrorBand:
        """The band of its predictions that rest on such origins."""
        return _band(self.lower, self.upper, coverage)

    def safe_tensor_bytes(self, coverage: Coverage, runtime_bytes: float) -> float:
        """What tensors and pools may take for a peak that is still SAFE, `runtime_bytes` of it included.

        The allocator's slack multiplies all but the runtime: peak = slack x tensors + runtime.
        """
        peak = safe_peak_bytes(self.limit_bytes, self.band(coverage))
        return (peak - runtime_bytes) / self.slack + runtime_bytes


def memory_limits(problem: PlanningProblem) -> MemoryLimits:
    """Those of a problem."""
    lower, upper = _fitted_errors(problem)
    slack = memory_constants(problem).allocator_slack
    return MemoryLimits(limit_bytes=problem.memory_limit_bytes, lower=lower, upper=upper, slack=slack)


def memory_band(problem: PlanningProblem, coverage: Coverage) -> ErrorBand:
    """The band of a problem's memory predictions."""
    return _band(*_fitted_errors(problem), coverage)


def _fitted_errors(problem: PlanningProblem) -> tuple[float | None, float | None]:
    lower, upper = (fitted_constant(problem, f"memory_error_{name}") for name in ("lower", "upper"))
    return lower, upper


def _band(lower: float | None, upper: float | None, coverage: Coverage) -> ErrorBand:
    prior = band(constants.MEMORY_ERROR, coverage)
    return ErrorBand(
        lower=prior if lower is None else lower,
        upper=prior if upper is None else upper,
    )


def verdict(peak_bytes: float, limit_bytes: float, error: ErrorBand) -> Verdict:
    """SAFE where even the upper end of the band fits, NO where even the lower end does not."""
    if peak_bytes * (1 + error.upper) <= limit_bytes:
        return Verdict.SAFE
    return Verdict.RISKY if peak_bytes * (1 - error.lower) <= limit_bytes else Verdict.NO


def safe_peak_bytes(limit_bytes: float, error: ErrorBand) -> float:
    """The largest predicted peak that is still judged SAFE."""
    return limit_bytes / (1 + error.upper)


def safe_tensor_bytes(problem: PlanningProblem, coverage: Coverage, runtime_bytes: float) -> float:
    """The same of a problem that is asked once (MemoryLimits)."""
    return memory_limits(problem).safe_tensor_bytes(coverage, runtime_bytes)


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

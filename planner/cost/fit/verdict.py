"""Whether a predicted peak fits: SAFE, RISKY or NO, by a band of errors.

The band is of measured over predicted, less 1: from -lower to +upper. Where a calibration left quantiles of
its residuals in the profile (memory_error_lower, memory_error_upper), they are the band; else the priors by
origin, weighted by how much of an estimate rests on each.

    SAFE    peak (1 + upper) <= limit
    NO      peak (1 - lower) > limit
    RISKY   between
"""

from __future__ import annotations

from planner.cost import constants
from planner.cost.memory_constants import fitted_constant, memory_constants
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Coverage, Verdict

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

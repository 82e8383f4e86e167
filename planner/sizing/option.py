"""Option: a number of nodes of an offer at a rate, with its plan, its days and its dollars."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.sizing.offer import Rate
from planner.strategy.estimate import Coverage, JobFigures, TimeBreakdown, Verdict
from planner.strategy.strategy import Strategy


@frozen
class SizedPlan:
    """The plan of an option, short: what it does, how long a step takes, and whether it fits.

    `lower_bound_s` is a time that no step of usual choices (planner.search.space) beats on these nodes; what
    other choices may reach `plan solve` bounds.
    """

    label: str
    strategy: Strategy
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    lower_bound_s: float
    tokens_per_s: float
    mfu: float | None
    verdict: Verdict
    peak_memory_bytes: int
    memory_limit_bytes: int
    breakdown: TimeBreakdown
    coverage: Coverage


@frozen
class Option:
    """One way to do the run. Seconds, days and dollars are of all tokens, at the job's goodput.

    `cost_usd` and its interval are None where no price is known. The interval spans the step time's and the
    rate's. `pareto`: no option is both cheaper and sooner. `meets`: deadline and budget are kept. Energy is
    that of the whole data centre.
    """

    cluster: str
    provider: str
    instance: str
    device: str
    nodes: int
    devices: int
    devices_per_node: int
    network: str
    region: str
    rate: Rate
    plan: SizedPlan
    step_time_s: float
    days: float
    days_interval: tuple[float, float]
    cost_usd: float | None
    cost_interval_usd: tuple[float, float] | None
    usd_per_billion_tokens: float | None
    goodput: float
    losses: JobFigures | None
    energy_kwh: float | None = None
    carbon_kg: float | None = None
    pareto: bool = False
    meets: bool = True

    @property
    def name(self) -> str:
        """The option for people: `64 x aws/p5.48xlarge, on-demand`."""
        thing = (
            f"{self.provider}/{self.instance}" if self.instance else f"{self.devices_per_node} {self.device}"
        )
        return f"{self.nodes} x {thing}, {self.rate.pricing}"

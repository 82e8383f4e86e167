"""Comparison: the options for one run beside each other, and all that they rest on."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.job.objective import Goal
from planner.model.workload import Workload
from planner.sizing.option import Option


@frozen
class LeftOut:
    """An offer that has no option: which rule or number stands in the way."""

    offer: str
    reason: str


@frozen
class Assumption:
    """What the figures rest on: a statement with its source and date, and how to change it."""

    what: str
    value: str
    source: str
    as_of: str = ""
    flag: str = ""


@frozen
class Sensitivity:
    """What changes where an input does: the best option's figures at the low and high end of it."""

    what: str
    low: str
    high: str
    low_days: float
    high_days: float
    low_cost_usd: float | None
    high_cost_usd: float | None
    best_stays: bool
    best_at_low: str = ""
    best_at_high: str = ""


@frozen
class BreakEven:
    """Buying against renting one device: the share of hours in use above which buying is cheaper.

    `utilisation` is None where renting is cheaper even at full use, and 0 where the rent runs on through idle
    hours and is dearer. `months` until owning has paid for itself at `owned_at_utilisation`; None: not within
    the years that it is used for.
    """

    device: str
    rented: str
    rented_usd_per_device_hour: float
    owned_usd_per_device_hour: float
    owned_at_utilisation: float
    utilisation: float | None
    months: float | None


@frozen
class Comparison:
    """All options of a run: those that keep the goal first, of them the cheapest first; of equal standing
    those without a price come last, the soonest first."""

    model: str
    params_total: int
    params_active: int
    workload: Workload
    tokens_note: str
    goal: Goal
    options: tuple[Option, ...]
    left_out: tuple[LeftOut, ...]
    assumptions: tuple[Assumption, ...]
    sensitivity: tuple[Sensitivity, ...]
    break_even: tuple[BreakEven, ...]
    not_modelled: tuple[str, ...]
    created: str
    version: str

    @property
    def pareto(self) -> tuple[Option, ...]:
        """Options that no other beats in both dollars and days, the cheapest first."""
        return tuple(option for option in self.options if option.pareto)

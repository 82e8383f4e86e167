"""Comparison: the options for one run beside each other, and all that they rest on.

Offer: nodes that can be had, and at which rates.

Option: a number of nodes of an offer at a rate, with its plan, its days and its dollars.

SizingRequest: what is asked of a sizing: the run, its limits, and which hardware may do it.

What a sizing answers: the smallest, the cheapest and the soonest option that keep the goal, and of each
offer its best, or by how much it misses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.hardware.cluster import Device
from planner.job.objective import Goal
from planner.job.problem import NO_OVERHEADS, JobOverheads
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.profile.profile import Profile
from planner.strategy.estimate import Coverage, JobFigures, TimeBreakdown, Verdict
from planner.strategy.strategy import Strategy


class Pricing(StrEnum):
    """How nodes are paid for."""

    ON_DEMAND = "on-demand"
    SPOT = "spot"
    RESERVED_1Y = "reserved-1y"
    RESERVED_3Y = "reserved-3y"
    ON_PREMISES = "on-premises"
    YOURS = "yours"

    @property
    def interruptible(self) -> bool:
        """Whether the provider may take nodes back while they are paid for."""
        return self is Pricing.SPOT


@frozen
class Rate:
    """Dollars an hour of one node under one pricing, with the range that its source gives.

    `usd_per_node_hour` is None where no price is known: it stays unknown, it is never 0. `includes` says what
    the price covers.
    """

    pricing: Pricing
    usd_per_node_hour: float | None
    low_usd_per_node_hour: float | None = None
    high_usd_per_node_hour: float | None = None
    as_of: str = ""
    source: str = ""
    includes: str = ""
    doubtful: str = ""


@frozen
class Offer:
    """Equal nodes of one kind of device from one provider. `network` is as in `--cluster`; empty: one node
    alone, since nothing is known of what connects several.

    `instance` is empty where devices are named without one: then nodes are of `devices_per_node` and stand
    on one's own premises or have a price of the user's. `counts` are the only numbers of nodes to look at,
    where some were named; of an instance, `named_network` says that its network was named too.
    """

    provider: str
    instance: str
    device: Device
    devices_per_node: int
    network: str
    rates: tuple[Rate, ...]
    region: str = ""
    counts: tuple[int, ...] = ()
    named_network: bool = False

    @property
    def name(self) -> str:
        """The offer for people: `aws/p5.48xlarge`, or `8 x h100-sxm-80gb`."""
        if self.instance:
            return f"{self.provider}/{self.instance}"
        return f"{self.devices_per_node} x {self.device.name}"

    def cluster_text(self, nodes: int) -> str:
        """So many nodes of it as `--cluster` takes them."""
        if self.instance:
            named = f"@{self.network}" if self.named_network else ""
            return f"{nodes}*{self.provider}/{self.instance}{named}"
        network = f"@{self.network}" if self.network else ""
        return f"{nodes}x{self.devices_per_node}:{self.device.name}{network}"


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


@frozen
class SizingRequest:
    """A run, and the offers that may do it.

    `workload.tokens` is the whole run; where `precision` is None, each device computes in its usual one.
    Fields that `overheads` leaves open have their usual values (planner.sizing.usual_overheads). `counts`
    are numbers of nodes to try; None: a ladder up to `most_devices`, of which `least` asks for the
    fewest that keep the deadline and the cheapest; unless `thorough`, what can neither be the cheapest
    nor the smallest even at its devices' peak is not planned then. `profile` counts for the device it
    was measured on, or if it was fitted for all; other devices have their shipped ones.
    """

    model: ModelSpec
    workload: Workload
    offers: tuple[Offer, ...]
    goal: Goal
    tokens_note: str = ""
    precision: Precision | None = None
    overheads: JobOverheads = NO_OVERHEADS
    counts: tuple[int, ...] | None = None
    most_devices: int = 16384
    least: bool = False
    thorough: bool = True
    memory_limit_bytes: int | None = None
    profile: Profile | None = None


class Standing(StrEnum):
    """What stands between an offer and the goal."""

    KEEPS = "keeps the goal"
    LATE = "misses the deadline"
    DEAR = "is beyond the budget"
    EITHER = "keeps the deadline or the budget, not both"
    NEITHER = "misses the deadline and the budget"
    UNPRICED = "keeps the deadline; its price is unknown"


@frozen
class Outcome:
    """One offer at one rate: its best option by the goal, and where it misses, the nearest to it."""

    offer: str
    standing: Standing
    best: Option


class Extremes(NamedTuple):
    """Of some options the one with the fewest devices, the fewest dollars (of those with a price), the fewest
    days; None where there is none."""

    smallest: Option | None
    cheapest: Option | None
    soonest: Option | None


@frozen
class Answers:
    """The options that matter among those that keep the goal; None where none does."""

    smallest: Option | None
    cheapest: Option | None
    soonest: Option | None
    outcomes: tuple[Outcome, ...]


def extremes(options: Sequence[Option]) -> Extremes:
    """The extremes; of equal ones the cheaper, then the sooner."""
    priced = [option for option in options if option.cost_usd is not None]
    return Extremes(
        smallest=_least(options, lambda o: (o.devices, _usd(o), o.days)),
        cheapest=_least(priced, lambda o: (_usd(o), o.days)),
        soonest=_least(options, lambda o: (o.days, _usd(o))),
    )


def answers_of(found: Comparison) -> Answers:
    """The answers that a comparison holds; offers that keep the goal first, the best of them first."""
    best = extremes([option for option in found.options if option.meets])
    groups: dict[str, list[Option]] = defaultdict(list)
    for option in found.options:
        groups[option.name.partition(" x ")[2]].append(option)
    outcomes = [_outcome(name, options, found.goal) for name, options in groups.items()]
    order = list(Standing)
    return Answers(
        **best._asdict(),
        outcomes=tuple(
            sorted(outcomes, key=lambda o: (order.index(o.standing), _usd(o.best), o.best.days, o.offer))
        ),
    )


def _outcome(name: str, options: Sequence[Option], goal: Goal) -> Outcome:
    kept = [option for option in options if option.meets]
    if kept:
        return Outcome(offer=name, standing=Standing.KEEPS, best=min(kept, key=lambda o: (_usd(o), o.days)))
    in_time = [option for option in options if _in_time(option, goal)]
    cheap = any(_usd(option) <= (goal.budget_usd or float("inf")) for option in options)
    if not in_time:
        late = Standing.LATE if cheap or goal.budget_usd is None else Standing.NEITHER
        return Outcome(offer=name, standing=late, best=min(options, key=lambda o: (o.days, _usd(o))))
    best = min(in_time, key=lambda o: (_usd(o), o.days))
    if best.cost_usd is None:
        return Outcome(offer=name, standing=Standing.UNPRICED, best=best)
    return Outcome(offer=name, standing=Standing.EITHER if cheap else Standing.DEAR, best=best)


def _in_time(option: Option, goal: Goal) -> bool:
    return goal.deadline_s is None or option.days * DAY_S <= goal.deadline_s


def _usd(option: Option) -> float:
    return float("inf") if option.cost_usd is None else option.cost_usd


def _least(options: Iterable[Option], key: Callable[[Option], tuple[float, ...]]) -> Option | None:
    return min(options, key=key, default=None)

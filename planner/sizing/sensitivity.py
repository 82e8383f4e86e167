"""Sensitivity: which option is best, in how many days and for how much, where an input is not what it is.

Each input moves to both its ends for all options at once, with everything else as it is:

    prices                  p x 0.8, p x 1.2; only those of the best option; each to the ends of its range
    step times              t to the ends of its interval: days and dollars x end / t
    failures                their rate halved and doubled: days and dollars x goodput / goodput there
    utilisation on premises 20 points down and up, at most all hours: dollars x owned(u') / owned(u)

with owned(u) of planner.sizing.sensitivity. The best is by the goal: of the options that keep deadline and
budget the soonest or the cheapest; where none keeps them the same of all, and its name says so. The interval
between checkpoints stays as it is when failures change, which a job may not know beforehand.

Buying against renting a device: above which use owning is cheaper, and when it has paid for itself.

The cost on premises (planner.hardware.on_premises) is of an hour in use. What goes on through idle hours is
divided by the utilisation u, the share of hours in use; electricity is not:

    owned(u) = (running + written off) / u + energy                             dollars a device-hour in use
    owned(u*) = rent  =>  u* = (running + written off) / (rent - energy)

with running: room and staff, written off: capital less its residual over the years of use, both of every
hour. Renting is cheaper even at full use, and u* is None, where it would be above 1. At utilisation u owning
spends less than renting by `saved` dollars an hour, capital aside, and has paid for itself when that has
grown to all that is written off over the years; at u* this is at their end, below it never:

    saved  = u (rent - energy) - running
    months = written off x years / (saved x 730 h)          730 h = 8760 h / 12

Rent on demand, as spot or at a price of the user's is of hours in use. A reserved rate runs on through idle
hours: it costs rent / u an hour in use, so owning is cheaper at every use (u* = 0) where it is at full use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.hardware.device_file import DeviceFile
from planner.hardware.on_premises import OnPremises, cost_per_device_hour
from planner.job.objective import Goal, Minimise
from planner.sizing.comparison import BreakEven, Offer, Option, Pricing, Rate, Sensitivity

COMMITTED = frozenset({Pricing.RESERVED_1Y, Pricing.RESERVED_3Y})
"""Pricings that are paid for in idle hours too."""


@frozen
class Owned:
    """One device of one's own, in dollars of every hour, in use or not, and of an hour in use besides."""

    device: str
    running_usd_per_hour: float
    written_off_usd_per_hour: float
    energy_usd_per_used_hour: float
    years: float

    @property
    def fixed_usd_per_hour(self) -> float:
        return self.running_usd_per_hour + self.written_off_usd_per_hour

    def usd_per_used_hour(self, utilisation: float) -> float:
        """What an hour in use costs where this share of hours is in use."""
        return self.fixed_usd_per_hour / utilisation + self.energy_usd_per_used_hour


def owned(facts: DeviceFile, inputs: OnPremises) -> Owned | None:
    """What owning a device costs; None where its purchase price or its power is unknown."""
    full = dataclasses.replace(inputs, utilisation=dataclasses.replace(inputs.utilisation, value=1.0))
    cost = cost_per_device_hour(facts, full)
    if cost is None:
        return None
    return Owned(
        device=facts.name,
        running_usd_per_hour=cost.facility_usd + cost.staff_usd,
        written_off_usd_per_hour=cost.written_off_usd,
        energy_usd_per_used_hour=cost.energy_usd,
        years=inputs.years.value,
    )


def break_even_utilisation(device: Owned, rent_usd: float, pricing: Pricing) -> float | None:
    """u* for a rent of `rent_usd` a device-hour, or None where renting is cheaper even at full use."""
    margin = rent_usd - device.energy_usd_per_used_hour
    if margin <= 0 or margin < device.fixed_usd_per_hour:
        return None
    return 0.0 if pricing in COMMITTED else device.fixed_usd_per_hour / margin


def months_to_pay_back(device: Owned, rent_usd: float, pricing: Pricing, utilisation: float) -> float | None:
    """Months until owning has paid for itself at a utilisation; None where that is after its years of use."""
    rent_usd_per_hour = rent_usd if pricing in COMMITTED else rent_usd * utilisation
    saved = rent_usd_per_hour - utilisation * device.energy_usd_per_used_hour - device.running_usd_per_hour
    life_months = 12 * device.years
    if saved <= 0:
        return None
    months = life_months * device.written_off_usd_per_hour / saved
    return months if months <= life_months * (1 + 1e-9) else None


def break_evens(facts: DeviceFile, inputs: OnPremises, offers: Iterable[Offer]) -> tuple[BreakEven, ...]:
    """Owning a device against each priced rate of the offers of it, the cheapest rent first.

    Empty where owning it has no known cost. The utilisation for the months is that of `inputs`.
    """
    device = owned(facts, inputs)
    if device is None:
        return ()
    used = inputs.utilisation.value
    rates = [(offer, rate) for offer in offers if offer.device.name == facts.name for rate in offer.rates]
    found = [
        _against(device, used, offer, rate, rate.usd_per_node_hour / offer.devices_per_node)
        for offer, rate in rates
        if rate.usd_per_node_hour is not None and rate.pricing is not Pricing.ON_PREMISES
    ]
    return tuple(sorted(found, key=lambda row: (row.rented_usd_per_device_hour, row.rented)))


def _against(device: Owned, used: float, offer: Offer, rate: Rate, rent_usd: float) -> BreakEven:
    doubt = ", a doubtful price" if rate.doubtful else ""
    return BreakEven(
        device=device.device,
        rented=f"{offer.name}, {rate.pricing}{doubt}",
        rented_usd_per_device_hour=rent_usd,
        owned_usd_per_device_hour=device.usd_per_used_hour(used),
        owned_at_utilisation=used,
        utilisation=break_even_utilisation(device, rent_usd, rate.pricing),
        months=months_to_pay_back(device, rent_usd, rate.pricing, used),
    )


PRICE_CHANGE = 0.2
"""As asked for: what contracts and months change a listed price by."""
FAILURE_FACTOR = 2.0
UTILISATION_POINTS = 0.2


class Figures(NamedTuple):
    """Days and dollars of an option; None: no price is known."""

    days: float
    usd: float | None


Change = Callable[[Option], Figures]
"""The figures of an option at one end of an input."""


def sensitivities(
    options: Sequence[Option], goal: Goal, owned: Iterable[Owned] = (), utilisation: float | None = None
) -> tuple[Sensitivity, ...]:
    """What changes with each input that any of the options depends on.

    `owned` are the devices of options on premises, `utilisation` what their rates were made with.
    """
    if not options:
        return ()
    best = best_of(options, goal)
    rows = [
        *_prices(options, goal, best),
        *_step_times(options, goal),
        *_failures(options, goal),
        *_utilisation(options, goal, {device.device: device for device in owned}, utilisation),
    ]
    return tuple(rows)


def best_of(options: Sequence[Option], goal: Goal) -> Option:
    """The best option as things are."""
    return _best(options, goal, _as_is)[0]


def _as_is(option: Option) -> Figures:
    return Figures(option.days, option.cost_usd)


def _keeps(goal: Goal, figures: Figures) -> bool:
    usd = float("inf") if figures.usd is None else figures.usd
    return goal.meets(figures.days * DAY_S, usd)


def _best(options: Sequence[Option], goal: Goal, change: Change) -> tuple[Option, Figures]:
    """The best option under a change and its figures there; of equal ones the first."""

    def order(pair: tuple[Option, Figures]) -> tuple[bool, float, float]:
        usd = float("inf") if pair[1].usd is None else pair[1].usd
        figures = (usd, pair[1].days) if goal.minimise is Minimise.COST else (pair[1].days, usd)
        return (not _keeps(goal, pair[1]), *figures)

    return min(((option, change(option)) for option in options), key=order)


def _row(
    options: Sequence[Option], goal: Goal, what: str, low: tuple[str, Change], high: tuple[str, Change]
) -> Sensitivity:
    best = best_of(options, goal)
    at_low, low_figures = _best(options, goal, low[1])
    at_high, high_figures = _best(options, goal, high[1])
    return Sensitivity(
        what=what,
        low=low[0],
        high=high[0],
        low_days=low_figures.days,
        high_days=high_figures.days,
        low_cost_usd=low_figures.usd,
        high_cost_usd=high_figures.usd,
        best_stays=at_low is best and at_high is best,
        best_at_low=_told(at_low, goal, low_figures),
        best_at_high=_told(at_high, goal, high_figures),
    )


def _told(option: Option, goal: Goal, figures: Figures) -> str:
    return option.name if _keeps(goal, figures) else f"none keeps the limits; nearest {option.name}"


def _priced(option: Option, factor: float) -> Figures:
    return Figures(option.days, None if option.cost_usd is None else option.cost_usd * factor)


def _slowed(option: Option, factor: float) -> Figures:
    return Figures(option.days * factor, None if option.cost_usd is None else option.cost_usd * factor)


def _prices(options: Sequence[Option], goal: Goal, best: Option) -> Iterable[Sensitivity]:
    if all(option.cost_usd is None for option in options):
        return
    down, up = 1 - PRICE_CHANGE, 1 + PRICE_CHANGE
    low, high = f"-{PRICE_CHANGE:.0%}", f"+{PRICE_CHANGE:.0%}"
    yield _row(
        options,
        goal,
        "all prices",
        (low, lambda option: _priced(option, down)),
        (high, lambda option: _priced(option, up)),
    )
    if best.cost_usd is not None:
        own = (best.provider, best.instance, best.device, best.rate.pricing)

        def alone(factor: float) -> Change:
            return lambda option: _priced(
                option,
                factor
                if (option.provider, option.instance, option.device, option.rate.pricing) == own
                else 1.0,
            )

        named = best.name.partition(" x ")[2]
        yield _row(options, goal, f"the price of {named} alone", (low, alone(down)), (high, alone(up)))
    if any(option.rate.low_usd_per_node_hour is not None for option in options):
        yield _row(
            options,
            goal,
            "prices that their sources give as a range",
            ("low ends", lambda option: _priced(option, _rate_factor(option, low=True))),
            ("high ends", lambda option: _priced(option, _rate_factor(option, low=False))),
        )


def _rate_factor(option: Option, *, low: bool) -> float:
    rate = option.rate
    end = rate.low_usd_per_node_hour if low else rate.high_usd_per_node_hour
    return end / rate.usd_per_node_hour if end is not None and rate.usd_per_node_hour else 1.0


def _step_times(options: Sequence[Option], goal: Goal) -> Iterable[Sensitivity]:
    def end(index: int) -> Change:
        return lambda option: _slowed(
            option, option.plan.step_time_interval_s[index] / option.plan.step_time_s
        )

    yield _row(
        options,
        goal,
        "step times and so the share of the peak, within their intervals",
        ("fast ends", end(0)),
        ("slow ends", end(1)),
    )


def _failures(options: Sequence[Option], goal: Goal) -> Iterable[Sensitivity]:
    if not any(option.losses is not None and option.losses.failure_share > 0 for option in options):
        return
    low, high = 1 / FAILURE_FACTOR, FAILURE_FACTOR
    yield _row(
        options,
        goal,
        "failures of nodes",
        ("half the rate", lambda option: _slowed(option, failure_factor(option, low))),
        ("twice the rate", lambda option: _slowed(option, failure_factor(option, high))),
    )


def failure_factor(option: Option, factor: float) -> float:
    """Time with `factor` times the failures over time as it is, by planner.cost.goodput.

    With an interval of P seconds between checkpoints and f failures a second, kept(f) = f P / (exp(f P) - 1)
    x exp(-f R). What a failure costs besides lost steps, R, follows from the share that is lost as things
    are. 1 where no failures are counted, infinite where nothing would be kept.
    """
    losses = option.losses
    if losses is None or losses.checkpoint_every is None or losses.between_failures_s is None:
        return 1.0
    stalls_s = losses.data_stall_s + losses.straggler_s + losses.checkpoint_stall_s + losses.evaluation_s
    steps = min(losses.checkpoint_every, option.days * DAY_S * option.goodput / option.step_time_s)
    lost = steps * (option.step_time_s + stalls_s) / losses.between_failures_s
    now = 1 - losses.failure_share
    if now <= 0:
        return 1.0
    restarts = now / _kept_of_steps(lost)
    there = _kept_of_steps(factor * lost) * restarts**factor
    return now / there if there > 0 else float("inf")


def _kept_of_steps(lost: float) -> float:
    """x / (exp(x) - 1): what is kept of intervals that are x times as long as failures lie apart."""
    return 1.0 if lost == 0 else lost / math.expm1(min(lost, 700.0))


def _utilisation(
    options: Sequence[Option], goal: Goal, owned: Mapping[str, Owned], utilisation: float | None
) -> Iterable[Sensitivity]:
    if utilisation is None:
        return
    on_premises = [option for option in options if option.rate.pricing is Pricing.ON_PREMISES]
    if not any(option.device in owned for option in on_premises):
        return

    def at(share: float) -> Change:
        def change(option: Option) -> Figures:
            device = owned.get(option.device)
            if option.rate.pricing is not Pricing.ON_PREMISES or device is None:
                return _as_is(option)
            return _priced(option, device.usd_per_used_hour(share) / device.usd_per_used_hour(utilisation))

        return change

    less, more = max(0.05, utilisation - UTILISATION_POINTS), min(1.0, utilisation + UTILISATION_POINTS)
    yield _row(
        options,
        goal,
        "hours in use of hardware on premises",
        (f"{less:.0%}", at(less)),
        (f"{more:.0%}", at(more)),
    )

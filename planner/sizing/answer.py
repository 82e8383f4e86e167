"""What a sizing answers: the smallest, the cheapest and the soonest option that keep the goal, and of each
offer its best, or by how much it misses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.job.objective import Goal
from planner.sizing.comparison import Comparison
from planner.sizing.option import Option


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

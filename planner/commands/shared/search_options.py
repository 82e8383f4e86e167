"""The options of a search, which solve and replan share, and what they make of a problem."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.search.solve import SolveOptions
    from planner.strategy.fixed_choices import FixedChoices

DEFAULT_TIME_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """The options as typed."""

    fixed: tuple[str, ...]
    time_limit_s: float | None
    gap_tolerance: float
    top: int
    reproducible: bool
    objective: str | None
    deadline: str | None
    budget: str | None

    @property
    def limit_s(self) -> float | None:
        """The limit of a search: as given, else the default; none where it shall be reproducible."""
        from planner.foundation.errors import InputError, Problem

        if not self.reproducible:
            return DEFAULT_TIME_LIMIT_S if self.time_limit_s is None else self.time_limit_s
        if self.time_limit_s is not None:
            fault = "uses no clock, and --time-limit does."
            raise InputError(Problem(where="--reproducible", fault=fault, fix="leave one of them out"))
        return None

    def options(self, problem: PlanningProblem, *, least_top: int = 0) -> SolveOptions:
        """How a problem is searched. Raises InputError."""
        from planner.search.solve import SolveOptions

        return SolveOptions(
            pins=_pins_for(self.fixed, problem),
            time_limit_s=self.limit_s,
            top=max(self.top, least_top),
            gap_tolerance=self.gap_tolerance,
            reproducible=self.reproducible,
        )


def _pins_for(fixed: tuple[str, ...], problem: PlanningProblem) -> FixedChoices:
    """The pinned choices; what context parallelism leaves open is the engine's way, where it has one."""
    import dataclasses

    from planner.strategy.engines.recipes import usual_exchange
    from planner.strategy.fixed_choices import parse_fixed_choices

    pins = parse_fixed_choices(fixed, problem.cluster)
    if problem.limits.engine is None or pins.cp in (None, 1) or pins.cp_exchange is not None:
        return pins
    return dataclasses.replace(pins, cp_exchange=usual_exchange(problem.limits.engine))


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a search, passed as `search` (SearchRequest)."""
    names = [str(name) for name in SearchRequest.__dataclass_fields__]

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        return command(search=SearchRequest(**{name: values.pop(name) for name in names}), **values)

    wrapped: Callable[..., Any] = call
    for option in reversed([*_search(), *_goal()]):
        wrapped = option(wrapped)
    return wrapped


def _search() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--fix", "fixed", multiple=True, metavar="KEY=VALUE", help="Pin a choice, such as tp=8."
        ),
        click.option(
            "--time-limit",
            "time_limit_s",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Stop the search then and return the best plan so far with its gap (exit code 5). "
            "Default: 60, or none with --reproducible.",
        ),
        click.option(
            "--gap",
            "gap_tolerance",
            type=click.FloatRange(min=0, max=1),
            default=0.005,
            show_default=True,
            metavar="SHARE",
            help="Stop when nothing left can be faster by more than this share of the step time.",
        ),
        click.option(
            "--top",
            type=click.IntRange(min=0),
            default=5,
            show_default=True,
            metavar="K",
            help="Runners-up to keep.",
        ),
        click.option(
            "--reproducible",
            is_flag=True,
            help="Use no clock: the same inputs give the same bytes everywhere.",
        ),
    ]


def _goal() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--objective",
            type=click.Choice(["time", "cost"]),
            help="Least time (the default), or least dollars for all --tokens: then on as many of the "
            "cluster's nodes as pay.",
        ),
        click.option("--deadline", metavar="DAYS", help="The whole run ends within: 30 (days), 30d, 12h."),
        click.option(
            "--budget",
            metavar="USD",
            help="The whole run costs at most so many dollars, such as 50000 or 1.5M: on as many nodes as "
            "that pays.",
        ),
    ]

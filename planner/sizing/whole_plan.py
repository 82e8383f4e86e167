"""whole_plan(): the plan of an option as `plan solve` writes it, from a longer search than a sizing's."""

from __future__ import annotations

from planner.hardware.cluster_grammar import parse_cluster
from planner.hardware.prices import Market
from planner.search.solve import SolveOptions, solve
from planner.sizing.option import Option
from planner.sizing.problems import problem_on, profiles_for
from planner.sizing.request import SizingRequest
from planner.strategy.fix_keys import Pins
from planner.strategy.plan import Plan

TIME_LIMIT_S = 60.0
"""Seconds of the search, as of `plan solve`."""


def whole_plan(request: SizingRequest, market: Market, option: Option) -> Plan:
    """The best plan on the option's cluster, no slower than the option's own. Raises InfeasibleError."""
    cluster = parse_cluster(option.cluster, market=market)
    device = cluster.groups[0].device
    problem = problem_on(request, cluster, device, profiles_for(request).get(device.name))
    return solve(problem, SolveOptions(pins=Pins(), time_limit_s=TIME_LIMIT_S))

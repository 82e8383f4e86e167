"""What a little more of each resource would buy, each solved again under the changed problem.

The plan and its runners-up are known to every search, so a change that cannot hurt does not seem to. Gains
are over the best plan known of the unchanged problem, which is solved again as well: where that finds a
better plan than the one explained, the answer says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from planner.advice.repairs import binding
from planner.advice.resolve import Clock, Solved, resolved
from planner.advice.what_if import (
    Change,
    faster_devices,
    faster_links,
    faster_network,
    nodes_of,
    with_limit,
    with_nodes,
    with_workload,
)
from planner.cost.evaluate import CostModel
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, format_bytes
from planner.job.problem import PlanningProblem
from planner.search.least_memory import survey
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.placement import is_mixed
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy

FASTER = 1.1
TWICE = 2.0


@frozen
class More:
    """What a change buys. `same_plan_s` is the plan as it is under it, None where that breaks a rule.

    `gain` is of tokens a second over the best plan known without it, of all devices and of each; `gap` is
    what the search left open.
    """

    change: str
    flag: str
    step_time_s: float | None
    tokens_per_s: float | None
    gain: float | None
    gain_a_device: float | None
    same_plan_s: float | None
    gap: float | None
    strategy: Strategy | None
    detail: str = ""


def what_more_buys(
    problem: PlanningProblem, known: tuple[Strategy, ...], clock: Clock
) -> tuple[Solved | None, tuple[More, ...]]:
    """The best plan known as things are, and what each change makes of it; None where none is SAFE."""
    best = resolved(problem, FixedChoices(), clock, known)
    if best is None:
        return None, ()
    strategies = tuple(dict.fromkeys((best.strategy, *known)))
    changes = [*_changes(problem, best.strategy.degrees)]
    return best, tuple(_bought(problem, best, change, strategies, clock) for change in changes)


def _changes(problem: PlanningProblem, degrees: Degrees) -> Iterable[Change]:
    cluster, batch = problem.cluster, problem.workload.batch
    more = with_limit(problem, problem.memory_limit_bytes + GIB)
    limit = format_bytes(more.memory_limit_bytes).replace(" ", "")
    flag = "" if is_mixed(cluster) else f"--memory-limit {limit}"  # which is one for all kinds of devices
    yield Change(change="1 GiB more a device", flag=flag, problem=more)
    nodes = nodes_of(cluster)
    larger = with_nodes(problem, nodes + 1) if nodes else None
    if larger is not None:
        yield Change(change="one more node", flag=f"--cluster {larger.cluster.name}", problem=larger)
    for words, changed in (
        ("network twice as fast", faster_network(problem, TWICE)),
        ("links in a node twice as fast", faster_links(problem, TWICE, degrees)),
        ("devices 10 % faster", faster_devices(problem, FASTER)),
    ):
        if changed is not None:
            yield Change(change=words, flag="", problem=changed)
    yield Change(
        change="batch twice as large",
        flag=f"--batch {2 * batch}",
        problem=with_workload(problem, batch=2 * batch),
    )


def _bought(
    problem: PlanningProblem, best: Solved, change: Change, known: tuple[Strategy, ...], clock: Clock
) -> More:
    changed = change.problem
    fitted = tuple(_in_batch(strategy, changed.workload.batch) for strategy in known)
    own = _in_batch(best.strategy, changed.workload.batch)
    same = None
    if not broken_rules(changed, own):
        same = CostModel(changed).evaluate(own).estimate.step_time_s
    solved = resolved(changed, FixedChoices(), clock, fitted)
    if solved is None:
        return More(
            change=change.change,
            flag=change.flag,
            step_time_s=None,
            tokens_per_s=None,
            gain=None,
            gain_a_device=None,
            same_plan_s=same,
            gap=None,
            strategy=None,
            detail="not solved: time is spent" if clock.spent else _why_none(changed),
        )
    return More(
        change=change.change,
        flag=change.flag,
        step_time_s=solved.step_time_s,
        tokens_per_s=solved.tokens_per_s,
        gain=solved.tokens_per_s / best.tokens_per_s - 1,
        gain_a_device=best.device_seconds_per_token / solved.device_seconds_per_token - 1,
        same_plan_s=same,
        gap=solved.gap,
        strategy=solved.strategy,
    )


def _why_none(problem: PlanningProblem) -> str:
    bound = binding(problem, survey(problem, FixedChoices()))
    return f"no plan: {bound.rule}: {bound.detail}"


def _in_batch(strategy: Strategy, batch: int) -> Strategy:
    """The strategy with as many micro-batches as a batch needs; itself where they do not come out even."""
    degrees = strategy.degrees
    unit = degrees.dp * degrees.micro_batch
    if batch % unit or degrees.batch == batch:
        return strategy
    return dataclasses.replace(
        strategy, degrees=dataclasses.replace(degrees, num_micro_batches=batch // unit)
    )

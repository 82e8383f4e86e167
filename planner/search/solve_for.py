"""solve_for(): the plan of least time or dollars within a deadline and a budget, on as many nodes as pay.

Under `--objective cost`, or with a budget, the number of nodes is free. Each gets a bound of what is
minimised ; they are searched in order of it, until the next bound cannot win. Only that
bound rules a number of nodes out, so the answer is as good as if all had been searched.

For one number of nodes the plan of least step time counts. Dollars and days follow it: between plans of
nearly the same step time, the job's stalls may differ a little.

Parts of a cluster that a plan may use alone, and what no plan on them can beat.

With C the price of an hour, T tokens in all, t of them a step, and s a bound of the step time,

    seconds >= ramp-up + T / t x u / share kept      u = max(s, t / loader) and evaluation
    dollars >= C x seconds / 3600                    C with the spare nodes

with the share kept of planner.cost.goodput for k steps between checkpoints (one, where the best interval was
asked for), restarts that load nothing, and nodes in repair: waiting for checkpoints and for the slowest
device only adds to it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.goodput import evaluation_s, most_kept, spares_factor
from planner.cost.stage.layer_cost import LayerModel
from planner.foundation.errors import InfeasibleError
from planner.foundation.units import DAY_S, format_seconds
from planner.hardware.cluster import ClusterSpec
from planner.job.objective import Goal, Minimise, NodesTried, Objective, Searched, in_days
from planner.job.problem import PlanningProblem
from planner.search.bounds.quick_bounds import space_bounds_s
from planner.search.engine_search import solve_for_engine
from planner.search.solve import SolveOptions
from planner.search.space import space_of
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.plan import Certificate, Plan

EVERY_COUNT = 16
"""Up to this many nodes every number is tried."""
MOST_BESIDE_BATCH = 8
"""Beyond it, what of a number of nodes does not divide the batch is left to the pipeline: at most this."""

_LEADING_COUNT = re.compile(r"^([0-9]+)(?=\s*[x*])")


def node_counts(cluster: ClusterSpec, batch: int) -> list[int]:
    """Numbers of nodes to try, of 1 up to all, which is last.

    Of a cluster of several kinds only all: the price of a part is not known.
    """
    if len(cluster.groups) > 1:
        return [sum(group.nodes for group in cluster.groups)]
    whole = cluster.groups[0].nodes
    return [n for n in range(1, whole + 1) if n <= EVERY_COUNT or _sensible(n, whole, batch)]


def _sensible(nodes: int, whole: int, batch: int) -> bool:
    return whole % nodes == 0 or nodes // math.gcd(nodes, batch) <= MOST_BESIDE_BATCH


def part_of(cluster: ClusterSpec, nodes: int) -> ClusterSpec:
    """So many nodes of a cluster, at their share of its price."""
    whole = sum(group.nodes for group in cluster.groups)
    if nodes == whole:
        return cluster
    (group,) = cluster.groups
    price = cluster.price_usd_per_hour
    return dataclasses.replace(
        cluster,
        name=_name(cluster.name, nodes, whole),
        groups=(dataclasses.replace(group, nodes=nodes),),
        price_usd_per_hour=None if price is None else price * nodes / whole,
    )


def _name(name: str, nodes: int, whole: int) -> str:
    """The name with its own number of nodes changed, where it begins with that."""
    found = _LEADING_COUNT.match(name)
    if found and int(found.group(1)) == whole:
        return f"{nodes}{name[found.end() :]}"
    return f"{nodes} of {whole} nodes of {name}"


class StepBounds:
    """Times that no strategy of any shape on a part of the cluster beats. Parts share the costs of layers."""

    def __init__(self, pins: FixedChoices) -> None:
        self.pins = pins
        self._layers: dict[str, LayerModel] = {}

    def of(self, problem: PlanningProblem) -> float:
        """A bound of the step time; infinite where no shape is legal."""
        network = problem.cluster.network
        model = CostModel(problem, self._layers.get(network))
        self._layers.setdefault(network, model.layers)
        quick_s, _, _ = space_bounds_s(model, space_of(problem, self.pins), self.pins.recomputes)
        return float(quick_s.min(initial=math.inf))


def run_bound_s(problem: PlanningProblem, step_s: float) -> float:
    """Seconds that the whole run takes at least with steps of `step_s`."""
    workload, overheads = problem.workload, problem.overheads
    assert workload.tokens is not None, "checked when the goal was read"
    each_s = step_s
    if overheads.data_tokens_per_s is not None:
        each_s = max(step_s, workload.tokens_per_step / overheads.data_tokens_per_s)
    each_s += evaluation_s(overheads)
    steps = workload.tokens / workload.tokens_per_step
    kept = most_kept(problem.cluster, overheads, steps, each_s)
    return (overheads.ramp_up_s or 0.0) + steps * each_s / kept if kept > 0 else math.inf


def dollars(problem: PlanningProblem, seconds: float) -> float:
    """What the cluster and its spare nodes cost for so long; infinite where its price is not known."""
    cluster = problem.cluster
    if cluster.price_usd_per_hour is None:
        return math.inf
    nodes = sum(group.nodes for group in cluster.groups)
    return cluster.price_usd_per_hour * spares_factor(problem.overheads, nodes) * seconds / 3600


def parts(problem: PlanningProblem) -> Iterator[tuple[int, PlanningProblem]]:
    """The problem on each number of nodes."""
    for nodes in node_counts(problem.cluster, problem.workload.batch):
        yield nodes, dataclasses.replace(problem, cluster=part_of(problem.cluster, nodes))


MOST_SHARES = 4
"""Numbers of nodes among which the time that is left is shared out."""
LEAST_SHARE = 0.05
"""Of the time limit, what a search on a number of nodes gets at least."""


class Part(NamedTuple):
    """A number of nodes, with bounds of the whole run on them."""

    nodes: int
    problem: PlanningProblem
    bound_s: float
    bound_usd: float


class Run(NamedTuple):
    """The best plan on a number of nodes, and what the whole run takes with it."""

    plan: Plan
    seconds: float
    usd: float


Key = Callable[[float, float], float]
"""What is minimised, of seconds and dollars."""


def _seconds(seconds: float, usd: float) -> float:
    return seconds


def _usd(seconds: float, usd: float) -> float:
    return usd


def solve_for(problem: PlanningProblem, options: SolveOptions, goal: Goal) -> Plan:
    """The best plan by a goal. Raises InfeasibleError where none keeps rules, deadline and budget."""
    plan = solve_for_engine(problem, options) if goal.plain else NodeSearch(problem, options, goal).solve()
    return dataclasses.replace(plan, engine=problem.limits.engine)


class NodeSearch:
    """One search over numbers of nodes. Plans are kept, so that several questions cost one search."""

    def __init__(self, problem: PlanningProblem, options: SolveOptions, goal: Goal) -> None:
        self.problem, self.options, self.goal = problem, options, goal
        self.started_s = time.monotonic()
        self.key: Key = _usd if goal.minimise is Minimise.COST else _seconds
        self.runs: dict[int, Run | None] = {}
        self.late = False
        self.parts = self._parts()

    def solve(self) -> Plan:
        best = self.best(self.key, self.goal)
        if best is None:
            raise self._infeasible()
        return dataclasses.replace(best.plan, objective=self._objective(best))

    def best(self, key: Key, goal: Goal) -> Run | None:
        """The run with the least of `key` that meets a goal; None where none does."""
        found: Run | None = None
        for part in sorted(self.parts, key=lambda p: (key(p.bound_s, p.bound_usd), p.nodes)):
            least = key(part.bound_s, part.bound_usd)
            if least == math.inf or (found is not None and least >= self._to_beat(key, found)):
                break
            if not goal.meets(part.bound_s, part.bound_usd):
                continue
            if found is not None and self._seconds_left() == 0:
                self.late = True
                break
            run = self._run(part)
            if run is None or not goal.meets(run.seconds, run.usd):
                continue
            if found is None or key(run.seconds, run.usd) < key(found.seconds, found.usd):
                found = run
        return found

    def _parts(self) -> list[Part]:
        bounds = StepBounds(self.options.pins)
        each = parts(self.problem) if self.goal.counts_dollars else [(self._whole, self.problem)]
        result = []
        for nodes, problem in each:
            bound_s = run_bound_s(problem, bounds.of(problem))
            result.append(Part(nodes, problem, bound_s, dollars(problem, bound_s)))
        return result

    @property
    def _whole(self) -> int:
        return sum(group.nodes for group in self.problem.cluster.groups)

    def _to_beat(self, key: Key, found: Run) -> float:
        return key(found.seconds, found.usd) * (1 - self.options.gap_tolerance)

    def _run(self, part: Part) -> Run | None:
        """The best plan on a part of the cluster, searched for once; None where none fits."""
        if part.nodes not in self.runs:
            self.runs[part.nodes] = self._searched(part)
        return self.runs[part.nodes]

    def _searched(self, part: Part) -> Run | None:
        share_s = self._share_s()
        try:
            plan = solve_for_engine(part.problem, dataclasses.replace(self.options, time_limit_s=share_s))
        except InfeasibleError:
            return None
        certificate = certificate_of(plan)
        self.late |= certificate.status == "gap" and share_s is not None and certificate.wall_s >= share_s
        seconds = run_seconds(plan)
        return Run(plan, seconds, dollars(part.problem, seconds))

    def _seconds_left(self) -> float | None:
        limit = None if self.options.reproducible else self.options.time_limit_s
        return None if limit is None else max(0.0, limit - (time.monotonic() - self.started_s))

    def _share_s(self) -> float | None:
        """A share of the time that is left: the first numbers of nodes are the likeliest to win."""
        left_s, limit_s = self._seconds_left(), self.options.time_limit_s
        if left_s is None or limit_s is None:
            return self.options.time_limit_s
        still_open = sum(part.nodes not in self.runs and self._open(part) for part in self.parts)
        return max(left_s / max(1, min(MOST_SHARES, still_open)), LEAST_SHARE * limit_s)

    def _objective(self, best: Run) -> Objective:
        goal, figure = self.goal, self.key(best.seconds, best.usd)
        lower = min([figure, *(self._lower(part) for part in self.parts)])
        gap = max(0.0, 1 - lower / figure)
        nodes = sum(group.nodes for group in best.plan.cluster.groups)
        proven = gap <= self.options.gap_tolerance + 1e-6
        return Objective(
            minimise=goal.minimise,
            deadline_days=in_days(goal.deadline_s),
            budget_usd=goal.budget_usd,
            offered=self.problem.cluster.name,
            nodes=nodes,
            nodes_unused=self._whole - nodes,
            days=best.seconds / DAY_S,
            cost_usd=_known(best.usd),
            lower_bound=lower if goal.minimise is Minimise.COST else lower / DAY_S,
            gap=gap,
            status="optimal" if proven else "time_limit" if self.late else "gap",
            tried=tuple(self._tried(part) for part in self.parts),
        )

    def _lower(self, part: Part) -> float:
        """What no plan on a part can beat that keeps the goal: its search's bound, if there was one."""
        run, bound_s = self.runs.get(part.nodes), part.bound_s
        if run is None and part.nodes in self.runs:
            return math.inf
        if run is not None:
            bound_s = max(bound_s, run_bound_s(part.problem, certificate_of(run.plan).lower_bound_s))
        bound_usd = dollars(part.problem, bound_s)
        return self.key(bound_s, bound_usd) if self.goal.meets(bound_s, bound_usd) else math.inf

    def _tried(self, part: Part) -> NodesTried:
        run = self.runs.get(part.nodes)
        status = Searched.SOLVED
        if run is None:
            hopeless = part.nodes in self.runs or part.bound_s == math.inf
            unsearched = Searched.NOT_SEARCHED if self._open(part) else Searched.RULED_OUT
            status = Searched.INFEASIBLE if hopeless else unsearched
        return NodesTried(
            nodes=part.nodes,
            status=status,
            bound_days=0.0 if part.bound_s == math.inf else part.bound_s / DAY_S,
            bound_usd=_known(part.bound_usd),
            days=None if run is None else _known(run.seconds / DAY_S),
            cost_usd=None if run is None else _known(run.usd),
            step_time_s=None if run is None else run.plan.estimate.step_time_s,
        )

    def _open(self, part: Part) -> bool:
        """Whether a part that was not searched might have won."""
        kept = [run for run in self.runs.values() if run and self.goal.meets(run.seconds, run.usd)]
        best = min((self._to_beat(self.key, run) for run in kept), default=math.inf)
        return self.goal.meets(part.bound_s, part.bound_usd) and self._lower(part) < best

    def _infeasible(self) -> InfeasibleError:
        fastest = self.best(_seconds, Goal())
        cheapest = self.best(_usd, Goal()) if self.goal.counts_dollars else fastest
        if fastest is None or cheapest is None:
            return self._nothing_fits()
        name, cluster = self.problem.model.name, self.problem.cluster.name
        lines = [f"no plan for {name} on {cluster} meets what was asked."]
        deadline_s, budget_usd = self.goal.deadline_s, self.goal.budget_usd
        late = deadline_s is not None and fastest.seconds > deadline_s
        dear = budget_usd is not None and cheapest.usd > budget_usd
        if deadline_s is not None and late:
            lines.append(
                f"  --deadline {format_seconds(deadline_s)}: the fastest plan takes {self._told(fastest)}"
            )
            lines.append(f"    {_too_much(fastest.seconds, deadline_s, format_seconds)} too long.")
        if budget_usd is not None and dear:
            lines.append(f"  --budget {_money(budget_usd)}: the cheapest plan takes {self._told(cheapest)}")
            lines.append(f"    {_too_much(cheapest.usd, budget_usd, _money)} too much.")
        if not late and not dear:
            lines += self._not_both()
        if self.late:
            lines.append(
                "The time limit ended searches: with a longer --time-limit there may be a better plan."
            )
        lines.append("What would help: " + self._help(late, dear) + ".")
        return InfeasibleError("\n".join(lines))

    def _not_both(self) -> list[str]:
        """Deadline and budget can each be met, not both."""
        deadline_s, budget_usd = self.goal.deadline_s, self.goal.budget_usd
        assert deadline_s is not None and budget_usd is not None, "one of them alone is met by some plan"
        cheap = self.best(_usd, Goal(deadline_s=deadline_s))
        fast = self.best(_seconds, Goal(budget_usd=budget_usd))
        assert cheap is not None and fast is not None
        return [
            f"  within --deadline {format_seconds(deadline_s)} the cheapest plan takes {self._told(cheap)}",
            f"    {_too_much(cheap.usd, budget_usd, _money)} above the budget.",
            f"  within --budget {_money(budget_usd)} the fastest plan takes {self._told(fast)}",
            f"    {_too_much(fast.seconds, deadline_s, format_seconds)} beyond the deadline.",
        ]

    def _told(self, run: Run) -> str:
        nodes = sum(group.nodes for group in run.plan.cluster.groups)
        price = "" if run.usd == math.inf else f" and {_money(run.usd)}"
        label = run.plan.strategy.degrees.label()
        return f"{format_seconds(run.seconds)}{price}, on {nodes} of {self._whole} nodes ({label}):"

    def _help(self, late: bool, dear: bool) -> str:
        more = ["more or faster devices, and a later --deadline"] if late else []
        more += ["cheaper devices, and a larger --budget"] if dear else []
        more += ["a later --deadline or a larger --budget"] if not late and not dear else []
        return "; ".join([*more, "fewer --tokens"])

    def _nothing_fits(self) -> InfeasibleError:
        """Why no plan keeps the rules, told of the whole cluster, which has most room."""
        try:
            solve_for_engine(self.problem, self.options)
        except InfeasibleError as error:
            return error
        raise AssertionError("the search over nodes missed a plan on the whole cluster")


def run_seconds(plan: Plan) -> float:
    """Seconds of the whole run at the job's goodput; infinite where it makes no progress."""
    job, days = plan.estimate.job, plan.estimate.days
    if job is not None:
        days = job.days
    return math.inf if days is None else days * DAY_S


def certificate_of(plan: Plan) -> Certificate:
    """The certificate of a plan that a search made."""
    assert plan.solver is not None
    return plan.solver


def _known(value: float) -> float | None:
    return None if value == math.inf else value


def _money(usd: float) -> str:
    return f"${usd:,.2f}" if usd < 1000 else f"${usd:,.0f}"


def _too_much(value: float, limit: float, told: Callable[[float], str]) -> str:
    return f"{told(value - limit)} ({value / limit - 1:.1%})"

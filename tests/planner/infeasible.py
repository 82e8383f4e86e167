"""Random infeasible problems, and the check that their answers are true: by the solver, on its own."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import NamedTuple

from planner.advice.repairs import BEST, Infeasible, Repair, why_infeasible
from planner.advice.resolve import Effort
from planner.cost.evaluate import CostModel
from planner.foundation.errors import InfeasibleError
from planner.foundation.units import MIB, parse_bytes
from planner.job.problem import PlanningProblem
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision
from planner.search.least_memory import survey
from planner.search.solve import SolveOptions, solve
from planner.search.space import shapes
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees
from tests.planner import instances

EFFORT = Effort(each_s=0.5, total_s=None)
VALUES = {
    "tp": ("1", "2", "3", "8"),
    "pp": ("1", "2", "4", "5"),
    "dp": ("1", "2", "4", "5"),
    "zero": ("0", "1", "2", "3"),
    "micro_batch": ("1", "2", "3", "5"),
    "recompute": ("none", "selective", "full"),
    "schedule": ("gpipe", "1f1b", "interleaved"),
    "sequence_parallel": ("true", "false"),
}


class Case(NamedTuple):
    """A problem without a plan, with its pins as they are typed."""

    problem: PlanningProblem
    fixes: tuple[str, ...]

    @property
    def pins(self) -> FixedChoices:
        return parse_fixed_choices(self.fixes)


def options(pins: FixedChoices) -> SolveOptions:
    """A search to the end."""
    return SolveOptions(pins=pins, gap_tolerance=0.0, rounds=100, nodes=None, top=0)


def case(seed: int) -> Case:
    """The first infeasible problem of a seed: short of memory, or with pins that break a rule."""
    draw = random.Random(seed)
    while True:
        problem = instances.random_problem(draw.randrange(10**6), mixed=draw.random() < 0.2)
        if len(problem.model.segments) == 1:
            problem = _larger(problem, draw)
        workload = dataclasses.replace(
            problem.workload,
            seq=draw.choice([512, 2048, 8192]),
            batch=draw.choice([2, 3, 4, 7, 8]),
            optimizer=draw.choice(list(Optimizer)),
            precision=draw.choice([Precision.BF16, Precision.FP32]),
        )
        problem = dataclasses.replace(problem, workload=workload)
        keys = draw.sample(sorted(VALUES), draw.choice([0, 1, 1, 2, 3]))
        fixes = tuple(f"{key}={draw.choice(VALUES[key])}" for key in keys)
        need, limit = survey(problem, parse_fixed_choices(fixes)).need, 1 << 40
        if need is not None:
            limit = int(need.limit_bytes * draw.uniform(0.3, 0.97))
        problem = dataclasses.replace(problem, memory_limit_bytes=limit)
        if need is None or limit < need.limit_bytes - 3 * MIB:
            return Case(problem, fixes)


def _larger(problem: PlanningProblem, draw: random.Random) -> PlanningProblem:
    """The problem with a model beside which communicators are small, on devices that may offload."""
    spec = instances.model(
        layers=draw.randint(2, 5),
        hidden=draw.choice([256, 512, 1024]),
        heads=4,
        vocab=draw.choice([512, 8192]),
    )
    group = problem.cluster.groups[0]
    device = dataclasses.replace(
        group.device, host_link_bytes_per_s=draw.choice([None, 2e10]), usable_memory_bytes=1 << 31
    )
    groups = (dataclasses.replace(group, device=device),)
    cluster = dataclasses.replace(problem.cluster, groups=groups)
    return dataclasses.replace(problem, model=spec, cluster=cluster)


def feasible(problem: PlanningProblem, pins: FixedChoices) -> float | None:
    """The step time of the solver's plan, judged SAFE by an evaluation of its own; None: it finds none."""
    try:
        plan = solve(problem, options(pins))
    except InfeasibleError:
        return None
    assert not broken_rules(problem, plan.strategy)
    assert CostModel(problem).evaluate(plan.strategy).estimate.verdict is Verdict.SAFE
    return plan.estimate.step_time_s


def changed(asked: Case, flag: str) -> tuple[PlanningProblem, FixedChoices]:
    """The problem and pins that a user has who follows a flag; written apart from the planner's own way."""
    problem, fixes = asked
    workload, cluster = problem.workload, problem.cluster
    name, _, value = flag.partition(" ")
    values: dict[str, object] = {}
    if flag == "leave out every --fix":
        return problem, FixedChoices()
    if flag.startswith("leave out --fix "):
        return problem, parse_fixed_choices(
            tuple(fix for fix in fixes if fix != flag.removeprefix("leave out --fix "))
        )
    if name == "--fix":
        key = value.partition("=")[0]
        return problem, parse_fixed_choices((*(fix for fix in fixes if not fix.startswith(f"{key}=")), value))
    if name == "--memory-limit":
        return dataclasses.replace(problem, memory_limit_bytes=parse_bytes(value)), asked.pins
    if name == "--cluster":
        match = re.fullmatch(r"random with ([0-9]+) nodes", value)
        assert match
        groups = (dataclasses.replace(cluster.groups[0], nodes=int(match.group(1))),)
        return dataclasses.replace(problem, cluster=dataclasses.replace(cluster, groups=groups)), asked.pins
    if name == "--optimizer":
        values["optimizer"] = Optimizer(value)
    elif name == "--method":
        values |= {"method": Method(value), "adapters": Adapters(rank=16, modules=AdapterModules.ALL)}
    elif name == "--precision":
        values["precision"] = Precision(value)
    else:
        assert name in ("--seq", "--batch"), flag
        values[name.removeprefix("--")] = int(value)
    workload = dataclasses.replace(workload, **values)  # type: ignore[arg-type]
    return dataclasses.replace(problem, workload=workload), asked.pins


def check_binding(asked: Case, answer: Infeasible) -> None:
    """The named limit binds: with it raised as said there is a plan, with less there is none."""
    problem, bound = asked.problem, answer.binding
    legal = [shape for shape in shapes(problem, asked.pins) if isinstance(shape, Degrees)]
    if not legal:
        assert bound.rule in answer.rejected and bound.rule != "memory"
        assert bound.needed_bytes is None and bound.short_bytes is None
        return
    assert bound.rule == "memory"
    assert bound.needed_bytes is not None and bound.short_bytes is not None
    assert bound.limit_bytes == problem.memory_limit_bytes
    assert bound.short_bytes == bound.needed_bytes - bound.limit_bytes > 0
    at = dataclasses.replace(problem, memory_limit_bytes=bound.needed_bytes)
    assert feasible(at, asked.pins) is not None
    if "nearly" not in bound.detail:
        under = dataclasses.replace(problem, memory_limit_bytes=bound.needed_bytes - 3 * MIB)
        assert feasible(under, asked.pins) is None


def check_repair(asked: Case, repair: Repair) -> None:
    """A repair works for the one who follows its flag, and is no slower than said."""
    assert repair.verified
    if repair.flag.startswith("plan estimate"):
        return
    problem, pins = changed(asked, repair.flag)
    step_s = feasible(problem, pins)
    assert step_s is not None, repair
    assert step_s <= repair.step_time_s * (1 + 1e-9)
    each = problem.cluster.devices * repair.step_time_s / problem.workload.tokens_per_step
    assert abs(each - repair.device_seconds_per_token) <= 1e-9 * each


def check_case(seed: int) -> Infeasible:
    """Everything about the answer of one seed."""
    asked = case(seed)
    assert feasible(asked.problem, asked.pins) is None
    answer = why_infeasible(asked.problem, asked.pins, EFFORT)
    assert sum(answer.rejected.values()) == answer.shapes
    check_binding(asked, answer)
    for repair in (*answer.repairs, *answer.others):
        check_repair(asked, repair)
    costs = [repair.device_seconds_per_token for repair in answer.repairs]
    assert costs == sorted(costs) and len(costs) <= BEST
    assert len({repair.kind for repair in answer.repairs}) == len(costs)
    return answer

"""The space of a problem is every combination of degrees that keeps the rules, and no more."""

from __future__ import annotations

import dataclasses

import pytest

from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.search.space import shapes
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.strategy import Degrees
from tests.planner import instances
from tests.planner.brute_force import FAMILIES, legal_degrees


def space(problem: PlanningProblem, pins: FixedChoices | None = None) -> list[Degrees]:
    return [shape for shape in shapes(problem, pins or FixedChoices()) if isinstance(shape, Degrees)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_space_is_the_product_that_rules_leave(family: str) -> None:
    """80 random problems, for no engine and for each: no shape twice, none left out, none too many."""
    engines, sizes = (None, *Engine), []
    for seed in range(20):
        problem = FAMILIES[family](seed)
        problem = dataclasses.replace(problem, limits=Limits(engine=engines[seed % len(engines)]))
        found = space(problem)
        assert len(found) == len(set(found))
        assert set(found) == set(legal_degrees(problem)), seed
        sizes.append(len(found))
    assert sum(size > 4 for size in sizes) >= 6


def test_every_choice_occurs() -> None:
    """So that the comparison above says something of each axis."""
    found = [shape for seed in range(15) for shape in space(FAMILIES["experts"](seed))]
    found += [shape for seed in range(15) for shape in space(FAMILIES["two kinds"](seed))]
    assert {shape.cp for shape in found} >= {1, 2} and len({s.cp_exchange for s in found}) == 3
    assert {shape.ep for shape in found} >= {1, 2} and {shape.etp for shape in found} >= {None, 1}
    assert {shape.device_order for shape in found} == {(), (1, 0)}


@pytest.mark.parametrize("fix", ["tp=2", "pp=2", "zero=1", "ep=2", "micro_batch=1"])
def test_a_pin_leaves_those_of_the_space_that_have_it(fix: str) -> None:
    key, _, value = fix.partition("=")
    kept = 0
    for seed in range(12):
        problem = FAMILIES["experts"](seed)
        pinned = set(space(problem, parse_fixed_choices((fix,))))
        assert pinned == {shape for shape in space(problem) if str(getattr(shape, key)) == value}
        kept += len(pinned)
    assert kept


def test_more_than_three_groups_keep_two_orders() -> None:
    """All orders of many groups are too many: the cluster's own and its reverse are tried."""
    kinds = [instances.device(name=name, flops=(n + 1) * 1e12) for n, name in enumerate("abcd")]
    one = instances.cluster(per_node=1)
    groups = tuple(dataclasses.replace(one.groups[0], device=kind) for kind in kinds)
    problem = instances.problem(on=dataclasses.replace(one, groups=groups))
    orders = {shape.device_order for shape in space(problem) if shape.pp > 1}
    assert orders == {(), (3, 2, 1, 0)}

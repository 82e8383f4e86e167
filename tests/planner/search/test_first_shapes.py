"""First plans: the shapes that promise most are those that keep it."""

from __future__ import annotations

import pytest

from planner.search.bounds.quick_bounds import space_bounds_s
from planner.search.candidates import EACH, LOOKED_AT, first_shapes
from planner.search.solve import SolveOptions, Solver
from planner.strategy.fixed_choices import parse_fixed_choices
from tests.planner.catalog_problems import problem

PROBLEMS: dict[str, tuple[str, str, int, int, str]] = {
    "roomy": ("llama-3-8b", "4x8:h100-sxm-80gb", 4096, 256, "tp=2"),
    "tight": ("llama-2-70b", "8x8:a100-sxm-40gb", 4096, 256, "zero=1"),
    "few micro-batches": ("llama-2-70b", "16x8:h100-sxm-80gb", 4096, 128, "tp=8"),
    "experts": ("mixtral-8x7b", "4x8:h100-sxm-80gb", 4096, 256, "tp=1"),
    "two kinds": ("llama-2-7b", "1x8:a100-sxm-80gb+1x8:h100-sxm-80gb", 4096, 128, "micro_batch=1"),
}


def looked_at(name: str) -> tuple[list[int], Solver]:
    """The first shapes of a problem, and the search that would begin with them."""
    *asked, pin = PROBLEMS[name]
    solver = Solver(problem(*asked), SolveOptions(pins=parse_fixed_choices((pin,))))
    solver.space = solver._legal()
    quick_s, solver.rows, solver.places = space_bounds_s(
        solver.model, solver.space, solver.options.pins.recomputes
    )
    return first_shapes(solver.space, quick_s, solver._promised, lambda: False), solver


def even_s(solver: Solver, number: int) -> float:
    """What the even split of a shape takes."""
    found = solver.modeller.search(*solver._of(number)).even()
    return float("inf") if found is None else found.step_time_s


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_of_the_first_is_nearly_the_best_even_split(name: str) -> None:
    """Of all shapes, or of every third where they are many."""
    first, solver = looked_at(name)
    numbers = range(0, len(solver.rows), 1 + len(solver.rows) // 300)
    best_s = min(even_s(solver, number) for number in numbers)
    assert min(even_s(solver, number) for number in first) <= 1.03 * best_s < float("inf")


@pytest.mark.parametrize("name", PROBLEMS)
def test_few_of_a_schedule_and_no_twins(name: str) -> None:
    """Shapes that differ in the order of messages or in shares of state alone take nearly as long."""
    first, solver = looked_at(name)
    degrees = [solver._of(number)[0] for number in first]
    for schedule in {(d.schedule, d.pp > 1) for d in degrees}:
        own = [d for d in degrees if (d.schedule, d.pp > 1) == schedule]
        if own[0].pp > 1:
            assert len({(d.tp, d.cp, d.ep, d.pp, d.chunks, d.micro_batch) for d in own}) == len(own) <= EACH
        else:
            assert len(set(own)) == len(own) <= LOOKED_AT
    promised = [found.bound_s for number in first if (found := solver._promised(number))]
    assert promised == sorted(promised) and len(promised) == len(first)

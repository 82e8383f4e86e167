"""Every strategy of a small problem, made and judged without the search: what the search must equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.memory.activations import most_waits
from planner.cost.stage.peak_memory import MEMORY_ERROR, RankMemory, band, rank_memory
from planner.cost.stage.stage import StageCost
from planner.foundation.errors import InfeasibleError
from planner.foundation.suggest import divisors
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.search.bounds.layout_bounds import BaseBound, memory_bound_bytes
from planner.search.solve import SolveOptions, solve
from planner.search.space import MIN_SPLIT, MIN_TOKENS
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import MAX_CHUNKS, FixedChoices
from planner.strategy.placement import is_mixed
from planner.strategy.rules import broken_rule
from planner.strategy.schedule.schedules import build_table
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Strategy, Zero
from tests.planner import instances

PIPES = tuple(
    (schedule, chunks)
    for schedule in Schedule
    for chunks in (range(2, MAX_CHUNKS + 1) if schedule is Schedule.INTERLEAVED else [schedule.least_chunks])
)
"""Schedules, with their stages a rank, that a search without pins looks at."""
DUST = 1e-9


def all_degrees(problem: PlanningProblem) -> Iterator[Degrees]:
    """Every combination of small degrees, legal or not, made without the planner's own generator.

    Sequences of MIN_SPLIT tokens are split, and ranks keep MIN_TOKENS of one at least; state is shared out
    over all data ranks or those of one node.
    """
    devices, batch, seq = problem.cluster.devices, problem.workload.batch, problem.workload.seq
    counts = [experts.count for experts in problem.model.experts]
    eps = [ep for ep in range(1, devices + 1) if math.gcd(*counts) % ep == 0] if counts else [1]
    parts = divisors(devices)
    for tp, cp, pp, replicate in itertools.product(parts, parts, parts, parts):
        shard, rest = divmod(devices, tp * cp * pp * replicate)
        if rest or (cp > 1 and seq < max(MIN_SPLIT, cp * MIN_TOKENS)) or pp > problem.model.layers:
            continue
        within = problem.cluster.devices_per_node // (tp * cp)
        if replicate > 1 and shard > 1 and shard != within:
            continue
        for zero, parallel, micro_batch, ep, etp, exchange, order, (schedule, chunks) in itertools.product(
            [Zero.NONE] if shard == 1 and replicate > 1 else list(Zero),
            [False, True] if tp > 1 else [False],
            range(1, batch + 1),
            eps,
            [None, 1] if counts and tp > 1 else [None],
            list(CpExchange) if cp > 1 else [CpExchange.RING],
            _orders(problem, pp),
            PIPES if pp > 1 else [(Schedule.ONE_F_ONE_B, 1)],
        ):
            if batch % (replicate * shard * micro_batch) == 0:
                yield Degrees(
                    tp=tp,
                    pp=pp,
                    cp=cp,
                    ep=ep,
                    etp=etp,
                    cp_exchange=exchange,
                    chunks=chunks,
                    schedule=schedule,
                    dp_replicate=replicate,
                    dp_shard=shard,
                    zero=zero,
                    micro_batch=micro_batch,
                    num_micro_batches=batch // (replicate * shard * micro_batch),
                    sequence_parallel=parallel,
                    device_order=order,
                )


def _orders(problem: PlanningProblem, pp: int) -> list[tuple[int, ...]]:
    groups = tuple(range(len(problem.cluster.groups)))
    if pp == 1 or not is_mixed(problem.cluster):
        return [()]
    return [() if order == groups else order for order in itertools.permutations(groups)]


def legal_degrees(problem: PlanningProblem) -> list[Degrees]:
    """Those of `all_degrees` that keep every rule."""
    return [degrees for degrees in all_degrees(problem) if broken_rule(problem, degrees) is None]


def all_cuts(layers: int, stages: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every cut of `layers` into `stages`: the layers [first, end) of each."""
    for cut in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(itertools.pairwise([0, *cut, layers]))


def mixes_of(first: int, end: int, options: tuple[Recompute, ...] = tuple(Recompute)) -> list[Stage]:
    """Every mix of recompute options on the layers [first, end), that without any first where it is one."""
    n = end - first
    counts = [
        RecomputeCounts(none=n - s - f, selective=s, full=f) for f in range(n + 1) for s in range(n - f + 1)
    ]
    legal = [each for each in counts if set(each.options()) <= set(options)]
    return [Stage(first=first, end=end, recompute=each) for each in legal]


def all_stages(layers: int, stages: int) -> Iterator[tuple[Stage, ...]]:
    """Every cut of `layers` into `stages`, with every mix of recompute options on each."""
    for cut in all_cuts(layers, stages):
        yield from itertools.product(*(mixes_of(*span) for span in cut))


class _Shape:
    """All strategies of one shape."""

    def __init__(self, model: CostModel, degrees: Degrees, options: tuple[Recompute, ...]) -> None:
        self.model, self.degrees, self.options = model, degrees, options
        self.shape, self.shapes = model.layout(degrees), model.rank_layouts(degrees)
        self.table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
        self.limits = tuple(
            shape.problem.memory_limit_bytes / (1 + band(MEMORY_ERROR, model.coverage(shape)))
            for shape in self.shapes
        )
        self.bound_s = BaseBound(model, self.shapes, options, self.limits).of(degrees)
        self.costs: dict[tuple[int, Stage], StageCost] = {}
        self.peaks: dict[tuple[int, tuple[tuple[int, Stage], ...]], int] = {}

    def cost(self, rank: int, stage: Stage) -> StageCost:
        shape = self.shapes[rank]
        if (id(shape), stage) not in self.costs:
            self.costs[id(shape), stage] = shape.stage(stage)
        return self.costs[id(shape), stage]

    def step_s(self, stages: tuple[Stage, ...]) -> float:
        return self.model.replay(self.shape, self.table, self._costs(stages)).step_time_s

    def _costs(self, stages: tuple[Stage, ...]) -> tuple[StageCost, ...]:
        ranks = map(self.degrees.pp_rank_of_stage, range(len(stages)))
        return tuple(self.cost(rank, stage) for rank, stage in zip(ranks, stages, strict=True))

    def fits(self, stages: tuple[Stage, ...]) -> bool:
        """Whether all ranks hold their stages within what is SAFE."""
        held = [tuple((s, stages[s]) for s in self.table.stages_of(rank)) for rank in range(self.degrees.pp)]
        peaks = [self._peak_bytes(rank, own) for rank, own in enumerate(held)]
        if len(set(map(id, self.shapes))) == 1:
            assert memory_bound_bytes(self.shape) <= max(peaks) + 16
        return all(peak <= limit for peak, limit in zip(peaks, self.limits, strict=True))

    def _peak_bytes(self, rank: int, held: tuple[tuple[int, Stage], ...]) -> int:
        if (rank, held) not in self.peaks:
            costs = {index: self.cost(rank, stage) for index, stage in held}
            waits = most_waits(self.model.problem.engine_settings, self.degrees)
            parts = rank_memory(self.shapes[rank], self.table.in_flight(rank, waits), costs)
            self.peaks[rank, held] = RankMemory(costs, parts).peak_bytes
        return self.peaks[rank, held]

    def best_s(self, below_s: float) -> float:
        """The least step time of all strategies that are SAFE, or `below_s` where none is faster.

        Recomputing takes no less time than keeping: cuts that are too slow without it are left out.
        """
        best_s = below_s
        for cut in all_cuts(self.model.problem.model.layers, self.degrees.stages):
            mixes = [mixes_of(*span, self.options) for span in cut]
            least_s = self.step_s(tuple(stages[0] for stages in mixes))
            if least_s >= best_s:
                continue
            for stages in itertools.product(*mixes):
                if not self.fits(stages):
                    continue
                step_s = self.step_s(stages)
                if Recompute.NONE in self.options:
                    assert step_s >= least_s * (1 - DUST)
                if step_s >= best_s:
                    continue
                assert self.bound_s <= step_s * (1 + DUST), self.degrees.label()
                estimate = self.model.evaluate(Strategy(degrees=self.degrees, stages=stages)).estimate
                if estimate.verdict is Verdict.SAFE:
                    best_s = estimate.step_time_s
        return best_s


def brute_force(
    problem: PlanningProblem,
    keep: Callable[[Degrees], bool] = lambda degrees: True,
    options: tuple[Recompute, ...] = tuple(Recompute),
) -> float | None:
    """The least replayed step time of all strategies that keep the rules and are judged SAFE."""
    model, best_s = CostModel(problem), float("inf")
    for degrees in filter(keep, legal_degrees(problem)):
        best_s = _Shape(model, degrees, options).best_s(best_s)
    return best_s if best_s < float("inf") else None


EXACT = SolveOptions(pins=FixedChoices(), gap_tolerance=0.0, rounds=1000, nodes=None)
FAMILIES: dict[str, Callable[[int], PlanningProblem]] = {
    "plain": instances.random_problem,
    "layer classes": lambda seed: instances.random_problem(seed, mixed=True),
    "experts": instances.expert_problem,
    "two kinds": instances.two_kinds,
    "blocks that ran": instances.told_problem,
}
"""Random problems by their seed."""


class Compared(NamedTuple):
    """The least step time by brute force, the solver's with its bound and status; None where none fits."""

    best_s: float | None
    found_s: float | None
    bound_s: float
    status: str
    verdict: str

    @property
    def fault(self) -> str:
        """What is wrong with the solver's answer; empty where nothing is."""
        if self.best_s is None or self.found_s is None:
            return "" if self.best_s is self.found_s else "one finds a plan, the other none"
        faults = {
            "not the best": abs(self.found_s - self.best_s) > 1e-6 * self.best_s,
            "the bound exceeds the best": self.bound_s > self.best_s * (1 + DUST),
            "not called optimal": self.status != "optimal",
            "not SAFE": self.verdict != Verdict.SAFE,
        }
        return ", ".join(what for what, wrong in faults.items() if wrong)


def compare(problem: PlanningProblem) -> Compared:
    """The solver against brute force."""
    best_s = brute_force(problem)
    try:
        plan = solve(problem, EXACT)
    except InfeasibleError:
        return Compared(best_s, None, 0.0, "infeasible", "")
    assert plan.solver is not None
    estimate = CostModel(problem).evaluate(plan.strategy).estimate
    return Compared(
        best_s, estimate.step_time_s, plan.solver.lower_bound_s, plan.solver.status, str(estimate.verdict)
    )

"""solve(): the best plan of the whole space, with a certificate.

1. Every legal shape gets a quick lower bound of its step time, all at once.
2. In order of it shapes are modelled, which gives each a better bound; those whose weights alone overflow are
   pruned. Shapes are searched in order of that bound.
3. The search stops when the next bound is no better than the incumbent: nothing left can win. Shapes that are
   not modelled by then count as ruled out by their bound.

The certificate's lower bound is the least of the bounds of all shapes, searched and unsearched; the gap is
what lies between it and the plan.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from functools import cache
from itertools import islice, product
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.codec import digest, noun
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.schedule import print_table
from planner.cost.stage import ShapeModel
from planner.cost.verdict import safe_tensor_bytes
from planner.divisors import divisors
from planner.errors import InfeasibleError
from planner.estimate import Rejected, Verdict
from planner.not_modelled import not_modelled
from planner.placement import is_mixed
from planner.plan import Alternative, Certificate, Plan
from planner.problem import PlanningProblem
from planner.search.alternatives import distinct, why_slower
from planner.search.bounds import BaseBound, least_state_bytes
from planner.search.dominance import without_dominated
from planner.search.frontier import Candidate, Frontier
from planner.search.open_shapes import OpenShapes
from planner.search.quick_bounds import space_bounds_s
from planner.search.recipes import RecipeBook
from planner.search.scout import Scout, Shared
from planner.search.shape_search import Budget, Found, ShapeSearch
from planner.search.space import Pins, Space, space_of
from planner.search.stage_space import StageSpace
from planner.search.verify import verify
from planner.strategy import AXES, Degrees, Schedule, Strategy
from planner.units import format_bytes

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]

OPTIMAL_GAP = 1e-6
GREEDY_SHAPES = 10
"""Shapes of each schedule, in order of their bound, that get an even split first: a good incumbent prunes the
rest. Of each, since the bounds of some schedules are closer than those of others."""
DEALT_SHAPES = 6
"""Shapes, in order of that split's time, whose blocks are dealt better before any is searched."""
PATIENCE = 250
"""Shapes that are searched without a better plan, once the gap of one stays open below the bound of the next:
more could not close it, only find a better plan."""
START_BELOW_S = 30.0
"""Time limits below which plain plans are made before anything else."""
START_LEAVES = 0.7
"""Part of the time that is left for the rest then."""
MAX_RUNNERS_UP = 64
"""Shapes, in order of their bound, that are tried for runners-up; more only where no plan was found."""
MAX_TIMELINE = 4096
"""Events of a replay that a plan carries; a picture of more cannot be read."""


@noun
class SolveOptions:
    """What limits the search.

    It stops when nothing left can be faster by more than `gap_tolerance`, a share of the step time.
    `rounds` ILPs at most are solved for one shape, of `nodes` branch-and-bound nodes each (None: no limit):
    limits of work, not of time, so that the answer is the same on every machine. `reproducible` uses no
    clock and writes no wall time.
    """

    pins: Pins
    time_limit_s: float | None = None
    top: int = 5
    gap_tolerance: float = 5e-3
    rounds: int = 100
    nodes: int | None = 20
    reproducible: bool = False


class _Base(NamedTuple):
    """What the shapes of a base have in common: what is safe, their bound, their recipes."""

    limits_bytes: tuple[float, ...]
    bound: BaseBound
    books: tuple[RecipeBook, ...]


class Solver:
    """One search over a problem."""

    def __init__(self, problem: PlanningProblem, options: SolveOptions) -> None:
        self.problem, self.options = problem, options
        self.model = CostModel(problem)
        self.started_s = time.monotonic()
        self.rejected: Counter[str] = Counter()
        self.nearest: dict[str, tuple[int, Rejected]] = {}
        self.shapes = self.milps = 0
        self.found: list[Found] = []
        self.bounds_s: list[float] = []
        self.open = OpenShapes(self._expired)
        self._bases: dict[int, _Base] = {}
        self._least: dict[tuple[object, ...], float] = {}

    def solve(self) -> Plan:
        """The best plan. Raises InfeasibleError where no strategy keeps the rules and fits."""
        import numpy as np

        limit_s = self.options.time_limit_s
        self._scout()
        if not self.found and limit_s is not None and limit_s < START_BELOW_S:
            self._start()
        self.space = self._legal()
        quick_s, self.rows, self.places = space_bounds_s(
            self.model, self.space, self.options.pins.recomputes, self._expired
        )
        if not self.space.complete:
            self.bounds_s.append(0.0)
        numbers = np.arange(len(quick_s))
        modelled = cache(self._candidate)
        candidates = Frontier(quick_s, numbers, modelled, self._expired)
        kinds = self._kinds()
        by_kind = [
            Frontier(quick_s[kinds == kind], numbers[kinds == kind], modelled, self._expired)
            for kind in np.unique(kinds)
        ]
        out_of_time = self._search(candidates, by_kind)
        self._add_runners_up(candidates)
        if not self.found:
            raise InfeasibleError(self._why_infeasible())
        best, evaluation = self._best_safe()
        unmodelled = candidates.count_unmodelled(best.step_time_s * (1 - self.options.gap_tolerance))
        self.rejected.update({"step_time_bound": unmodelled} if unmodelled else {})
        lower_s = min([*self.bounds_s, best.step_time_s])
        lower_s = self.open.least_s(lower_s, best.step_time_s * (1 - self.options.gap_tolerance))
        gap = max(0.0, 1 - lower_s / best.step_time_s)
        proven = gap <= self.options.gap_tolerance * (1 + OPTIMAL_GAP) + OPTIMAL_GAP and not out_of_time
        verify(self.problem, evaluation, lower_s)
        certificate = Certificate(
            status="optimal" if proven else "gap",
            objective_s=best.step_time_s,
            lower_bound_s=lower_s,
            gap=gap if gap > OPTIMAL_GAP else 0.0,
            wall_s=0.0 if self.options.reproducible else time.monotonic() - self.started_s,
            shapes=self.shapes,
            pruned=sum(self.rejected.values()),
            milps=self.milps,
            verified=True,
        )
        others = self._alternatives(best)
        return make_plan(self.problem, evaluation, certificate, dict(sorted(self.rejected.items())), others)

    def _scout(self) -> None:
        """A good plan of usual choices to begin with, where devices are of one kind and share no cores."""
        if is_mixed(self.problem.cluster) or self.model.sharing is not None:
            return
        scouted = Scout(self.problem, Shared(self.options.pins, self.model.layers)).plan(self.problem.cluster)
        if scouted is not None:
            evaluation = scouted.evaluation
            self.found.append(Found(evaluation.strategy, evaluation.estimate.step_time_s))

    def _start(self) -> None:
        """Plans to begin with, where time may be too short for all: plain ones, in a part of the time."""
        pins, cluster = self.options.pins, self.problem.cluster
        pps = [pp for pp in divisors(cluster.devices) if pp <= self.problem.model.layers]
        for zero, tp, pp in product((3, 1, 0), (1, cluster.devices_per_node), pps):
            plain: dict[str, object] = {"zero": zero, "tp": tp, "pp": pp, "cp": 1, "ep": 1, "micro_batch": 1}
            plain |= {"schedule": Schedule.ONE_F_ONE_B, "chunks": 1} if pp > 1 else {}
            free = {key: value for key, value in plain.items() if getattr(pins, key) is None}
            space = space_of(self.problem, dataclasses.replace(pins, **free))  # type: ignore[arg-type]
            for degrees in islice(space.shapes(), 1):
                if self._least_bytes(degrees) > max(self.model.limits_bytes):
                    continue
                model, own = self.model.shape(degrees), self._base(degrees)
                greedy = ShapeSearch(StageSpace(self.model, model, own.limits_bytes, own.books)).greedy()
                if greedy is not None:
                    self.found.append(greedy)
            left, limit = self._seconds_left(), self.options.time_limit_s
            if self.found and left is not None and limit is not None and left < START_LEAVES * limit:
                return

    def _expired(self) -> bool:
        """Whether the time is up and there is a plan to end with."""
        left = self._seconds_left()
        return left is not None and left <= 0 and bool(self.found)

    def _legal(self) -> Space:
        """Every legal base whose weights, gradients and optimizer state may fit."""
        space = space_of(self.problem, self.options.pins, self._expired)
        for order, rejected in enumerate(space.rejected):
            self._reject(rejected, order)
        self.shapes = len(space.rejected) + sum(map(len, space.pipes))
        kept, most = [], max(self.model.limits_bytes)
        if self._expired():
            return dataclasses.replace(space, bases=(), pipes=(), complete=False)
        for number, (base, pipes) in enumerate(zip(space.bases, space.pipes, strict=True)):
            least = self._least_bytes(base)
            if least <= most:
                kept.append(number)
            else:
                self._reject(self._too_large(base, least, most), number, len(pipes))
        fitting = Space(
            bases=tuple(space.bases[number] for number in kept),
            pipes=tuple(space.pipes[number] for number in kept),
            rejected=space.rejected,
            complete=space.complete,
        )
        options = self.options.pins.recomputes
        left, dominated = without_dominated(self.model, fitting, options, self._expired)
        self.rejected.update({"dominated": dominated} if dominated else {})
        return left

    def _least_bytes(self, base: Degrees) -> float:
        """The mean of weights, gradients and state over ranks, which shapes of one sharding share."""
        d = base
        key = d.tp, d.ep, d.etp, d.cp, d.pp, d.zero, d.dp_shard, d.dp_replicate, d.num_micro_batches > 1
        if key not in self._least:
            self._least[key] = least_state_bytes(self.model.layers, base, self.options.pins.offloaded)
        return self._least[key]

    def _candidate(self, number: int) -> Candidate | None:
        """The model of a shape and its bound; None where it cannot fit."""
        row = int(self.rows[number])
        schedule, chunks = self.space.pipes[row][int(self.places[number])]
        degrees = dataclasses.replace(self.space.bases[row], schedule=schedule, chunks=chunks)
        model = self.model.shape(degrees)
        if row not in self._bases:
            self._bases[row] = self._base(self.space.bases[row])
        base = self._bases[row]
        least, most = self._least_bytes(degrees), max(base.limits_bytes)
        if least > most:
            self._reject(self._too_large(degrees, least, most), number)
            return None
        search = ShapeSearch(StageSpace(self.model, model, base.limits_bytes, base.books))
        bound_s = base.bound.of(degrees)
        if bound_s == float("inf"):
            self._reject(self._no_recipe(search), number)
            return None
        return Candidate(bound_s, number, search)

    def _base(self, degrees: Degrees) -> _Base:
        shapes, options = self.model.rank_shapes(degrees), self.options.pins.recomputes
        kinds = {id(shape): shape for shape in shapes}
        limits = {key: self._safe_bytes(shape) for key, shape in kinds.items()}
        offload = self.options.pins.offloaded
        books = {key: RecipeBook(shape, options, offload) for key, shape in kinds.items()}
        each = tuple(limits[id(shape)] for shape in shapes)
        bound = BaseBound(self.model, shapes, options, each, offload)
        return _Base(each, bound, tuple(books[id(shape)] for shape in shapes))

    def _safe_bytes(self, shape: ShapeModel) -> float:
        """The most that a rank's tensors and runtime may take for a peak that is still SAFE."""
        return safe_tensor_bytes(shape.problem, self.model.coverage(shape), shape.runtime_bytes)

    def _reject(self, rejected: Rejected, order: int, shapes: int = 1) -> None:
        self.rejected[rejected.rule] += shapes
        known = self.nearest.setdefault(rejected.rule, (order, rejected))
        if order < known[0]:
            self.nearest[rejected.rule] = order, rejected

    def _too_large(self, degrees: Degrees, least: float, limit: float) -> Rejected:
        return Rejected(
            rule="memory",
            detail=f"{degrees.label()} needs at least {format_bytes(least)} a device for weights, gradients "
            f"and optimizer state; {format_bytes(limit)} is safe.",
        )

    def _seconds_left(self) -> float | None:
        limit = None if self.options.reproducible else self.options.time_limit_s
        return None if limit is None else limit - (time.monotonic() - self.started_s)

    def _best_safe(self) -> tuple[Found, Evaluation]:
        """The fastest of what was found whose own estimate is SAFE: bytes are rounded, so that few are not.

        Raises InfeasibleError where none is.
        """
        for found in sorted(self.found, key=lambda f: f.step_time_s):
            evaluation = self.model.evaluate(found.strategy)
            if evaluation.estimate.verdict is Verdict.SAFE:
                return found, evaluation
        raise InfeasibleError(self._why_infeasible())

    def _kinds(self) -> Ints:
        """The schedule of each shape as a number, 0 without a pipeline."""
        import numpy as np

        numbers = {schedule: number for number, schedule in enumerate(Schedule, 1)}
        kinds = [
            0 if base.pp == 1 else numbers[schedule]
            for base, pipes in zip(self.space.bases, self.space.pipes, strict=True)
            for schedule, _ in pipes
        ]
        return np.asarray(kinds, dtype=np.int64)

    def _search(self, candidates: Frontier, by_kind: list[Frontier]) -> bool:
        """Searches shapes until none left can win. Returns whether time ran out first."""
        started: list[tuple[float, Candidate]] = []
        for candidate in (each for kind in by_kind for each in islice(kind, GREEDY_SHAPES)):
            greedy = None if self._expired() else candidate.search.greedy()
            if greedy is not None:
                self.found.append(greedy)
                started.append((greedy.step_time_s, candidate))
        started.sort(key=lambda pair: (pair[0], pair[1].order))
        self.found += [
            dealt
            for _, candidate in started[:DEALT_SHAPES]
            if not self._expired() and (dealt := candidate.search.dealt()) is not None
        ]
        incumbent_s = min((found.step_time_s for found in self.found), default=float("inf"))
        stale = 0
        for candidate in candidates:
            to_beat_s = incumbent_s * (1 - self.options.gap_tolerance)
            bound_s = candidate.bound_s
            patient = stale < PATIENCE or self.open.least_s(bound_s, to_beat_s) >= bound_s
            if bound_s >= to_beat_s or self._expired() or not patient:
                self.bounds_s.append(bound_s)  # the least of all that are left
                return bound_s < to_beat_s and patient
            result = candidate.search.run(self._budget(to_beat_s))
            self.milps += result.milps
            bound_s = max(bound_s, result.bound_s)
            candidate.search.space.forget()
            if bound_s < to_beat_s:
                known = result.bound_s > 0 or not candidate.search.dealable
                self.open.add(candidate, bound_s, final=known)
            else:
                self.bounds_s.append(bound_s)
            stale += 1
            if result.found is None:
                if incumbent_s == float("inf"):
                    self._reject(self._no_recipe(candidate.search), self.shapes)
                continue
            self.found.append(result.found)
            if result.found.step_time_s < incumbent_s:
                incumbent_s, stale = result.found.step_time_s, 0
        if candidates.next_bound_s == float("inf"):
            return False
        self.bounds_s.append(candidates.next_bound_s)
        return True

    def _budget(self, to_beat_s: float) -> Budget:
        left, options = self._seconds_left(), self.options
        deadline_s = None if left is None else time.monotonic() + left
        return Budget(deadline_s, to_beat_s, options.rounds, options.nodes, options.gap_tolerance)

    def _no_recipe(self, search: ShapeSearch) -> Rejected:
        return Rejected(
            rule="memory",
            detail=f"{search.degrees.label()}: no mix of recomputation fits into "
            f"{format_bytes(max(search.space.limits_bytes))} a device.",
        )

    def _add_runners_up(self, candidates: Frontier) -> None:
        """An even split of the next shapes that were not searched, so that there is something to compare."""
        known = {found.strategy.degrees for found in self.found}
        for tried, candidate in enumerate(candidates):
            enough = len(known) > 4 * self.options.top or self._expired()
            if enough or (self.found and tried >= MAX_RUNNERS_UP):
                break
            if candidate.search.degrees not in known:
                greedy = candidate.search.greedy()
                if greedy is not None:
                    known.add(greedy.strategy.degrees)
                    self.found.append(greedy)

    def _alternatives(self, best: Found) -> tuple[Alternative, ...]:
        """The best strategies found of other shapes, and why each lost."""
        others = {f.strategy.degrees: f for f in sorted(self.found, key=lambda f: -f.step_time_s)}
        others.pop(best.strategy.degrees, None)
        nearest = sorted(others.values(), key=lambda f: (f.step_time_s, f.strategy.degrees.label()))
        return tuple(self._alternative(f.strategy, best) for f in distinct(nearest)[: self.options.top])

    def _alternative(self, strategy: Strategy, best: Found) -> Alternative:
        evaluation = self.model.evaluate(strategy)
        estimate = evaluation.estimate
        return Alternative(
            strategy=strategy,
            step_time_s=estimate.step_time_s,
            peak_memory_bytes=estimate.peak_memory_bytes,
            verdict=estimate.verdict,
            reason=why_slower(self.model.evaluate(best.strategy), evaluation),
        )

    def _why_infeasible(self) -> str:
        lines = [
            f"no feasible plan among {self.shapes} shapes for {self.problem.model.name} on "
            f"{self.problem.cluster.name}."
        ]
        for rule, (_, nearest) in sorted(
            self.nearest.items(), key=lambda item: (-self.rejected[item[0]], item[1][0])
        ):
            count = self.rejected[rule]
            lines.append(f"  {rule} ({count}): {nearest.detail}")
            if nearest.legal:
                lines.append(f"    legal here: {nearest.legal}")
        if self.rejected["memory"]:
            lines.append(
                "What would help: more devices, a larger --memory-limit, a shorter --seq, or an optimizer "
                "with less state."
            )
        return "\n".join(lines)


def make_plan(
    problem: PlanningProblem,
    evaluation: Evaluation,
    certificate: Certificate | None,
    rejected: dict[str, int],
    alternatives: tuple[Alternative, ...],
) -> Plan:
    """The plan of an evaluated strategy."""
    inputs = {"model": problem.model, "workload": problem.workload, "cluster": problem.cluster}
    digests = {name: digest(value) for name, value in inputs.items()}
    if problem.profile is not None:
        digests["profile"] = digest(problem.profile)
    of_kinds = {f"profile {device}": profile for device, profile in problem.device_profiles}
    digests |= {name: digest(profile) for name, profile in of_kinds.items() if profile is not None}
    return Plan(
        model=problem.model,
        workload=problem.workload,
        cluster=problem.cluster,
        strategy=evaluation.strategy,
        stage_estimates=evaluation.stages,
        estimate=evaluation.estimate,
        rank_axes=AXES,
        rank_grid_shape=evaluation.strategy.degrees.grid_shape(),
        schedule_table=print_table(evaluation.table),
        solver=certificate,
        rejected=rejected,
        alternatives=alternatives,
        digests=digests,
        not_modelled=not_modelled(problem, evaluation.strategy),
        timeline=evaluation.replay.events if evaluation.replay.event_count <= MAX_TIMELINE else (),
    )


def solve(problem: PlanningProblem, options: SolveOptions) -> Plan:
    """The best plan for a problem. Raises InfeasibleError with the rules that stand in the way."""
    return Solver(problem, options).solve()

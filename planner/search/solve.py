"""solve(): the best plan of the whole space, with a certificate.

1. Every legal shape gets a quick lower bound of its step time, all at once. Those whose even stages promise
   most get plans, so that there is something to beat (planner.search.candidates).
2. In order of it shapes are modelled, which gives each a better bound; those whose weights alone overflow are
   pruned. Shapes are searched in order of that bound.
3. The search stops when the next bound is no better than the incumbent: nothing left can win. Shapes that are
   not modelled by then count as ruled out by their bound.

Of models of several layer classes only cuts near the even one are searched. Where none of these fits, the
strategy that needs least memory is the answer if it does.

The certificate's lower bound is the least of the bounds of all shapes, searched and unsearched; the gap is
what lies between it and the plan.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import count, islice, product

from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.not_modelled import not_modelled
from planner.foundation.decode import digest
from planner.foundation.errors import InfeasibleError
from planner.foundation.frozen import frozen, replaced
from planner.foundation.suggest import divisors
from planner.job.problem import PlanningProblem
from planner.search.alternatives import distinct, why_slower
from planner.search.bounds.quick_bounds import space_bounds_s
from planner.search.candidates import (
    MEMORY,
    Base,
    Candidate,
    Frontier,
    Modeller,
    OpenShapes,
    Progress,
    Rejections,
    first_shapes,
    no_recipe,
    too_large,
)
from planner.search.greedy_plan import Scout, Shared
from planner.search.layout_search import Budget, Found, ShapeResult
from planner.search.least_memory import fitting
from planner.search.space import Space, space_of, without_dominated
from planner.search.verify import verify
from planner.search.worker_pool import Crew, Task, TaskKind, processes_for
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.placement import is_mixed
from planner.strategy.plan import Alternative, Certificate, Plan
from planner.strategy.schedule.schedules import print_table
from planner.strategy.strategy import AXES, Degrees, Schedule, Strategy

OPTIMAL_GAP = 1e-6
BETTER_SHAPES, BETTER_WITHIN = 4, 1.1
"""Shapes, in order of the time of an even split, for which something better is looked for before any is
searched; of those within so many times the best."""
LAG = 8
"""Shapes that are searched before what they find counts."""
FINISHING = 0.03
"""Share of the time limit that is left to verify what was found and to compare runners-up."""
OVERRUN = 0.03
"""Share of the time limit after which a process that still searches is ended."""
START_BELOW_S = 30.0
"""Time limits below which plain plans are made before anything else."""
START_LEAVES = 0.7
"""Part of the time that is left for the rest then."""
MAX_RUNNERS_UP = 64
"""Shapes, in order of their bound, that are tried for runners-up; more only where no plan was found."""
MAX_TIMELINE = 4096
"""Events of a replay that a plan carries; a picture of more cannot be read."""


@frozen
class SolveOptions:
    """What limits the search.

    It stops when nothing left can be faster by more than `gap_tolerance`, a share of the step time.
    `rounds` ILPs at most are solved for one shape, of `nodes` branch-and-bound nodes each (None: no limit):
    limits of work, not of time, so that the answer is the same on every machine. `reproducible` uses no
    clock and writes no wall time. A search goes on beyond its time until it has a plan, or knows that there
    is none, unless it `gives_up`: InfeasibleError then says no more than that none was found.
    """

    pins: FixedChoices
    time_limit_s: float | None = None
    top: int = 5
    gap_tolerance: float = 5e-3
    rounds: int = 100
    nodes: int | None = 20
    reproducible: bool = False
    gives_up: bool = False


class Solver:
    """One search over a problem."""

    def __init__(self, problem: PlanningProblem, options: SolveOptions) -> None:
        self.problem, self.options = problem, options
        self.model = CostModel(problem)
        self.started_s = time.monotonic()
        self.rejections = Rejections()
        self.modeller = Modeller(self.model, options.pins, self.rejections)
        self.shapes = self.milps = 0
        self.found: list[Found] = []
        self.bounds_s: list[float] = []
        self._bases: dict[int, Base] = {}
        self._modelled = cache(self._candidate)

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
        candidates = Frontier(quick_s, np.arange(len(quick_s)), self._modelled, self._expired)
        begin = partial(first_shapes, self.space, quick_s, self._promised, self._expired)
        promising = begin()
        processes = processes_for(len(quick_s))  # that know what was modelled until now
        crew = Crew(self._work, processes, self._expired, self._overdue, self._row)
        try:
            self._begin(crew, promising)
            if not self.found:
                self._begin(crew, begin(within=float("inf")))
            out_of_time = self._search(crew, candidates)
            if self.found or out_of_time:
                self._add_runners_up(crew, candidates)
        finally:
            crew.close()
        if not self.found:
            self._far_from_even(float(quick_s.min(initial=float("inf"))))
        if not self.found:
            raise InfeasibleError(self.rejections.why_infeasible(self.problem, self.shapes))
        best, evaluation = self._best_safe()
        unmodelled = candidates.count_unmodelled(best.step_time_s * (1 - self.options.gap_tolerance))
        rejected = self.rejections.counts + Counter(step_time_bound=unmodelled)
        lower_s = min([*self.bounds_s, best.step_time_s])
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
            pruned=rejected.total(),
            milps=self.milps,
            verified=True,
        )
        others = self._alternatives(evaluation)
        return make_plan(self.problem, evaluation, certificate, dict(sorted(rejected.items())), others)

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
                if self.modeller.least_bytes(degrees) > max(self.model.limits_bytes):
                    continue
                greedy = self.modeller.search(degrees, self.modeller.base(degrees)).greedy()
                if greedy is not None:
                    self.found.append(greedy)
            left, limit = self._seconds_left(), self.options.time_limit_s
            if self.found and left is not None and limit is not None and left < START_LEAVES * limit:
                return

    def _far_from_even(self, least_s: float) -> None:
        """A plan that fits though its cut is far from the even one: of models of several layer classes none
        such is searched. All that is known of its like is what no shape beats, `least_s`."""
        if len(self.problem.model.classes()) == 1:
            return
        need = fitting(self.problem, self.options.pins, self._expired)
        if need is not None:
            step_s = self.model.evaluate(need.strategy).estimate.step_time_s
            self.found.append(Found(need.strategy, step_s))
            self.bounds_s.append(least_s)

    def _expired(self) -> bool:
        """Whether the time is up and there is a plan to end with, or none is waited for."""
        left = self._seconds_left()
        return left is not None and left <= 0 and (bool(self.found) or self.options.gives_up)

    def _legal(self) -> Space:
        """Every legal base whose weights, gradients and optimizer state may fit."""
        space = space_of(self.problem, self.options.pins, self._expired)
        for order, rejected in enumerate(space.rejected):
            self.rejections.add(rejected, order)
        self.shapes = len(space.rejected) + sum(map(len, space.pipes))
        kept, most = [], max(self.model.limits_bytes)
        if self._expired():
            return dataclasses.replace(space, bases=(), pipes=(), complete=False)
        for number, (base, pipes) in enumerate(zip(space.bases, space.pipes, strict=True)):
            least = self.modeller.least_bytes(base)
            if least <= most:
                kept.append(number)
            else:
                make = partial(too_large, base, least, most)
                self.rejections.add_made(MEMORY, make, number, len(pipes))
        fitting = Space(
            bases=tuple(space.bases[number] for number in kept),
            pipes=tuple(space.pipes[number] for number in kept),
            rejected=space.rejected,
            complete=space.complete,
        )
        options = self.options.pins.recomputes
        left, dominated = without_dominated(self.model, fitting, options, self._expired)
        self.rejections.counts += Counter(dominated=dominated)
        return left

    def _row(self, task: Task) -> int:
        """The number of a task's base."""
        return int(self.rows[task.number])

    def _of(self, number: int) -> tuple[Degrees, Base]:
        """A shape by its number, and its base."""
        row = int(self.rows[number])
        schedule, chunks = self.space.pipes[row][int(self.places[number])]
        if row not in self._bases:
            self._bases[row] = self.modeller.base(self.space.bases[row])
        return replaced(self.space.bases[row], schedule=schedule, chunks=chunks), self._bases[row]

    def _candidate(self, number: int) -> Candidate | None:
        """The bound of a shape; None where it cannot fit."""
        return self.modeller.candidate(*self._of(number), number)

    def _promised(self, number: int) -> Candidate | None:
        """A shape as a candidate of about its time; None where it cannot fit."""
        candidate = self._modelled(number)
        if candidate is None:
            return None
        even_s = self._bases[int(self.rows[number])].bound.even_s(candidate.degrees)
        return candidate._replace(bound_s=max(candidate.bound_s, even_s))

    def _work(self, task: Task) -> ShapeResult:
        """The result of a task; it depends on nothing but the task."""
        degrees, base = self._of(task.number)
        search = self.modeller.search(degrees, base)
        ask: dict[TaskKind, Callable[[Budget], ShapeResult]] = {
            TaskKind.GREEDY: lambda _: ShapeResult(search.greedy(), 0.0, 0),
            TaskKind.BETTER: search.better,
            TaskKind.BEST: search.run,
            TaskKind.BOUND: lambda budget: search.bound(budget, base.bound.of(degrees)),
        }
        result = ask[task.kind](task.budget)
        for book in base.books:
            book.forget()  # a search goes through thousands of shapes
        return result

    def _overdue(self) -> bool:
        """Whether the time is up by so much that nothing is waited for any more."""
        left, limit = self._seconds_left(), self.options.time_limit_s
        return left is not None and limit is not None and left < -OVERRUN * limit and bool(self.found)

    def _seconds_left(self) -> float | None:
        limit = None if self.options.reproducible else self.options.time_limit_s
        return None if limit is None else (1 - FINISHING) * limit - (time.monotonic() - self.started_s)

    def _best_safe(self) -> tuple[Found, Evaluation]:
        """The fastest of what was found whose own estimate is SAFE: bytes are rounded, so that few are not.

        Raises InfeasibleError where none is.
        """
        for found in sorted(self.found, key=lambda f: f.step_time_s):
            evaluation = self.model.evaluate(found.strategy)
            if evaluation.estimate.verdict is Verdict.SAFE:
                return found, evaluation
        raise InfeasibleError(self.rejections.why_infeasible(self.problem, self.shapes))

    def _begin(self, crew: Crew, shapes: list[int]) -> None:
        """Even splits of some shapes, and better deals of the fastest."""
        greedy = self._all(crew, TaskKind.GREEDY, shapes, float("inf"))
        started = sorted((found.step_time_s, number) for number, found in greedy.items())
        known_s = min((found.step_time_s for found in self.found), default=float("inf"))
        better = [number for step_s, number in started if step_s < BETTER_WITHIN * known_s]
        self._all(crew, TaskKind.BETTER, better[:BETTER_SHAPES], known_s)

    def _all(self, crew: Crew, kind: TaskKind, shapes: Iterable[int], to_beat_s: float) -> dict[int, Found]:
        """What a task of each of these shapes finds, if anything; it is kept."""
        tasks = [Task(kind, number, self._budget(to_beat_s)) for number in shapes]
        for task in tasks:
            crew.add(task)
        results = {task.number: crew.take(task).found for task in tasks}
        found = {number: each for number, each in results.items() if each is not None}
        self.found += found.values()
        return found

    def _search(self, crew: Crew, candidates: Frontier) -> bool:
        """Searches shapes until none left can win. Returns whether time ran out first.

        A shape has to beat what was found LAG shapes before it: so many are searched beside each other.
        """
        incumbent_s = min((found.step_time_s for found in self.found), default=float("inf"))
        progress = Progress(incumbent_s, self.options.gap_tolerance)
        open_shapes = OpenShapes(partial(self._bounds_s, crew))
        under_way: deque[tuple[Candidate, Task]] = deque()

        def take(most: int) -> None:
            while len(under_way) > most:
                candidate, task = under_way.popleft()
                self._take(candidate, crew.take(task), progress, open_shapes)

        out_of_time, patient = False, True
        for candidate in candidates:
            take(LAG - 1)
            if progress.stale:
                least_s = open_shapes.least_s(candidate.bound_s, progress.to_beat_s)
                patient = least_s >= candidate.bound_s or not progress.spent(least_s)
            won = candidate.bound_s >= progress.to_beat_s
            if won or not patient or self._expired():
                self.bounds_s.append(candidate.bound_s)  # the least of all that are left
                out_of_time = not won and patient
                break
            task = Task(TaskKind.BEST, candidate.order, self._budget(progress.to_beat_s))
            crew.add(task)
            under_way.append((candidate, task))
        else:
            if candidates.next_bound_s < float("inf"):
                self.bounds_s.append(candidates.next_bound_s)
                out_of_time = True
        take(0)
        self.bounds_s.append(open_shapes.least_s(progress.incumbent_s, progress.to_beat_s))
        return out_of_time

    def _take(
        self, candidate: Candidate, result: ShapeResult, progress: Progress, open_shapes: OpenShapes
    ) -> None:
        """Takes what the search of a shape found."""
        self.milps += result.milps
        progress.add(result.found)
        open_shapes.add(candidate.order, max(candidate.bound_s, result.bound_s))
        if result.found is not None:
            self.found.append(result.found)
        elif progress.incumbent_s == float("inf"):
            degrees, base = self._of(candidate.order)
            self.rejections.add(no_recipe(degrees, base.limits_bytes), self.shapes)

    def _bounds_s(self, crew: Crew, numbers: list[int], to_beat_s: float) -> list[float]:
        """Bounds of shapes, up to a step time; better plans that come to light are kept."""
        tasks = [Task(TaskKind.BOUND, number, self._budget(to_beat_s)) for number in numbers]
        for task in tasks:
            crew.add(task)
        results = list(map(crew.take, tasks))
        self.found += [result.found for result in results if result.found is not None]
        return [result.bound_s for result in results]

    def _budget(self, to_beat_s: float) -> Budget:
        left, options = self._seconds_left(), self.options
        deadline_s = None if left is None else time.monotonic() + left
        return Budget(deadline_s, to_beat_s, options.rounds, options.nodes, options.gap_tolerance)

    def _add_runners_up(self, crew: Crew, candidates: Frontier) -> None:
        """An even split of the next shapes that were not searched, so that there is something to compare."""
        known, left = {found.strategy.degrees for found in self.found}, iter(candidates)
        for tried in count(0, LAG):
            each = list(islice(left, LAG))
            enough = len(known) > 4 * self.options.top or self._expired()
            if not each or enough or (self.found and tried >= MAX_RUNNERS_UP):
                break
            new = [candidate.order for candidate in each if candidate.degrees not in known]
            found = self._all(crew, TaskKind.GREEDY, new, float("inf"))
            known |= {own.strategy.degrees for own in found.values()}

    def _alternatives(self, best: Evaluation) -> tuple[Alternative, ...]:
        """The best strategies found of other shapes, and why each lost."""
        others = {f.strategy.degrees: f for f in sorted(self.found, key=lambda f: -f.step_time_s)}
        others.pop(best.strategy.degrees, None)
        nearest = sorted(others.values(), key=lambda f: (f.step_time_s, f.strategy.degrees.label()))
        return tuple(self._alternative(f.strategy, best) for f in distinct(nearest)[: self.options.top])

    def _alternative(self, strategy: Strategy, best: Evaluation) -> Alternative:
        evaluation = self.model.evaluate(strategy)
        estimate = evaluation.estimate
        return Alternative(
            strategy=strategy,
            step_time_s=estimate.step_time_s,
            peak_memory_bytes=estimate.peak_memory_bytes,
            verdict=estimate.verdict,
            reason=why_slower(best, evaluation),
        )


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

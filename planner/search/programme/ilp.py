"""Silence on stdout, which is for results.

The integer programme that splits the layers of a model into pipeline stages.

Sets
    s in S          stages, in layer order; r(s) the pipeline rank that holds s
    c in C_s        columns (recipes) of stage s: n_c layers from i_c to e_c, seconds p_ck of its actions of
                    kind k (F B I W), unshard u_c, reduce g_c, optimizer o_c, resident bytes, saved bytes per
                    micro-batch, transient bytes
    q in Q          paths through the schedule's table, from the start of rank y_q to the end of rank z_q over
                    hops_q messages of h seconds, with a_qsk actions of kind k of stage s
    v in V_r        fullest moments of rank r: what is in flight by stage

Variables
    x_c in {0, 1}   column c is taken
    T >= 0          first forward to the last reduction
    O >= 0          the slowest optimizer step
    F, B >= 0       the slowest forward and backward (GPipe only)
    M_rv >= 0       the largest transient of rank r at moment v (several stages a rank only)

    minimise  T + O

subject to
    one_s     sum_{c in C_s} x_c = 1                                               for all s
    cover     sum_c n_c x_c = L                                        where layers are of one class
    meet_sl   sum_{c in C_s: e_c = l} x_c = sum_{c in C_s+1: i_c = l} x_c              else, for all s, l
    path_q    T >= u(y_q) + sum_s,k a_qsk p_k(s) + hops_q h + g(z_q)                   for all q
    gpipe     T >= u(0) + sum f + (m-1) F + sum b + (m-1) B + 2 (p-1) h + g(0),  F >= f(s), B >= b(s)
    share     T >= sum_s m work(s) / throughput                                    where cores are shared
    opt_r     O >= o(r) + what a step takes besides                                for all ranks r
    mem_rv    M_rv + sum_s held_v(s) <= limit_r                                     for all r, v in V_r
    beat      T + O <= the step time to beat
    cut_k     sum of x over assignment k <= |S| - 1                   assignments seen, where cores are shared

where y(s) = sum_{c in C_s} y_c x_c and y(r) sums over the stages of rank r. Every constraint on T is the
length of a path of the schedule's longest-path replay, so the optimum is a true lower bound of the replay
of any assignment of this shape. Few paths are written down at first; each assignment that is found is
replayed and its critical path added as a row, until the replay is no longer than the optimum: then the
assignment is the shape's best. Times are in ms and bytes in GiB, so coefficients stay near 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planner.cost.replay import CriticalPath
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB
from planner.search.programme.stage_options import Column
from planner.strategy.schedule.makespan_paths import Path, first_paths
from planner.strategy.schedule.table import Flights, InFlight
from planner.strategy.strategy import Degrees, Schedule

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """HiGHS greets on the process's stdout even when told to be silent."""
    sys.stdout.flush()
    saved = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)


MS = 1e3


@frozen
class StageProgramme:
    """The data of the programme for one shape.

    `limits_bytes` are what each rank's stages may use; `transient_bytes` what a stage's column holds for a
    moment with what is in flight. `work_scale` stretches work where ranks share cores.
    `step_s` is what a rank's optimizer step takes besides its stages'. Only assignments that may beat
    `to_beat_s` are looked for.
    """

    degrees: Degrees
    layers: int
    one_class: bool
    columns: tuple[tuple[Column, ...], ...]
    in_flight: tuple[Flights, ...]
    hop_s: float
    limits_bytes: tuple[float, ...]
    transient_bytes: Callable[[int, Column, InFlight], float]
    work_scale: float = 1.0
    optimizer_scale: float = 1.0
    step_s: float = 0.0
    to_beat_s: float = float("inf")
    throughput: float | None = None
    devices_per_rank: int = 1

    def forward_s(self, column: Column) -> float:
        """One forward, at the least stretch that this rank's own devices cause."""
        return column.cost.forward.work_s * self.work_scale + column.cost.forward.fixed_s

    def backward_s(self, column: Column) -> float:
        """One backward, likewise."""
        return column.cost.backward.work_s * self.work_scale + column.cost.backward.fixed_s

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds."""
        return self.degrees.stages_of_pp_rank(rank)


@frozen
class IlpAnswer:
    """What the solver found: the chosen columns, their objective, and the proven bound.

    `status` is optimal, infeasible, or limit (then `columns` may be empty).
    """

    status: str
    columns: tuple[Column, ...]
    objective_s: float
    bound_s: float


class StageIlp:
    """The programme of one shape; each method adds the constraint that its docstring names."""

    def __init__(self, programme: StageProgramme, nodes: int | None = None) -> None:
        import pulp  # type: ignore[import-untyped]

        pulp.set_v4_migration_warnings(False)
        self.pulp, self.programme, self.nodes = pulp, programme, nodes
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        self.x = [
            [self.problem.add_variable(f"x_{s}_{k}", 0, 1, pulp.LpBinary) for k in range(len(columns))]
            for s, columns in enumerate(programme.columns)
        ]
        self.t = self.problem.add_variable("T", 0)
        self.o = self.problem.add_variable("O", 0)
        self.problem.setObjective(self.t + self.o)
        self.highs: Any = None
        if programme.to_beat_s < float("inf"):
            self._add(self.t + self.o <= MS * programme.to_beat_s, "beat")
        self._one()
        if programme.one_class:
            self._cover()
        else:
            self._meet()
        if programme.degrees.schedule is Schedule.GPIPE:
            self._gpipe()
        for path in first_paths(programme.degrees):
            self._path(path)
        self._own()
        self._share()
        self._optimizers()
        self._memory()

    def _sums(self, stages: Iterable[int], figure: Callable[[Column], float]) -> Any:
        """Sum over stages of figure(s) = sum over the columns of s of figure_c x_c."""
        return self._weighted((s, figure) for s in stages)

    def _weighted(self, terms: Iterable[tuple[int, Callable[[Column], float]]]) -> Any:
        """Sum over (stage, figure) of figure(s). Built in one go: adding expressions copies them."""
        pairs = [
            (x, figure(c))
            for s, figure in terms
            for c, x in zip(self.programme.columns[s], self.x[s], strict=True)
        ]
        return self.pulp.LpAffineExpression(pairs)

    def _sum(self, stage: int, figure: Callable[[Column], float]) -> Any:
        return self._sums([stage], figure)

    def _rank(self, rank: int, figure: Callable[[Column], float]) -> Any:
        """figure(r) = sum over the stages of rank r."""
        return self._sums(self.programme.stages_of(rank), figure)

    def _add(self, constraint: Any, name: str) -> None:
        self.problem += (constraint, name)

    def _one(self) -> None:
        """one_s: each stage takes one column."""
        for stage, variables in enumerate(self.x):
            self._add(self.pulp.lpSum(variables) == 1, f"one_{stage}")

    def _meet(self) -> None:
        """meet_sl: each stage begins at the layer where the stage before it ends."""
        for s, (before, after) in enumerate(pairwise(self.programme.columns)):
            ends = {c.stage.end for c in before} | {c.stage.first for c in after}
            for layer in sorted(ends):
                left = [x for c, x in zip(before, self.x[s], strict=True) if c.stage.end == layer]
                right = [x for c, x in zip(after, self.x[s + 1], strict=True) if c.stage.first == layer]
                self._add(self.pulp.lpSum(left) == self.pulp.lpSum(right), f"meet_{s}_{layer}")

    def _cover(self) -> None:
        """cover: the stages hold all layers."""
        total = self._sums(range(len(self.x)), lambda c: c.layers)
        self._add(total == self.programme.layers, "cover")

    def _ends(self) -> Any:
        """u(0) + g(0): what rank 0 does before its first forward and after its last backward."""
        return self._rank(0, lambda c: MS * (c.cost.unshard_s + c.cost.reduce_s))

    def _path(self, path: Path) -> None:
        """path_q of a path that starts and ends on rank 0."""
        programme = self.programme

        def on(stage: int) -> Callable[[Column], float]:
            on_f, on_b = MS * path.forward[stage], MS * path.backward[stage]
            return lambda c: on_f * programme.forward_s(c) + on_b * programme.backward_s(c)

        through = self._weighted((s, on(s)) for s in range(len(self.x)))
        hops_ms = path.hops * programme.hop_s * MS
        self._add(self.t - self._ends() - through >= hops_ms, f"path_{path.name}")

    def _gpipe(self) -> None:
        """gpipe: two flow shops with equal jobs, one after the other."""
        programme, stages = self.programme, range(len(self.x))
        slowest_f, slowest_b = self.problem.add_variable("F", 0), self.problem.add_variable("B", 0)
        for s in stages:
            self._add(slowest_f >= self._sum(s, lambda c: MS * programme.forward_s(c)), f"gpipe_f_{s}")
            self._add(slowest_b >= self._sum(s, lambda c: MS * programme.backward_s(c)), f"gpipe_b_{s}")
        through = self._sums(stages, lambda c: MS * (programme.forward_s(c) + programme.backward_s(c)))
        more = programme.degrees.num_micro_batches - 1
        hops = 2 * (programme.degrees.pp - 1) * programme.hop_s * MS
        self._add(self.t >= self._ends() + through + more * slowest_f + more * slowest_b + hops, "gpipe")

    def _own(self) -> None:
        """path_q of each rank's own work: none ends before that is done."""
        programme = self.programme
        m = programme.degrees.num_micro_batches

        def own_ms(c: Column) -> float:
            passes_s = m * (programme.forward_s(c) + programme.backward_s(c))
            return MS * (c.cost.unshard_s + passes_s + c.cost.reduce_s)

        for rank in range(programme.degrees.pp):
            self._add(self.t >= self._rank(rank, own_ms), f"own_{rank}")

    def _share(self) -> None:
        """share: the cores of a node do no more work in a second than they can."""
        programme = self.programme
        if programme.throughput is None:
            return
        times = MS * programme.degrees.num_micro_batches * programme.devices_per_rank / programme.throughput
        work = self._sums(
            range(len(self.x)), lambda c: times * (c.cost.forward.work_s + c.cost.backward.work_s)
        )
        self._add(self.t >= work, "share")

    def _optimizers(self) -> None:
        """opt_r."""
        programme, scale = self.programme, MS * self.programme.optimizer_scale
        for rank in range(programme.degrees.pp):
            own = self._rank(rank, lambda c: scale * c.cost.optimizer_s)
            self._add(self.o >= own + scale * programme.step_s, f"opt_{rank}")

    def _memory(self) -> None:
        """mem_rv: with one stage a rank the recipes already fit; else each in-flight vector must."""
        programme = self.programme
        if programme.degrees.chunks == 1:
            return
        for rank, vectors in enumerate(programme.in_flight):
            stages = programme.stages_of(rank)
            for index, vector in enumerate(vectors):
                transient = self.problem.add_variable(f"M_{rank}_{index}", 0)

                def widest(stage: int, flight: InFlight) -> Callable[[Column], float]:
                    return lambda c: programme.transient_bytes(stage, c, flight) / GIB

                def used(flight: InFlight) -> Callable[[Column], float]:
                    return lambda c: c.held_bytes(flight) / GIB

                for s in stages:
                    own = self._sum(s, widest(s, vector[s]))
                    self._add(transient >= own, f"transient_{rank}_{index}_{s}")
                total = self._weighted((s, used(vector[s])) for s in stages)
                self._add(total + transient <= programme.limits_bytes[rank] / GIB, f"mem_{rank}_{index}")

    def exclude(self, assignment: tuple[Column, ...]) -> None:
        """cut_k: not this assignment again."""
        number = {
            (s, id(c)): k for s, columns in enumerate(self.programme.columns) for k, c in enumerate(columns)
        }
        taken = [self.x[s][number[s, id(column)]].index for s, column in enumerate(assignment)]
        self._row(-self.highs.inf, len(taken) - 1.0, taken, [1.0] * len(taken))

    def add_path(self, path: CriticalPath) -> None:
        """path_q of any path of the table."""
        programme = self.programme
        first, last = (programme.stages_of(rank) for rank in (path.first_rank, path.last_rank))
        indices, values = [self.t.index], [1.0]
        for s, (columns, variables) in enumerate(zip(programme.columns, self.x, strict=True)):
            counts = path.counts[s].tolist()
            starts, ends = float(s in first), float(s in last)
            for column, variable in zip(columns, variables, strict=True):
                passes_s = sum(n * each for n, each in zip(counts, column.passes_s, strict=True))
                outer_s = starts * column.cost.unshard_s + ends * column.cost.reduce_s
                if passes_s + outer_s > 0:
                    indices.append(variable.index)
                    values.append(-MS * (passes_s + outer_s))
        self._row(path.hops * programme.hop_s * MS, self.highs.inf, indices, values)

    def _row(self, lower: float, upper: float, indices: list[int], values: list[float]) -> None:
        self.highs.addRow(lower, upper, len(indices), indices, values)

    def _build(self, time_limit_s: float | None) -> None:
        """Hands the programme to HiGHS, once; rows that are added later go to HiGHS itself."""
        work = {} if self.nodes is None else {"mip_max_nodes": self.nodes}
        solver = self.pulp.HiGHS(
            msg=False, threads=1, gapRel=1e-6, timeLimit=time_limit_s, random_seed=0, **work
        )
        # PuLP's own `solve` fails on some of HiGHS's limits, and calls others optimal.
        solver.createAndConfigureSolver(self.problem)
        solver.buildSolverModel(self.problem)
        self.highs = self.problem.solverModel

    def solve(self, time_limit_s: float | None) -> IlpAnswer:
        """Runs HiGHS on one thread and reads status, objective and bound from its own model."""
        if any(not columns for columns in self.programme.columns):
            return IlpAnswer(status="infeasible", columns=(), objective_s=0.0, bound_s=0.0)
        limit = None if time_limit_s is None else max(time_limit_s, 0.01)
        with quiet_stdout():
            if self.highs is None:
                self._build(limit)
            elif limit is not None:
                self.highs.setOptionValue("time_limit", self.highs.getRunTime() + limit)
            self.highs.run()
        highs = self.highs
        status = highs.modelStatusToString(highs.getModelStatus())
        info = highs.getInfo()
        if status == "Infeasible":
            return IlpAnswer(status="infeasible", columns=(), objective_s=0.0, bound_s=0.0)
        bound_s = max(float(info.mip_dual_bound), 0.0) / MS
        if abs(info.primal_solution_status - 2) > 0:
            return IlpAnswer(status="limit", columns=(), objective_s=0.0, bound_s=bound_s)
        values = highs.getSolution().col_value
        chosen = tuple(
            max(zip(columns, variables, strict=True), key=lambda pair: values[pair[1].index])[0]
            for columns, variables in zip(self.programme.columns, self.x, strict=True)
        )
        objective_s = float(info.objective_function_value) / MS
        status = "optimal" if status == "Optimal" else "limit"
        return IlpAnswer(
            status=status, columns=chosen, objective_s=objective_s, bound_s=min(bound_s, objective_s)
        )

"""The integer programme that splits the layers of a model into pipeline stages.

Sets
    s in S          stages, in layer order; r(s) = s mod p the pipeline rank that holds s
    c in C_s        columns (recipes) of stage s: n_c layers from i_c to e_c, passes f_c and b_c,
                    unshard u_c, reduce g_c, optimizer o_c, resident bytes, saved bytes per micro-batch,
                    transient bytes
    q in Q          bounding paths of the schedule (planner.search.paths), weights a_qs on f and d_qs on b
    v in V_r        in-flight vectors of rank r: live micro-batches by stage

Variables
    x_c in {0, 1}   column c is taken
    T >= 0          first forward to the last reduction
    O >= 0          the slowest optimizer step
    F, B >= 0       the slowest forward and backward (GPipe only)
    M_r >= 0        the largest transient of rank r (several stages a rank only)

    minimise  T + O

subject to
    one_s     sum_{c in C_s} x_c = 1                                               for all s
    cover     sum_c n_c x_c = L                                        where layers are of one class
    meet_sl   sum_{c in C_s: e_c = l} x_c = sum_{c in C_s+1: i_c = l} x_c              else, for all s, l
    path_q    T >= u(0) + sum_s a_qs f(s) + d_qs b(s) + hops_q h + g(0)             for all q
    own_r     T >= u(r) + m (f + b)(r) + g(r)                                      for all ranks r
    gpipe     T >= u(0) + sum f + (m-1) F + sum b + (m-1) B + 2 (p-1) h + g(0),  F >= f(s), B >= b(s)
    share     T >= sum_s m work(s) / throughput                                    where cores are shared
    opt_r     O >= o(r)                                                            for all ranks r
    mem_rv    resident(r) + M_r + sum_s v_s saved(s) <= limit                      for all r, v in V_r
    beat      T + O <= the step time to beat
    cut_k     sum of x over assignment k <= |S| - 1                                assignments seen before

where y(s) = sum_{c in C_s} y_c x_c and y(r) sums over the stages of rank r. Every constraint on T is the
length of a path of the schedule's longest-path replay, so the optimum is a true lower bound of the replay
of any assignment of this shape. Times are in ms and bytes in GiB, so coefficients stay near 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from planner.codec import noun
from planner.search.paths import Path, paths
from planner.search.recipes import Column
from planner.strategy import Degrees, Schedule
from planner.units import GIB

MS = 1e3


@noun
class StageProgramme:
    """The data of the programme for one shape.

    `limit_bytes` is what a rank's stages may use. `work_scale` stretches work where ranks share cores.
    Only assignments that may beat `to_beat_s` are looked for.
    """

    degrees: Degrees
    layers: int
    one_class: bool
    columns: tuple[tuple[Column, ...], ...]
    in_flight: tuple[tuple[dict[int, int], ...], ...]
    hop_s: float
    limit_bytes: float
    work_scale: float = 1.0
    optimizer_scale: float = 1.0
    to_beat_s: float = float("inf")
    throughput: float | None = None
    devices_per_rank: int = 1

    def forward_s(self, column: Column) -> float:
        """One forward, at the least stretch that this rank's own devices cause."""
        return column.cost.forward.work_s * self.work_scale + column.cost.forward.fixed_s

    def backward_s(self, column: Column) -> float:
        """One backward, likewise."""
        return column.cost.backward.work_s * self.work_scale + column.cost.backward.fixed_s

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a pipeline rank holds."""
        return [s for s in range(self.degrees.stages) if self.degrees.pp_rank_of_stage(s) == rank]


@noun
class IlpAnswer:
    """What the solver found: the chosen columns, their objective, and the proven bound.

    `status` is optimal, infeasible, or limit (then `columns` may be empty).
    """

    status: str
    columns: tuple[Column, ...]
    objective_s: float
    bound_s: float


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS greets on the process's stdout even when told to be silent; stdout is for results."""
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


class IlpBuilder:
    """Builds and solves the programme; each method adds the constraint that its docstring names."""

    def __init__(self, programme: StageProgramme, seen: Sequence[tuple[Column, ...]]) -> None:
        import pulp  # type: ignore[import-untyped]

        pulp.set_v4_migration_warnings(False)
        self.pulp, self.programme = pulp, programme
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        self.x = [
            [self.problem.add_variable(f"x_{s}_{k}", 0, 1, pulp.LpBinary) for k in range(len(columns))]
            for s, columns in enumerate(programme.columns)
        ]
        self.t = self.problem.add_variable("T", 0)
        self.o = self.problem.add_variable("O", 0)
        self.problem.setObjective(self.t + self.o)
        if programme.to_beat_s < float("inf"):
            self._add(self.t + self.o <= MS * programme.to_beat_s, "beat")
        self._one()
        if programme.one_class:
            self._cover()
        else:
            self._meet()
        if programme.degrees.schedule is Schedule.GPIPE:
            self._gpipe()
        else:
            for path in paths(programme.degrees):
                self._path(path)
        self._own()
        self._share()
        self._optimizers()
        self._memory()
        for index, assignment in enumerate(seen):
            self._cut(index, assignment)

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
        """path_q."""
        programme = self.programme

        def passes_ms(column: Column) -> float:
            on_f, on_b = path.forward[column.index], path.backward[column.index]
            return MS * (on_f * programme.forward_s(column) + on_b * programme.backward_s(column))

        through = self._sums(range(len(self.x)), passes_ms)
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
        """own_r: no rank ends before its own work is done."""
        programme = self.programme
        m = programme.degrees.num_micro_batches
        for rank in range(programme.degrees.pp):
            own = self._rank(
                rank,
                lambda c: (
                    MS
                    * (
                        c.cost.unshard_s
                        + m * (programme.forward_s(c) + programme.backward_s(c))
                        + c.cost.reduce_s
                    )
                ),
            )
            self._add(self.t >= own, f"own_{rank}")

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
        scale = MS * self.programme.optimizer_scale
        for rank in range(self.programme.degrees.pp):
            self._add(self.o >= self._rank(rank, lambda c: scale * c.cost.optimizer_s), f"opt_{rank}")

    def _memory(self) -> None:
        """mem_rv: with one stage a rank the recipes already fit; else each in-flight vector must."""
        programme = self.programme
        if programme.degrees.chunks == 1:
            return
        for rank, vectors in enumerate(programme.in_flight):
            transient = self.problem.add_variable(f"M_{rank}", 0)
            for s in programme.stages_of(rank):
                widest = self._sum(s, lambda c: c.transient_bytes / GIB)
                self._add(transient >= widest, f"transient_{rank}_{s}")
            for index, vector in enumerate(vectors):
                used = self._rank(
                    rank,
                    lambda c, alive=vector: (  # type: ignore[misc]
                        (c.resident_bytes + alive.get(c.index, 0) * c.cost.saved_bytes) / GIB
                    ),
                )
                self._add(used + transient <= programme.limit_bytes / GIB, f"mem_{rank}_{index}")

    def _cut(self, index: int, assignment: tuple[Column, ...]) -> None:
        """cut_k: not this assignment again."""
        taken = [self.x[s][self.programme.columns[s].index(column)] for s, column in enumerate(assignment)]
        self._add(self.pulp.lpSum(taken) <= len(taken) - 1, f"cut_{index}")

    def solve(self, time_limit_s: float | None, nodes: int | None) -> IlpAnswer:
        """Runs HiGHS on one thread and reads status, objective and bound from its own model."""
        limit = None if time_limit_s is None else max(time_limit_s, 0.05)
        work = {} if nodes is None else {"mip_max_nodes": nodes}
        solver = self.pulp.HiGHS(msg=False, threads=1, gapRel=1e-5, timeLimit=limit, random_seed=0, **work)
        with _quiet_stdout():
            # PuLP's own `solve` fails on some of HiGHS's limits, and calls others optimal.
            solver.createAndConfigureSolver(self.problem)
            solver.buildSolverModel(self.problem)
            solver.callSolver(self.problem)
        highs = self.problem.solverModel
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


def solve_stages(
    programme: StageProgramme,
    seen: Sequence[tuple[Column, ...]] = (),
    time_limit_s: float | None = None,
    nodes: int | None = None,
) -> IlpAnswer:
    """The best assignment of columns to stages that is not among `seen`, within the limits given."""
    if any(not columns for columns in programme.columns):
        return IlpAnswer(status="infeasible", columns=(), objective_s=0.0, bound_s=0.0)
    return IlpBuilder(programme, seen).solve(time_limit_s, nodes)

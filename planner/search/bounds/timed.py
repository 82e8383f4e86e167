"""A shape's stages in whole blocks, with the end of every action as a variable: for tables of few actions.

With x_so whole blocks of stage s of kind o as in the relaxation, d_c what an action of cell c
takes and e_k when the action of place k ends (planner.strategy.schedule.longest_path),

    minimise T
    cell c     d_c = its seconds by x
    place k    e_k >= e_(k's predecessor in its row) + what passes between + d of its cell
               e_k >= e_(what it needs) + message + d of its cell
    row r      T >= e_(its last place) + what is left of it + reduction
    pass       what blocks hold and what the pass back of a stage needs have room: of its hungriest block, and
               where it has two, while the gradients of the one behind are reduced. y_so says whether stage s
               holds a block of kind o, w_s whether it has two; both are whole, x_so >= y_so >= x_so / N and
               w_s >= (n_s - 1) / (N - 1)

and the limits of stages, ranks, classes and moments. That is all paths of the table at once, where a
relaxation that adds paths one at a time would solve a whole programme for each; and a stage's pass back needs
what its hungriest block does, not their mean.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.search.bounds.makespan_cuts import RelaxationRows
from planner.search.programme.ilp import quiet_stdout
from planner.search.programme.stages import Sizes
from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.table import KINDS

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats

DUAL, PRIMAL, SCALED = 1, 4, 2
"""HiGHS's strategies of the simplex and of scaling: its choice is 1 and 2."""


class Solution(NamedTuple):
    """What T is at least, 0 where that is not known; T of a solution, and its other variables (None: none was
    found)."""

    least: float
    value: float
    variables: Floats | None


class LinearProgramme:
    """Minimises T, the variable behind others that are none below 0, with HiGHS's simplex on one thread.

    `rows` [row, variable] begin with sums that lie between `low` and `high`.
    """

    def __init__(self, rows: Floats, low: Floats, high: Floats) -> None:
        import highspy
        import numpy as np

        self._whole = False
        with quiet_stdout():
            self._highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        options = (("output_flag", False), ("presolve", "off"), ("solver", "simplex"), ("threads", 1))
        for name, value in options:
            self._highs.setOptionValue(name, value)
        model, self.variables = highspy.HighsLp(), rows.shape[1]
        starts, columns, values = _sparse(rows)
        model.num_col_, model.num_row_ = self.variables + 1, len(rows)
        model.col_cost_ = np.append(np.zeros(self.variables), 1.0)
        model.col_lower_ = np.zeros(self.variables + 1)
        model.col_upper_ = np.full(self.variables + 1, highspy.kHighsInf)
        model.row_lower_, model.row_upper_ = low, high
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_ = np.append(starts, len(columns)), columns
        model.a_matrix_.value_ = values
        self._highs.passModel(model)

    def add(self, rows: Floats, high: Floats) -> None:
        """Adds rows [row, variable], T among the variables, that are at most `high`."""
        import highspy
        import numpy as np

        starts, columns, values = _sparse(rows)
        low = np.full(len(rows), -highspy.kHighsInf)
        self._highs.addRows(len(rows), low, high, len(columns), starts, columns, values)

    def make_whole(
        self, nodes: int, seconds: float | None, *, most: float = float("inf"), first: int | None = None
    ) -> None:
        """Asks for whole numbers from now on, of all variables or the first few, and for T of at most `most`;
        in so many branch-and-bound nodes each time, and so many seconds of all times (None: no limit)."""
        import highspy
        import numpy as np

        columns = np.arange(self.variables if first is None else first, dtype=np.int32)
        kinds = np.full(len(columns), highspy.HighsVarType.kInteger)
        self._highs.changeColsIntegrality(len(columns), columns, kinds)
        self._highs.changeColBounds(self.variables, 0.0, most)
        for name, value in (("presolve", "on"), ("solver", "choose"), ("mip_max_nodes", nodes)):
            self._highs.setOptionValue(name, value)
        if seconds is not None:
            self._highs.setOptionValue("time_limit", self._highs.getRunTime() + seconds)
        self._whole = True

    def solved(self) -> Solution | None:
        """The least T; None where no values keep all rows."""
        import highspy
        import numpy as np

        with quiet_stdout() if self._whole else nullcontext():
            self._highs.run()
        status = self._highs.getModelStatus()
        if status == highspy.HighsModelStatus.kUnknown and not self._whole:
            status = self._by_primal_simplex()
        info = self._highs.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Solution(max(0.0, info.mip_dual_bound) if self._whole else 0.0, 0.0, None)
        value = float(info.objective_function_value)
        known = status == highspy.HighsModelStatus.kOptimal
        least = float(info.mip_dual_bound) if self._whole else value if known else 0.0
        return Solution(max(0.0, least), value, np.asarray(self._highs.getSolution().col_value)[:-1])

    def _by_primal_simplex(self) -> Any:
        """The status from the beginning by the other simplex, where the dual one gave up: it does so where
        there is no solution, and rows differ much in size."""
        for name, value in (("simplex_strategy", PRIMAL), ("simplex_scale_strategy", 0)):
            self._highs.setOptionValue(name, value)
        self._highs.clearSolver()
        self._highs.run()
        status = self._highs.getModelStatus()
        for name, value in (("simplex_strategy", DUAL), ("simplex_scale_strategy", SCALED)):
            self._highs.setOptionValue(name, value)
        return status

    def prices(self, count: int) -> Floats:
        """What T would fall by if the last so many rows might be more by 1 [row], none whole."""
        import numpy as np

        duals: Floats = np.asarray(self._highs.getSolution().row_dual, dtype=np.float64)
        return np.maximum(-duals[-count:], 0.0)


def _sparse(rows: Floats) -> tuple[Any, Any, Floats]:
    """Where each row starts among its values that are not 0, their columns, and these."""
    import numpy as np

    number, column = rows.nonzero()
    starts = np.searchsorted(number, np.arange(len(rows)))
    return starts.astype(np.int32), column.astype(np.int32), rows[number, column]


MAX_PLACES = 160
"""Places of a table up to which their ends are variables."""
NODES = 1000
"""Nodes of branch and bound."""


class Timed(NamedTuple):
    """What no strategy of whole blocks beats, and the blocks of one that nearly reaches it as far as this
    programme sees [stage] (None: none was found)."""

    least_s: float
    blocks: Floats | None


def timed(relaxation: RelaxationRows, sizes: Sizes, seconds: float | None) -> Timed | None:
    """The optimum within sizes, or what is known of it after NODES or so many seconds; None where there is no
    strategy. The table has MAX_PLACES places at most."""
    programme = _Programme(relaxation, sizes)
    linear = LinearProgramme(*programme.equal())
    linear.add(*programme.limited())
    linear.make_whole(NODES, seconds, first=programme.first_pass)
    found = linear.solved()
    if found is None:
        return None
    least_s = found.least * programme.scale_s
    if found.variables is None:
        return Timed(least_s, None)
    blocks = found.variables[: programme.kinds].reshape(programme.stages, -1).sum(axis=1)
    return Timed(least_s, blocks.round())


class _Programme:
    """The rows of a programme; its variables are x, y, w, p, d and e one after the other, then T, in units of
    about a step."""

    def __init__(self, relaxation: RelaxationRows, sizes: Sizes) -> None:
        self.relaxation, self.sizes, self.space = relaxation, sizes, relaxation.space
        self.order, self.stages = action_order(relaxation.table), len(sizes.stages)
        block_s, fixed_s = relaxation.figures
        self.each = block_s.shape[2]
        self.kinds, self.cells = self.stages * self.each, self.stages * len(KINDS)
        self.first_kind, self.first_two = self.kinds, 2 * self.kinds
        self.first_pass = self.first_two + self.stages
        self.first_cell = self.first_pass + self.stages
        self.first_end = self.first_cell + self.cells
        self.total = self.first_end + len(self.order.needed)
        self.scale_s = float(relaxation.table.num_micro_batches * fixed_s.sum() + block_s.sum()) or 1.0
        self.block, self.fixed = block_s / self.scale_s, fixed_s / self.scale_s

    def equal(self) -> tuple[Floats, Floats, Floats]:
        """Rows without T, between limits: sums of blocks, and what cells take."""
        import numpy as np

        sums, low, high = self.relaxation.sums(self.sizes, None)
        rows = np.zeros((len(sums) + self.cells, self.total))
        rows[: len(sums), : self.kinds] = sums
        fixed = self.fixed[:, : len(KINDS)].ravel()
        for cell in range(self.cells):
            stage, kind = divmod(cell, len(KINDS))
            rows[len(sums) + cell, self._x(stage)] = -self.block[stage, kind]
            rows[len(sums) + cell, self.first_cell + cell] = 1.0
        return rows, np.append(low, fixed), np.append(high, fixed)

    def _x(self, stage: int) -> slice:
        return slice(stage * self.each, (stage + 1) * self.each)

    def limited(self) -> tuple[Floats, Floats]:
        """Rows that are at most something: of places, of rows' ends, of memory."""
        import numpy as np

        places, most = self._places()
        memory = self.relaxation.memory(self.sizes)
        ranks, moments = memory.shares.shape[:2]
        held = memory.rows([(rank, moment) for rank in range(ranks) for moment in range(moments)])
        held = np.pad(held, ((0, 0), (0, self.total + 1 - held.shape[1])))
        passing, free = self._passes()
        return np.concatenate([places, held, passing]), np.concatenate([most, np.ones(len(held)), free])

    def _places(self) -> tuple[Floats, Floats]:
        """What each place waits for, and T."""
        import numpy as np

        order, ends = self.order, len(self.order.needed)
        passing = np.zeros((ends + len(order.rows), self.cells))
        np.add.at(passing, (order.passing_into, order.passing_cells), 1.0)
        rows: list[Floats] = []
        high, last = list[float](), [-1] * len(order.rows)
        steps = zip(order.ranks.tolist(), order.needed.tolist(), order.cells.tolist(), strict=True)
        for place, (rank, needed, cell) in enumerate(steps):
            row = self._row(rows, high, 0.0)
            row[self.first_cell : self.first_end] = passing[place]
            if last[rank] < 0:
                high[-1] -= self._once(row, rank, len(KINDS))
            else:
                row[self.first_end + last[rank]] = 1.0
            if needed:
                row = self._row(rows, high, -self.relaxation.hop_s / self.scale_s)
                row[self.first_end + needed - 1] = 1.0
            for row in rows[-1 - (needed > 0) :]:
                row[self.first_cell + cell] += 1.0
                row[self.first_end + place] = -1.0
            last[rank] = place
        for rank, place in enumerate(last):
            row = self._row(rows, high, 0.0)
            row[self.first_cell : self.first_end] = passing[ends + rank]
            row[self.first_end + place], row[-1] = 1.0, -1.0
            high[-1] -= self._once(row, rank, len(KINDS) + 1)
        return np.stack(rows), np.asarray(high)

    def _once(self, row: Floats, rank: int, figure: int) -> float:
        """Adds what a rank gathers before or reduces after all passes by its blocks; and what it does
        besides."""
        for stage in self.space.stages_of[rank]:
            row[self._x(stage)] = self.block[stage, figure]
        return float(self.fixed[self.space.stages_of[rank], figure].sum())

    def _passes(self) -> tuple[Floats, Floats]:
        """Which kinds of blocks stages hold, whether they hold two, and what their passes back need."""
        import numpy as np

        rows: list[Floats] = []
        high: list[float] = []
        for stage, (_, most) in enumerate(self.sizes.stages):
            for kind in range(self.each):
                row = self._row(rows, high, 0.0)
                held, holds = stage * self.each + kind, self.first_kind + stage * self.each + kind
                row[held], row[holds] = 1.0, -most
                row = self._row(rows, high, 0.0)
                row[held], row[holds] = -1.0, 1.0
                self._row(rows, high, 1.0)[holds] = 1.0
            row = self._row(rows, high, 1.0)
            row[self._x(stage)], row[self.first_two + stage] = 1.0, 1.0 - most
        self._pass_rows(rows, high)
        return np.stack(rows), np.asarray(high)

    def _pass_rows(self, rows: list[Floats], high: list[float]) -> None:
        """What the pass back of each stage needs, and that it has room at every moment."""
        import numpy as np

        parts = self.relaxation.parts
        passes = parts.passes()
        if passes is None:
            return
        saved, unit = parts.by_kind("saved"), max(float(passes.free.max()), 1.0)
        for stage, rank in enumerate(self.space.rank_of):
            holds = self.first_kind + stage * self.each
            for own, more in enumerate(passes.more[rank]):
                for behind, reducing in enumerate(passes.behind[rank]):
                    row = self._row(rows, high, 0.0)
                    row[holds + own] = more / unit
                    row[self.first_two + stage] = reducing / unit
                    row[holds + np.nonzero(saved[rank] > saved[rank, behind])[0]] -= reducing / unit
                    row[self.first_pass + stage] = -1.0
        for rank, moment, place in np.argwhere(parts.moments.alive > 0).tolist():
            row = self._row(rows, high, float(passes.free[rank, moment]) / unit)
            for other, stage in enumerate(self.space.stages_of[rank]):
                row[self._x(stage)] = passes.held[rank, moment, other] / unit
            row[self.first_pass + self.space.stages_of[rank][place]] = 1.0

    def _row(self, rows: list[Floats], high: list[float], most: float) -> Floats:
        """A new row of zeros that is at most something."""
        import numpy as np

        rows.append(np.zeros(self.total + 1))
        high.append(most)
        return rows[-1]

"""A linear programme that grows: the least T of some variables under rows that are added as they matter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.search.quiet import quiet_stdout

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

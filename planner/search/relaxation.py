"""A shape's stages in fractions of blocks: a linear programme whose optimum no strategy beats.

Blocks being of one class, with x_so those of stage s with option o, n_s = sum over o of x_so, and every
figure no more than what a stage takes (planner.search.least_passes),

    minimise T
    path q     T >= sum over s, k of a_qsk t_sk(x) + hops_q h + gathering(first rank) + reduction(last rank)
    stage s    least_s <= n_s <= most_s
    rank r     least_r <= sum of n_s over its stages <= most_r,        sum of all n_s = L
    moment v   states, ends, what a pass needs, and what is in flight on the stages of its rank, <= limit

Blocks and what ranks may hold are whole elsewhere (planner.search.stage_space), which is why limits of ranks
belong here: where no rank may hold more than its equal part, all hold just that. Paths along rows
(planner.search.row_paths) are there from the beginning, those of them that matter. What is found then is
replayed, between it and the best found before, and the longest path becomes a row, a few times. The dual of
this programme is the game that planner.search.path_game plays, in fractions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.critical_path import CriticalPath, longest_path
from planner.cost.simulate import PathTimes
from planner.cost.table import KINDS
from planner.search.least_passes import option_passes
from planner.search.quiet import quiet_stdout
from planner.search.row_paths import row_paths
from planner.search.sizes import Sizes
from planner.strategy import Recompute, Zero

if TYPE_CHECKING:
    import numpy as np

    from planner.cost.stage import ShapeModel
    from planner.search.stage_space import StageSpace

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]

EXACT = 1e-6
"""Share of an optimum by which HiGHS, whose tolerance is less, may be off."""
BEHIND = 0.7
"""What is replayed lies so far from what is found towards the best replayed before: its path cuts deeper than
that of a corner."""
MIDDLE = 3
"""Layers of a model from which on one lies between the ends."""


class Relaxed(NamedTuple):
    """What no strategy beats within some limits, and blocks of each stage, in fractions, that nearly reach it
    (None: there are none)."""

    bound_s: float
    blocks: Floats | None


class _Rows(NamedTuple):
    """Sums that blocks make [row, stage x option], and what there is besides, each of some rank."""

    each: Floats
    fixed: Floats
    ranks: Ints

    def most(self, x: Floats, than: float) -> list[int]:
        """Of each rank the row that is most for some blocks, if it is more than a value."""
        import numpy as np

        sums = self.each @ x + self.fixed
        order = np.lexsort((-sums, self.ranks))
        order = order[np.diff(self.ranks[order], prepend=-1) > 0]
        return [number for number in order.tolist() if sums[number] > than]


class Relaxation:
    """The programme of one shape on ranks with cores of their own."""

    def __init__(self, space: StageSpace) -> None:
        import numpy as np

        self.space, self.table, self.hop_s = space, space.table, space.hop_s
        self.options = space.books[0].options
        known = {
            id(book): _figures(book.shape, self.options, book.least_passes.action) for book in space.books
        }
        each = [known[id(space.books[rank])] for rank in space.rank_of]
        self._block_s = np.stack([block_s for block_s, _ in each])  # [stage, figure, option]
        self._fixed_s = np.stack([fixed_s for _, fixed_s in each])  # [stage, figure]
        for stage, end in ((0, 0), (-1, -1)):
            least = space.books[space.rank_of[stage]].least_passes
            ends = least.stage_s(0, 1) if end == 0 else least.stage_s(space.layers - 1, space.layers)
            self._fixed_s[stage, : len(KINDS)] += ends - least.stage_s(1, 2)
        self._cuts: list[tuple[Floats, float]] = []
        self.paths = self._row_paths()

    def _row_paths(self) -> _Rows:
        """The seconds of the paths along rows."""
        import numpy as np

        paths, kinds = row_paths(self.space.degrees), len(KINDS)
        block_s = paths.seconds(self._block_s[:, :kinds])
        fixed_s = paths.seconds(self._fixed_s[:, :kinds, None]).sum(axis=(1, 2)) + paths.hops * self.hop_s
        rank_of, numbers = np.asarray(self.space.rank_of), np.arange(len(paths.last))
        for figure, ranks in ((kinds, np.zeros_like(numbers)), (kinds + 1, paths.last)):
            there = rank_of == ranks[:, None]
            block_s += there[:, :, None] * self._block_s[:, figure]
            fixed_s += there @ self._fixed_s[:, figure]
        return _Rows(block_s.reshape(len(numbers), -1), fixed_s, paths.ranks)

    def memory(self, sizes: Sizes) -> _Rows:
        """At each moment of every rank, what blocks hold over what they may."""
        import numpy as np

        space, options = self.space, len(self.options)
        known = {
            name: each.rows(sizes.stages) for name, each in {id(p): p for p in space.ranks.parts}.items()
        }
        rows, ranks = [np.zeros((0, space.degrees.stages * options))], [np.zeros(0, dtype=np.int64)]
        for rank, (stages, parts) in enumerate(zip(space.stages_of, space.ranks.parts, strict=True)):
            room = known[id(parts)]
            if room is None:
                continue
            held, free = (each[rank :: space.degrees.pp].reshape(-1, *each.shape[2:]) for each in room)
            row = np.zeros((len(free), space.degrees.stages, options))
            row[:, stages] = held / np.maximum(free, 1.0)[:, None, None]
            rows.append(row.reshape(len(free), -1))
            ranks.append(np.full(len(free), rank))
        found = np.concatenate(rows)
        return _Rows(found, np.zeros(len(found)), np.concatenate(ranks))

    def least(self, within_s: float, sizes: Sizes, rounds: int) -> Relaxed:
        """The optimum within sizes, or any bound of at least `within_s`, after so many replays at most."""
        import numpy as np

        programme = _Programme(self, sizes)
        for row in self._cuts:
            programme.add(*row)
        best_s, best, bound_s = float("inf"), None, 0.0
        for number in range(rounds + 1):
            found = programme.solved(within_s)
            if found is None:
                return Relaxed(float("inf"), None)
            bound_s = max(bound_s, found[0])
            if bound_s >= within_s or number == rounds:
                break
            x = found[1] if best is None else BEHIND * best + (1 - BEHIND) * found[1]
            path, ends_s = self._replayed(x)
            if ends_s < best_s:
                best_s, best = ends_s, x
            if best_s <= bound_s * (1 + 1e-3):
                break
            self._cuts.append(self._cut(path))
            programme.add(*self._cuts[-1])
        blocks = None if best is None else best.reshape(len(self._fixed_s), -1).sum(axis=1)
        return Relaxed(bound_s, None if blocks is None else np.asarray(blocks))

    def _replayed(self, x: Floats) -> tuple[CriticalPath, float]:
        """The longest path with these blocks, and its length."""
        import numpy as np

        space, kinds = self.space, len(KINDS)
        each = (self._block_s * x.reshape(len(self._fixed_s), 1, -1)).sum(axis=2) + self._fixed_s
        once = np.zeros((2, space.degrees.pp))
        np.add.at(once[0], space.rank_of, each[:, kinds])
        np.add.at(once[1], space.rank_of, each[:, kinds + 1])
        begin_s, reduce_s = once.tolist()
        cell_s = each[:, :kinds].ravel().tolist()
        durations = self.table.order.durations(cell_s)
        ends_s, row_ends_s = durations.ends_s(begin_s, self.hop_s)
        times = PathTimes(
            table=self.table,
            durations=durations,
            begin_s=tuple(begin_s),
            ends_s=ends_s,
            row_ends_s=row_ends_s,
            cell_s=cell_s,
        )
        length_s = max(end + reduce for end, reduce in zip(row_ends_s, reduce_s, strict=True))
        return longest_path(times, reduce_s, self.hop_s), length_s

    def _cut(self, path: CriticalPath) -> tuple[Floats, float]:
        """A path as seconds by block and besides."""
        import numpy as np

        counts = np.zeros(self._fixed_s.shape)
        counts[:, : len(KINDS)] = path.counts
        counts[self.space.stages_of[path.first_rank], len(KINDS)] = 1
        counts[self.space.stages_of[path.last_rank], len(KINDS) + 1] = 1
        block_s = (counts[:, :, None] * self._block_s).sum(axis=1).ravel()
        return block_s, float((counts * self._fixed_s).sum()) + path.hops * self.hop_s


class _Programme:
    """The programme within some sizes, as HiGHS has it: variables are x_so, then T."""

    def __init__(self, relaxation: Relaxation, sizes: Sizes) -> None:
        import highspy
        import numpy as np

        self.paths, self.memory = relaxation.paths, relaxation.memory(sizes)
        space, options = relaxation.space, len(relaxation.options)
        each = np.repeat(np.eye(len(sizes.stages)), options, axis=1)
        rank_of = np.asarray(space.rank_of)
        of_ranks = np.repeat(rank_of == np.arange(space.degrees.pp)[:, None], options, axis=1)
        rows = np.concatenate([each, of_ranks, np.ones((1, each.shape[1]))])
        limits = np.asarray([*sizes.stages, *sizes.ranks, (space.layers, space.layers)], dtype=np.float64)
        with quiet_stdout():
            self.highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        for name, value in (("output_flag", False), ("presolve", "off"), ("solver", "simplex")):
            self.highs.setOptionValue(name, value)
        self.highs.setOptionValue("threads", 1)
        self.highs.passModel(_model(rows, *limits.T))
        self.columns = each.shape[1]
        x = np.zeros((len(sizes.stages), options))
        x[:, 0] = limits[: len(x)].mean(axis=1)
        self._add_most(x.ravel(), -np.inf, -np.inf)

    def _add_most(self, x: Floats, than_s: float, full: float) -> bool:
        """Adds of each rank the longest path, and its fullest moment, for some blocks, where they are more
        than a time and a share of the memory; whether there are any."""
        longer, fuller = self.paths.most(x, than_s), self.memory.most(x, full)
        for number in longer:
            self.add(self.paths.each[number], float(self.paths.fixed[number]))
        for number in fuller:
            self._row(self.memory.each[number], 0.0, 1.0)
        return bool(longer or fuller)

    def add(self, block_s: Floats, fixed_s: float) -> None:
        """Adds a path as a row."""
        self._row(block_s, -1.0, -fixed_s)

    def _row(self, each: Floats, last: float, most: float) -> None:
        import highspy
        import numpy as np

        found = each.nonzero()[0]
        indices = np.append(found, self.columns).astype(np.int32)
        values = np.append(each[found], last)
        self.highs.addRow(-highspy.kHighsInf, most, len(indices), indices, values)

    def solved(self, enough_s: float) -> tuple[float, Floats] | None:
        """The optimum, a bound that is no more, and its blocks; None where there are none. Paths and moments
        are added that it breaks, while it is less than `enough_s`."""
        import highspy
        import numpy as np

        while True:
            self.highs.run()
            status = self.highs.getModelStatus()
            if status == highspy.HighsModelStatus.kInfeasible:
                return None
            values = np.asarray(self.highs.getSolution().col_value)
            if status != highspy.HighsModelStatus.kOptimal:
                return 0.0, values[:-1]
            optimum_s = float(self.highs.getInfo().objective_function_value)
            least_s = optimum_s * (1 - EXACT)
            if least_s >= enough_s or not self._add_most(values[:-1], optimum_s * (1 + EXACT), 1 + EXACT):
                return least_s, values[:-1]


def _model(rows: Floats, low: Floats, high: Floats) -> Any:
    """The programme of some rows, and a last variable that is to be least."""
    import highspy
    import numpy as np

    model, columns = highspy.HighsLp(), rows.shape[1] + 1
    number, column = rows.nonzero()
    model.num_col_, model.num_row_ = columns, len(rows)
    model.col_cost_ = np.append(np.zeros(columns - 1), 1.0)
    model.col_lower_, model.col_upper_ = np.zeros(columns), np.full(columns, highspy.kHighsInf)
    model.row_lower_, model.row_upper_ = low, high
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.searchsorted(number, np.arange(len(rows) + 1)).astype(np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = column.astype(np.int32), rows[number, column]
    return model


def _figures(shape: ShapeModel, options: tuple[Recompute, ...], action_s: Floats) -> tuple[Floats, Floats]:
    """What a stage takes at least for each of its blocks [figure, option] and besides [figure]: its actions
    by kind, its gathering, its reduction."""
    import numpy as np

    (key,) = shape.classes
    unit, zero = shape.block_units[key], shape.degrees.zero
    shown = shape.physics.dp_exposed if shape.overlaps else 1.0
    once = (
        shape.once_s(shape.updates[unit]) * (zero in (Zero.OPTIMIZER, Zero.GRADIENTS)),
        shape.once_s(shape.reduces[unit]) * (zero in (Zero.NONE, Zero.OPTIMIZER)),
    )
    passes = option_passes(shape, key, options).T
    block_s = np.concatenate([passes, [[shown * each] * len(options) for each in once]])
    return block_s, np.concatenate([action_s, [(1 - shown) * each for each in once]])

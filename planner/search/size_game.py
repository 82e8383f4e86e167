"""Whether some sizes of a shape's stages may keep a step time, whatever recomputes: a game of paths against
sizes, where blocks are of one class.

With every pass as short as can be, the length of a path through the table is linear in the blocks of the
stages, and so is a mixture of paths. Its least over all sizes, which takes blocks where they weigh least,
bounds every replay. Those sizes are replayed, and their longest path joins the mixture (as in
planner.search.path_game, without memory and recipes), until sizes are in time or none can be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planner.cost.critical_path import CriticalPath, longest_path
from planner.cost.simulate import PathTimes
from planner.search.sizes import Limits

if TYPE_CHECKING:
    import numpy as np

    from planner.search.stage_space import StageSpace

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]

ROUNDS = 3
"""Mixtures of paths that are tried: most shapes that any rules out are by the first of them."""
MIDDLE = 3
"""Layers of a model from which on one lies between the ends."""


class SizeGame:
    """The game of one shape on ranks with cores of their own."""

    def __init__(self, space: StageSpace) -> None:
        import numpy as np

        self.space, self.table, self.hop_s = space, space.table, space.shape.messages.p2p_s()
        each = [space.books[rank].least_passes for rank in space.rank_of]
        blocks = self._block_s = np.stack([own.sums[:, 2] - own.sums[:, 1] for own in each])
        fixed = self._fixed_s = np.stack([own.action for own in each])
        fixed[0] += each[0].sums[:, 1] - blocks[0]
        fixed[-1] += each[-1].sums[:, -1] - each[-1].sums[:, -2] - blocks[-1]

    def may_keep(self, limits: Limits, within_s: float) -> bool:
        """Whether sizes of stages within limits may have all passes done in a time."""
        import numpy as np

        low, high = (np.asarray(each) for each in zip(*limits, strict=True))
        sizes = np.clip([end - first for first, end in pairwise(self.space.even)], low, high)
        weights, fixed_s = np.zeros(len(sizes)), 0.0
        for number in range(ROUNDS):
            path, ends_s = self._replayed(sizes)
            if ends_s < within_s and sizes.sum() == self.space.layers:
                return True
            share = 2 / (number + 2)
            weights += share * ((path.counts * self._block_s).sum(axis=1) - weights)
            own_s = float((path.counts * self._fixed_s).sum()) + path.hops * self.hop_s
            fixed_s += share * (own_s - fixed_s)
            sizes = self._lightest(weights, low, high)
            if fixed_s + float(weights @ sizes) >= within_s:
                return False
        return True

    def _lightest(self, weights: Floats, low: Ints, high: Ints) -> Ints:
        """Sizes that hold all blocks where they weigh least."""
        import numpy as np

        order = np.argsort(weights, kind="stable")
        room = (high - low)[order]
        left = self.space.layers - int(low.sum())
        more = np.clip(left - (np.cumsum(room) - room), 0, room)
        sizes = low.copy()
        sizes[order] += more
        return sizes

    def _replayed(self, sizes: Ints) -> tuple[CriticalPath, float]:
        """The longest path with these sizes, and its length."""
        ranks = len(self.table)
        cell_s = (self._block_s * sizes[:, None] + self._fixed_s).ravel().tolist()
        durations, nothing = self.table.order.durations(cell_s), (0.0,) * ranks
        ends_s, row_ends_s = durations.ends_s(nothing, self.hop_s)
        times = PathTimes(
            table=self.table,
            durations=durations,
            begin_s=nothing,
            ends_s=ends_s,
            row_ends_s=row_ends_s,
            cell_s=cell_s,
        )
        return longest_path(times, nothing, self.hop_s), max(row_ends_s)

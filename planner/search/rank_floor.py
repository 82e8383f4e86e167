"""What a rank that holds N blocks in several stages takes at least for a micro-batch, given its memory.

Of the blocks, F recompute all and Q the element-wise rest. Let a_s be the micro-batches alive on stage s at
one moment of the schedule, s_o the bytes that a block with option o keeps of each. However the blocks lie,

    sum over blocks of a s  >=  the N least a in ascending order times the bytes in descending order

(rearrangement inequality), a stage having as many places as it may hold blocks. So F and Q are possible only
where states, ends, the least transient and this sum fit, and the rank takes no less than the fastest possible
pair. Unlike a mixture of recipes, which a linear relaxation may take, F and Q are whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from planner.cost.moments import pass_bytes
from planner.search.bounds import split_again_s
from planner.search.recipes import Column, RecipeBook
from planner.stack import Engine
from planner.strategy import Recompute, RecomputeCounts, Schedule, Stage

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

MOMENTS = 4
"""Moments of a rank's row that are looked at, those with most alive first."""


class RankFloor:
    """The floors of one shape's ranks. Holds where all blocks are of one class."""

    def __init__(self, book: RecipeBook, limit_bytes: float, schedule: Schedule) -> None:
        self.book, self.shape, self.limit_bytes = book, book.shape, limit_bytes
        (self.key,) = self.shape.classes
        each = {option: self.shape.passes(self.key, option) for option in book.options}
        self.block_s = {
            option: forward.total_s + backward.total_s + split_again_s(schedule, backward)
            for option, (forward, backward) in each.items()
        }
        self.saved = {option: self.shape.block(self.key, option).saved_bytes for option in book.options}
        # In Torchtitan's moments not all gradients exist, so that what is transient may be below 0.
        self.bounded = self.shape.problem.stack.engine is not Engine.TORCHTITAN

    def least_s(
        self, blocks: int, places: Sequence[tuple[int, int, bool, bool]], moments: Sequence[Sequence[int]]
    ) -> float:
        """Seconds that `blocks` blocks take at least; infinite where they cannot fit.

        `places` are the rank's stages: least and most blocks, whether the model starts and ends there;
        `moments` the micro-batches alive on each of them, at several moments.
        """
        if not self.bounded:
            return blocks * min(self.block_s.values())
        return max(self._least_s(blocks, places, alive) for alive in list(moments)[:MOMENTS])

    def _least_s(
        self, blocks: int, places: Sequence[tuple[int, int, bool, bool]], alive: Sequence[int]
    ) -> float:
        weights = sorted(a for a, (_, most, _, _) in zip(alive, places, strict=True) for _ in range(most))
        if len(weights) < blocks:
            return float("inf")
        full, selective, seconds = self._pairs(blocks)
        free = self.limit_bytes - self._standing_bytes(blocks, places, alive)
        fits = self._kept_bytes(blocks, full, selective, weights) <= free
        return float(seconds[fits].min()) if fits.any() else float("inf")

    def fastest_mixes(
        self, sizes: Sequence[int], alive: Sequence[int], free_bytes: float, most: int
    ) -> Iterator[list[RecomputeCounts]]:
        """Mixes of a rank's stages of `sizes` blocks that keep at most `free_bytes`, the fastest `most`.

        Blocks that keep least lie where most micro-batches are alive.
        """
        import numpy as np

        blocks = sum(sizes)
        places = sorted(
            (a, s) for s, (size, a) in enumerate(zip(sizes, alive, strict=True)) for _ in range(size)
        )
        full, selective, seconds = self._pairs(blocks)
        used = self._kept_bytes(blocks, full, selective, [a for a, _ in places])
        order = np.lexsort((used, seconds))
        order = order[used[order] <= free_bytes]
        keeping = sorted(self.saved, key=lambda option: -self.saved[option])
        for number in order[:most].tolist():
            counts = self._counts(blocks, int(full[number]), int(selective[number]))
            options = [option for option in keeping for _ in range(int(counts[option]))]
            dealt = [[0, 0, 0] for _ in sizes]
            for (_, stage), option in zip(places, options, strict=True):
                dealt[stage][list(Recompute).index(option)] += 1
            yield [RecomputeCounts(none=n, selective=s, full=f) for n, s, f in dealt]

    @staticmethod
    def _counts(blocks: int, full: Any, selective: Any) -> dict[Recompute, Any]:
        return {
            Recompute.NONE: blocks - full - selective,
            Recompute.SELECTIVE: selective,
            Recompute.FULL: full,
        }

    def _kept_bytes(self, blocks: int, full: Ints, selective: Ints, weights: Sequence[int]) -> Floats:
        """What blocks keep at least, the places having `weights` micro-batches alive, ascending."""
        import numpy as np

        before = np.concatenate([[0.0], np.cumsum(weights[:blocks])])
        counts = self._counts(blocks, full, selective)
        at, used = np.zeros_like(full), np.zeros(len(full))
        for option in sorted(self.saved, key=lambda o: -self.saved[o]):
            used += self.saved[option] * (before[at + counts[option]] - before[at])
            at = at + counts[option]
        return used

    def _pairs(self, blocks: int) -> tuple[Ints, Ints, Floats]:
        import numpy as np

        full, selective = (each.ravel() for each in np.indices((blocks + 1, blocks + 1)))
        legal = full + selective <= blocks
        for option, count in (
            (Recompute.FULL, full),
            (Recompute.SELECTIVE, selective),
            (Recompute.NONE, blocks - full - selective),
        ):
            if option not in self.block_s:
                legal &= count == 0
        full, selective = full[legal], selective[legal]
        none = blocks - full - selective
        spent = self.block_s.get
        seconds: Floats = (
            none * spent(Recompute.NONE, 0.0)
            + selective * spent(Recompute.SELECTIVE, 0.0)
            + full * spent(Recompute.FULL, 0.0)
        )
        return full, selective, seconds

    def _standing_bytes(
        self, blocks: int, places: Sequence[tuple[int, int, bool, bool]], alive: Sequence[int]
    ) -> float:
        """States of the rank's blocks and ends, what the ends keep, the least transient."""
        one, two = (self.book.column(_of(size), 1) for size in (1, 2))
        block_bytes = two.resident_bytes - one.resident_bytes
        total = blocks * block_bytes
        least_transient = 0.0
        for count, (_, _, first, last) in zip(alive, places, strict=True):
            option = min(self.saved, key=lambda o: self.saved[o])
            each = [self._alone(first, last, option, count) for option in self.saved]
            total += each[0].resident_bytes - block_bytes
            total += count * (self._alone(first, last, option, count).cost.saved_bytes - self.saved[option])
            passing = min(pass_bytes(self.shape, column.cost) for column in each)
            least_transient = max(least_transient, passing)
        return total + least_transient

    def _alone(self, first: bool, last: bool, option: Recompute, alive: int) -> Column:
        layers = self.book.layers
        start = 0 if first else layers - 1 if last else 1
        counts = RecomputeCounts(
            none=int(option is Recompute.NONE),
            selective=int(option is Recompute.SELECTIVE),
            full=int(option is Recompute.FULL),
        )
        return self.book.column(Stage(first=start, end=start + 1, recompute=counts), alive)


def _of(size: int) -> Stage:
    return Stage(first=1, end=1 + size, recompute=RecomputeCounts(none=size))

"""How many blocks each stage may hold for a shape to beat a step time, and all ways to deal them.

With t(n) the least passes of a stage of n blocks, W those of the whole model, p ranks and m micro-batches, a
step takes at least

    1F1B, m > p    2 W + (m - p - 1) t(n) + 2 (p - 1) h        for every stage (*)
    all            m t(r)                                      for every rank r

besides what its rank gathers before, reduces after and updates at least (planner.search.programme.stages), so
stages that are too large are left out, and those that would leave too much to the others. (*) With i the
stage that takes longest, the path with both detours (planner.strategy.schedule.makespan_paths) has
2 W - sum_{j<i} t_j + (m - w_i - 2) t_i, of which the sum is at most i t_i; any other stage takes no longer.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

from planner.search.bounds.feasible_spans import Cuts
from planner.search.bounds.rank_bounds import RankWays
from planner.search.bounds.relaxation import Relaxation
from planner.search.programme.stages import Limits, Sizes, StageSpace, narrowed
from planner.strategy.strategy import Schedule

DUST = 1e-9


class PartitionBounds:
    def __init__(self, space: StageSpace) -> None:
        self.space = space
        self._known_sizes: dict[float, Sizes | None] = {}

    def tight(self, sizes: Sizes) -> bool:
        """Whether memory makes some rank recompute, whatever it holds within sizes."""
        least_s = self.ranks.parts_s(max(low for low, _ in sizes.ranks))
        held = zip(least_s, sizes.ranks, self.space.block_s, self.space.held_s, strict=True)
        return any(
            own[low] > (low * block_s + held_s) * (1 + DUST) for own, (low, _), block_s, held_s in held
        )

    def sizes(self, to_beat_s: float) -> Sizes | None:
        """Blocks that stages and ranks may hold where a step is shorter; None where no cut is."""
        if to_beat_s not in self._known_sizes:
            self._known_sizes[to_beat_s] = self._sizes_within(to_beat_s)
        return self._known_sizes[to_beat_s]

    def _sizes_within(self, to_beat_s: float) -> Sizes | None:
        limits, m, p = self.space.size_limits, self.space.degrees.num_micro_batches, self.space.degrees.pp
        if self.space.model.sharing is not None or to_beat_s == float("inf"):
            by_stage = narrowed(limits, self.space.layers)
            return (
                None
                if by_stage is None
                else Sizes(by_stage, ((self.space.degrees.chunks, self.space.layers),) * p)
            )
        left_s = self.space.within_s(to_beat_s)
        within_s = left_s / m
        if self._even_bound:
            within_s = min(within_s, (left_s - self._twice_s) / (m - p - 1))
        least = [sum(limits[s][0] for s in stages) for stages in self.space.stages_of]
        highest = (sum(limits[s][1] for s in stages) for stages in self.space.stages_of)
        each = zip(highest, self.space.held_s, self.space.block_s, strict=True)
        most = [min(high, int(max(0.0, within_s - held) / block + DUST)) for high, held, block in each]
        by_rank = narrowed(list(zip(least, most, strict=True)), self.space.layers)
        several = self.space.degrees.chunks > 1
        if by_rank and several and not self.ranks.can_hold(by_rank, left_s):
            return None
        by_rank = by_rank and self._in_parts(by_rank, left_s)
        sizes = None if by_rank is None else self._sizes(by_rank)
        if sizes is None or self.relaxation.within(to_beat_s, sizes, 0).bound_s >= to_beat_s:
            return None
        by_rank = self._with_memory(sizes.ranks, self.ranks.done, left_s)
        return None if by_rank is None else self._sizes(by_rank)

    def _sizes(self, by_rank: Limits) -> Sizes | None:
        """What stages may hold whose ranks hold no more than some limits; None where there is no way."""
        least = [sum(self.space.size_limits[s][0] for s in stages) for stages in self.space.stages_of]
        each = zip(self.space.size_limits, self.space.rank_of, strict=True)
        limits = [(low, min(high, by_rank[rank][1] - least[rank] + low)) for (low, high), rank in each]
        by_stage = narrowed(limits, self.space.layers)
        return None if by_stage is None else Sizes(by_stage, by_rank)

    def _with_memory(
        self, by_rank: Limits, done: Callable[[int, int, float], bool], left_s: float
    ) -> Limits | None:
        """The limits of ranks, less the blocks with which a rank is not `done` with a micro-batch in time.

        More blocks take a rank no less: where those that the others leave to it take too long, all do.
        """
        result = []
        spare = sum(most for _, most in by_rank) - self.space.layers
        for rank, (least, most) in enumerate(by_rank):

            def late(blocks: int, rank: int = rank, own_s: float = self._own_s(rank, left_s)) -> bool:
                return not done(rank, blocks, own_s)

            low = max(least, most - spare)
            if late(most):
                if most == low or late(low):
                    return None
                held = low + bisect.bisect_left(range(low + 1, most), True, key=late)
                spare, most = spare - (most - held), held
            result.append((least, most))
        return narrowed(result, self.space.layers)

    def _in_parts(self, by_rank: Limits, left_s: float) -> Limits | None:
        """The limits of ranks, less the blocks that take one too long if they may recompute in parts."""
        import numpy as np

        seconds = self.ranks.parts_s(max(most for _, most in by_rank))
        late = seconds >= np.asarray([[self._own_s(rank, left_s)] for rank in range(len(by_rank))])
        found = []
        for (least, most), own in zip(by_rank, late, strict=True):
            behind = own[least : most + 1]
            found.append((least, least + int(behind.argmax()) - 1 if behind.any() else most))
        return narrowed(found, self.space.layers)

    def _own_s(self, rank: int, left_s: float) -> float:
        """What a rank may take for each micro-batch, if passes have a time."""
        m, p = self.space.degrees.num_micro_batches, self.space.degrees.pp
        own_s = (left_s - self._entered_s[rank]) / m
        return min(own_s, (left_s - self._twice_s) / (m - p - 1)) if self._even_bound else own_s

    @property
    def _even_bound(self) -> bool:
        """Whether the bound of 1F1B with more micro-batches than ranks holds."""
        degrees = self.space.degrees
        return degrees.schedule is Schedule.ONE_F_ONE_B and degrees.num_micro_batches > degrees.pp + 1

    @cached_property
    def _twice_s(self) -> float:
        """Twice the least passes of the whole model, and the messages on the way."""
        books = {id(book): book for book in self.space.books}.values()
        blocks_s = sum(
            count * min(book.least_block_s(key) for book in books)
            for key, count in Counter(self.space.shape.layer_model.keys).items()
        )
        whole_s = blocks_s + sum(self.space.held_s)
        return 2 * whole_s + 2 * (self.space.degrees.pp - 1) * self.space.hop_s

    @cached_property
    def _entered_s(self) -> list[float]:
        """What the ranks before each take at least before its first forward, and after its last backward."""
        known = {id(book): self.space.enter_s(book) for book in self.space.books}
        low = [self.space.size_limits[rank][0] for rank in range(self.space.degrees.pp)]
        each = [
            fixed + n * block
            for (fixed, block), n in zip((known[id(b)] for b in self.space.books), low, strict=True)
        ]
        return list(accumulate(each[:-1], initial=0.0))

    @cached_property
    def relaxation(self) -> Relaxation:
        """Its stages in fractions of blocks."""
        return Relaxation(self.space, self.ranks.parts)

    @cached_property
    def ranks(self) -> RankWays:
        """What ranks take at least with the blocks that they may hold."""
        return RankWays(self.space)

    @cached_property
    def cuts(self) -> Cuts:
        """The cuts near the even one, each stage having one rank and its recipe."""
        return Cuts(self.space, self.ranks.parts)

"""What a rank that holds N blocks in several stages takes at least for a micro-batch, given its memory.

Of the blocks, F recompute all and Q the element-wise rest. Let a_s be the micro-batches alive on stage s at
one moment of the schedule, s_o the bytes that a block with option o keeps of each. However the blocks lie,

    sum over blocks of a s  >=  the N least a in ascending order times the bytes in descending order

(rearrangement inequality), where the rank's first stage has a given number of blocks and the others as many
places as they may hold. So F and Q are possible only where states, ends, what a pass needs and this sum fit,
and the rank takes no less than the fastest possible pair, with what a pass that recomputes anything takes
besides, on as few stages as hold F + Q blocks. Unlike a mixture of recipes, which a linear relaxation may
take, F and Q are whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from planner.cost.moments import least_pass_bytes, stage_pass_bytes
from planner.search.bounds import split_again_s
from planner.search.recipes import Column, RecipeBook
from planner.stack import Engine
from planner.strategy import Degrees, Offload, Recompute, RecomputeCounts, Stage

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

MOMENTS = 3
"""Moments of a rank's row that are looked at, those with most alive first."""
DUST = 1e-9
"""Share of the memory by which sums of floats may be off."""

_Signature = tuple[tuple[tuple[bool, bool], ...], tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Of a rank's stages: whether the model starts and ends there, the most blocks, the micro-batches alive."""


class RankFloor:
    """The floors of one shape's ranks. Holds where all blocks are of one class.

    `split` is the least share of a stage's backward passes that are split.
    """

    def __init__(
        self,
        book: RecipeBook,
        limit_bytes: float,
        degrees: Degrees,
        in_flight: Sequence[Sequence[dict[int, int]]],
        limits: Sequence[tuple[int, int]],
        split: float,
    ) -> None:
        self.book, self.shape, self.limit_bytes = book, book.shape, limit_bytes
        self.in_flight, self.limits = in_flight, limits
        self.stages: list[list[int]] = [[] for _ in range(degrees.pp)]
        for stage in range(degrees.stages):
            self.stages[degrees.pp_rank_of_stage(stage)].append(stage)
        self.last = degrees.stages - 1
        (self.key,) = self.shape.classes
        each = {option: self.shape.passes(self.key, option) for option in book.options}
        self.block_s = {
            option: forward.total_s + backward.total_s + split * split_again_s(self.shape, self.key, option)
            for option, (forward, backward) in each.items()
        }
        self.saved = {option: self.shape.block(self.key, option).saved_bytes for option in book.options}
        self._keeping = sorted(self.saved, key=lambda option: -self.saved[option])
        one, two = (book.column(_of(size)) for size in (1, 2))
        self._block_bytes = two.resident_bytes - one.resident_bytes
        # In Torchtitan's moments not all gradients exist, so that what is transient may be below 0; nor in
        # the own runtime's where a step has one micro-batch.
        engine = self.shape.problem.stack.engine
        apart = engine is Engine.TORCHTITAN or (engine is Engine.NATIVE and degrees.num_micro_batches == 1)
        self.bounded = not apart and book.offload is Offload.NONE
        self._pass_bytes = {option: least_pass_bytes(self.shape, [option]) for option in book.options}
        pair = least_pass_bytes(self.shape, book.options, behind=True)
        self._behind_bytes = pair - min(self._pass_bytes.values())
        self._alike: dict[int, _Signature] = {}
        self._known: dict[tuple[_Signature, int, range], dict[int, float]] = {}
        self._known_parts: dict[tuple[_Signature, int], float] = {}
        self._fastest_s = min(self.block_s.values())
        self._fastest_bytes = min(
            self.saved[o] for o, own_s in self.block_s.items() if own_s == self._fastest_s
        )
        slower = {o: own_s - self._fastest_s for o, own_s in self.block_s.items() if own_s > self._fastest_s}
        each_freed = [(self._fastest_bytes - self.saved[o]) / more_s for o, more_s in slower.items()]
        self._freed_a_second = max([0.0, *each_freed])
        self._known_ends: dict[tuple[bool, bool], tuple[float, float, float]] = {}
        self._known_pairs: dict[int, tuple[Ints, Ints, Floats]] = {}

    def least_by_first_s(self, rank: int, blocks: int, firsts: range) -> dict[int, float]:
        """Seconds that `blocks` blocks on a rank take at least for a micro-batch, by how many of them, among
        `firsts`, its first stage holds; without those that cannot fit."""
        if rank not in self._alike:
            self._alike[rank] = self._signature(rank)
        key = self._alike[rank], blocks, firsts
        if key not in self._known:
            self._known[key] = self._least_by_first_s(*key)
        return self._known[key]

    def part_s(self, rank: int, blocks: int) -> float:
        """What `blocks` blocks on a rank take at least for a micro-batch, found at once: blocks may recompute
        in parts, and lie where fewest micro-batches are alive. Infinite where they cannot fit."""
        if rank not in self._alike:
            self._alike[rank] = self._signature(rank)
        key = self._alike[rank], blocks
        if key not in self._known_parts:
            self._known_parts[key] = self._part_s(*key)
        return self._known_parts[key]

    def _part_s(self, signature: _Signature, blocks: int) -> float:
        """At each moment, what does not fit is freed by recomputing where most micro-batches are alive.

        A block takes t seconds and keeps s bytes at its fastest; no option frees more bytes a second than
        `_freed_a_second`, and none keeps less than the least.
        """
        ends, most, vectors = signature
        seconds = blocks * self._fastest_s
        if not self.bounded:
            return seconds
        longest_s, least = seconds, min(self.saved.values())
        for alive in vectors:
            standing, forward, freed = self._standing_bytes(alive, ends)
            passing = max(min(self._pass_bytes.values()) - freed, forward)
            free = self.limit_bytes - standing - blocks * self._block_bytes - passing
            lives = _emptiest(alive, most, blocks)
            over = self._fastest_bytes * sum(lives) - free
            again_s = self.shape.physics.recompute_pass_s if over > 0 else 0.0
            for live in reversed(lives):
                if over <= 0:
                    break
                part = min(over, live * (self._fastest_bytes - least))
                again_s += part / (live * self._freed_a_second) if part else 0.0
                over -= part
            if over > DUST * self.limit_bytes:
                return float("inf")
            longest_s = max(longest_s, seconds + again_s)
        return longest_s

    def _signature(self, rank: int) -> _Signature:
        """What a rank's floors depend on: which ends it holds, its places, and its fullest moments."""
        stages = self.stages[rank]
        fullest = sorted(self.in_flight[rank], key=lambda v: -sum(v.values()))[:MOMENTS]
        return (
            tuple((s == 0, s == self.last) for s in stages),
            tuple(self.limits[s][1] for s in stages),
            tuple(tuple(vector.get(s, 0) for s in stages) for vector in fullest),
        )

    def _least_by_first_s(self, signature: _Signature, blocks: int, firsts: range) -> dict[int, float]:
        import numpy as np

        ends, (most, *others), vectors = signature
        if not self.bounded:
            return dict.fromkeys(firsts, blocks * min(self.block_s.values()))
        full, selective, seconds = self._pairs(blocks)
        recomputing = np.ceil((full + selective) / max(most, *others))
        seconds = seconds + self.shape.physics.recompute_pass_s * recomputing
        fits = np.repeat(seconds[None] < float("inf"), len(firsts), axis=0)
        for alive in vectors:
            standing, forward, freed = self._standing_bytes(alive, ends)
            free = self.limit_bytes - standing - blocks * self._block_bytes
            places = sorted(a for a, high in zip(alive[1:], others, strict=True) for _ in range(high))
            single = sum(1 if a else high for a, high in zip(alive[1:], others, strict=True))
            for row, first in enumerate(firsts):
                before = np.cumsum([0, *sorted([alive[0]] * first + places[: blocks - first])])
                behind = (first > 1 and alive[0] > 0) or blocks - first > single
                back = self._back_bytes(full, selective, alive) + self._behind_bytes * behind - freed
                kept = self._kept_bytes(blocks, full, selective, before)
                fits[row] &= kept + np.maximum(back, forward) <= free
        found = ((first, seconds[fits[row]]) for row, first in enumerate(firsts))
        return {first: float(each.min()) for first, each in found if len(each)}

    def _back_bytes(self, full: Ints, selective: Ints, alive: Sequence[int]) -> Floats:
        """What the backward pass of some block needs: of one that recomputes, where all stages run."""
        import numpy as np

        least = min(self._pass_bytes.values())
        counts = {Recompute.FULL: full, Recompute.SELECTIVE: selective}
        each = [
            (size - least) * (counts[option] > 0)
            for option, size in self._pass_bytes.items()
            if option in counts and all(alive)
        ]
        back: Floats = least + np.max([np.zeros(len(full)), *each], axis=0)
        return back

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
        before = np.concatenate([[0.0], np.cumsum([a for a, _ in places])])
        used = self._kept_bytes(blocks, full, selective, before)
        order = np.lexsort((used, seconds))
        order = order[used[order] <= free_bytes]
        for number in order[:most].tolist():
            counts = self._counts(blocks, int(full[number]), int(selective[number]))
            options = [option for option in self._keeping for _ in range(int(counts[option]))]
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

    def _kept_bytes(self, blocks: int, full: Ints, selective: Ints, before: Floats) -> Floats:
        """What blocks keep at least; before[n] micro-batches are alive on the n emptiest places together."""
        import numpy as np

        counts = self._counts(blocks, full, selective)
        at, used = np.zeros_like(full), np.zeros(len(full))
        for option in self._keeping:
            used += self.saved[option] * (before[at + counts[option]] - before[at])
            at = at + counts[option]
        return used

    def _pairs(self, blocks: int) -> tuple[Ints, Ints, Floats]:
        if blocks not in self._known_pairs:
            self._known_pairs[blocks] = self._all_pairs(blocks)
        return self._known_pairs[blocks]

    def _all_pairs(self, blocks: int) -> tuple[Ints, Ints, Floats]:
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
        self, alive: Sequence[int], ends: Sequence[tuple[bool, bool]]
    ) -> tuple[float, float, float]:
        """What a rank holds besides its blocks' states and activations: runtime and ends; what a forward pass
        needs; and of what the ends keep, the most that is freed before blocks run back."""
        total, forward, freed = float(self.shape.runtime_bytes), 0.0, 0.0
        for count, end in zip(alive, ends, strict=True):
            if end not in self._known_ends:
                self._known_ends[end] = self._end_bytes(*end)
            resident, saved, passing = self._known_ends[end]
            total += resident + count * saved
            if count:
                forward, freed = max(forward, passing), max(freed, saved)
        return total, forward, freed

    def _end_bytes(self, first: bool, last: bool) -> tuple[float, float, float]:
        """Of the ends that a stage holds: states, what is kept of a micro-batch, what a pass needs."""
        each = {option: self._alone(first, last, option) for option in self.saved}
        option = self._keeping[-1]
        return (
            each[option].resident_bytes - self._block_bytes,
            each[option].cost.saved_bytes - self.saved[option],
            min(stage_pass_bytes(self.shape, column.cost) for column in each.values()),
        )

    def _alone(self, first: bool, last: bool, option: Recompute) -> Column:
        layers = self.book.layers
        start = 0 if first else layers - 1 if last else 1
        counts = RecomputeCounts(
            none=int(option is Recompute.NONE),
            selective=int(option is Recompute.SELECTIVE),
            full=int(option is Recompute.FULL),
        )
        return self.book.column(Stage(first=start, end=start + 1, recompute=counts))


def _emptiest(alive: Sequence[int], most: Sequence[int], blocks: int) -> list[int]:
    """The micro-batches alive where `blocks` blocks lie at least, in ascending order."""
    lives: list[int] = []
    for live, places in sorted(zip(alive, most, strict=True)):
        lives += [live] * min(places, blocks - len(lives))
    return lives


def _of(size: int) -> Stage:
    return Stage(first=1, end=1 + size, recompute=RecomputeCounts(none=size))

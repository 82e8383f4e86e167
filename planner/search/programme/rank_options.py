"""The least seconds of a pipeline rank that holds several stages, over all mixes of recomputation that fit.

Every mix of one stage is set beside every mix of the others: at each moment of the schedule

    runtime + sum over stages s of (states_s + kept_s) + the largest transient <= limit

with what micro-batches in flight on each keep (planner.strategy.schedule.table), and transients of
stages that have some.
Where blocks are of one class this is exact for given sizes.

What a rank that holds N blocks in several stages takes at least for a micro-batch, given its memory.

Of the blocks, F recompute all and Q the element-wise rest. Let a_s be the micro-batches alive on stage s at
one moment of the schedule, s_o the bytes that a block with option o keeps of each. However the blocks lie,

    sum over blocks of a s  >=  the N least a in ascending order times the bytes in descending order

(rearrangement inequality), where the rank's first stage has a given number of blocks and the others as many
places as they may hold; likewise for what waits for its weight gradients. So F and Q are possible only where
states, ends, what a pass needs and these sums fit, and the rank takes no less than the fastest possible pair,
with what a pass that recomputes anything takes besides, on as few stages as hold F + Q blocks. Unlike a
mixture of recipes, which a linear relaxation may take, F and Q are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.replay import kind_passes
from planner.cost.stage.memory_timeline import StageMemory, idle_apart
from planner.model.sublayer import Recompute
from planner.search.programme.stage_options import Column, RecipeBook
from planner.strategy.schedule.table import KINDS, ActionKind, Flights, InFlight, total_count
from planner.strategy.strategy import Degrees, Offload, RecomputeCounts

if TYPE_CHECKING:
    import numpy as np

    from planner.foundation.arrays import Floats, Ints


MOST_MIXES = 60_000
"""Mixes of all stages of a rank together beyond which it is left to planner.search.programme.rank_options."""

UNSHARD, REDUCE, OPTIMIZER = (len(KINDS) + number for number in range(3))
FIGURES = len(KINDS) + 3
"""What a recipe is known by: seconds of its passes by kind, of gathering, reduction and optimizer."""

Span = tuple[int, int]


class Held(NamedTuple):
    """A stage of a rank: the blocks [first, end) that stand for it, how often it runs each kind of action,
    and what is in flight at each of the rank's moments."""

    span: Span
    actions: tuple[tuple[ActionKind, int], ...]
    flights: tuple[InFlight, ...]


def _outer(join: np.ufunc, each: Sequence[Floats]) -> Floats:
    """Every entry of an array joined with every one of the others, an axis for each array."""
    found = each[0]
    for other in each[1:]:
        found = join.outer(found, other)
    return found


def undominated(figures: Floats) -> Ints:
    """Rows of an array, least sum first, but those that are no less than one before them in every column."""
    import numpy as np

    left = np.argsort(figures.sum(axis=1), kind="stable")
    kept: list[int] = []
    while len(left):
        kept.append(int(left[0]))
        left = left[~(figures[left] >= figures[left[0]]).all(axis=1)]
    return np.asarray(kept, dtype=np.int64)


class RankMixes:
    """The ranks of one shape on one kind of device."""

    def __init__(self, book: RecipeBook, limit_bytes: float) -> None:
        self.book, self.limit_bytes = book, limit_bytes
        self.apart = idle_apart(book.shape)
        self._known: dict[tuple[Held, ...], tuple[float, tuple[int, ...]]] = {}
        self._seconds: dict[tuple[Span, tuple[tuple[ActionKind, int], ...]], Floats] = {}
        self._memories: dict[Span, StageMemory] = {}
        self._bytes: dict[tuple[Span, InFlight], tuple[Floats, Floats]] = {}
        self._figures: dict[Span, Floats] = {}
        self._useful: dict[Held, Ints] = {}

    def few(self, sizes: Sequence[int]) -> bool:
        """Whether all mixes of stages of these sizes can be looked at; with offloading they are others."""
        if self.book.offload is not Offload.NONE:
            return False
        return math.prod((size + 1) * (size + 2) // 2 for size in sizes) <= MOST_MIXES

    def least_s(self, held: tuple[Held, ...]) -> float:
        """What the rank takes at least for all micro-batches; infinite where no mix fits."""
        return self._best(held)[0]

    def fastest(self, held: tuple[Held, ...]) -> tuple[Column, ...] | None:
        """The recipes of its stages that take least; None where none fit."""
        seconds, numbers = self._best(held)
        if seconds == float("inf"):
            return None
        return tuple(self.book.mix(each.span, n) for each, n in zip(held, numbers, strict=True))

    def _best(self, held: tuple[Held, ...]) -> tuple[float, tuple[int, ...]]:
        if held not in self._known:
            self._known[held] = self._searched(held)
        return self._known[held]

    def _searched(self, held: tuple[Held, ...]) -> tuple[float, tuple[int, ...]]:
        """The least seconds, and the numbers of the mixes that take them: the first of each if those fit."""
        import numpy as np

        each_s = [self._all_seconds(own) for own in held]
        moments = self._moments(held)
        if all(
            sum(kept[0] for kept, _ in each) + max(passing[0] for _, passing in each) <= self._free_bytes
            for each in moments
        ):
            return float(sum(seconds[0] for seconds in each_s)), (0,) * len(held)
        total_s = self._total_s(each_s, moments)
        best = np.unravel_index(total_s.argmin(), total_s.shape)
        return float(total_s[best]), tuple(map(int, best))

    def fitting(self, held: tuple[Held, ...], within_s: float) -> tuple[Ints, Floats]:
        """The numbers [n, stage] of mixes that fit together and take less than a time, and what they take.

        Of each stage without those that another beats in every figure and in memory at all times.
        """
        import numpy as np

        useful = [self.useful(own) for own in held]
        each_s = [self._all_seconds(own)[kept] for own, kept in zip(held, useful, strict=True)]
        moments = [
            [
                (kept_bytes[kept], passing[kept])
                for (kept_bytes, passing), kept in zip(each, useful, strict=True)
            ]
            for each in self._moments(held)
        ]
        total_s = self._total_s(each_s, moments)
        places = np.nonzero(total_s < within_s)
        numbers = np.stack([kept[place] for kept, place in zip(useful, places, strict=True)], axis=1)
        return numbers, total_s[places]

    def useful(self, held: Held) -> Ints:
        """The numbers of a stage's mixes, without those that another beats in all."""
        import numpy as np

        if held not in self._useful:
            each = [self.figures(held.span)]
            for flight in held.flights:
                kept, passing = self._all_bytes(held.span, flight)
                each.append(np.stack([kept, np.nan_to_num(passing, neginf=0.0)], axis=1))  # no pass: of none
            self._useful[held] = undominated(np.concatenate(each, axis=1))
        return self._useful[held]

    def figures(self, span: Span) -> Floats:
        """The figures of every mix of the blocks of a span: [n, FIGURES]."""
        import numpy as np

        if span not in self._figures:
            every = self.book.mixes(*span)
            cost, passes = every.cost, kind_passes(every.cost)
            columns = [passes[kind].total_s for kind in KINDS]
            columns += [cost.unshard_s, cost.reduce_s, cost.optimizer_s]
            self._figures[span] = np.stack([column + 0.0 * every.full for column in columns], axis=1)
        return self._figures[span]

    @property
    def _free_bytes(self) -> float:
        return self.limit_bytes - self.book.shape.runtime_bytes

    def _moments(self, held: tuple[Held, ...]) -> list[list[tuple[Floats, Floats]]]:
        """Of each moment and stage, what its mixes keep, and what a pass needs."""
        return [
            [self._all_bytes(own.span, flight) for own, flight in zip(held, moment, strict=True)]
            for moment in zip(*(own.flights for own in held), strict=True)
        ]

    def _total_s(self, each_s: list[Floats], moments: list[list[tuple[Floats, Floats]]]) -> Floats:
        """The seconds of every mix of every stage beside each other, infinite for those that do not fit."""
        import numpy as np

        total_s = _outer(np.add, each_s).copy()
        for each in moments:
            used = _outer(np.add, [kept for kept, _ in each])
            used = used + _outer(np.maximum, [passing for _, passing in each])
            total_s[used > self._free_bytes] = np.inf
        return total_s

    def _all_seconds(self, held: Held) -> Floats:
        """Of each mix of a stage, all its actions."""
        import numpy as np

        key = held.span, held.actions
        if key not in self._seconds:
            mixes = self.book.mixes(*held.span)
            passes = kind_passes(mixes.cost)
            each = [count * passes[kind].total_s + 0.0 * mixes.full for kind, count in held.actions]
            self._seconds[key] = np.sum(each, axis=0)
        return self._seconds[key]

    def _all_bytes(self, span: Span, flight: InFlight) -> tuple[Floats, Floats]:
        """Of each mix of a stage, what it holds with what is in flight, and what a pass needs."""
        import numpy as np

        key = span, flight
        if key not in self._bytes:
            mixes = self.book.mixes(*span)
            if span not in self._memories:
                self._memories[span] = StageMemory(self.book.shape, mixes.cost)
            memory = self._memories[span]
            kept, passing = np.zeros(len(mixes.full)), np.full(len(mixes.full), -np.inf)
            kept += memory.held_bytes(flight)
            if flight.alive or not self.apart:
                passing[:] = memory.transient_bytes(flight)
            self._bytes[key] = kept, passing
        return self._bytes[key]


MOMENTS = 3
"""Moments of a rank's row that are looked at, those with most alive first."""
DUST = 1e-9
"""Share of the memory by which sums of floats may be off."""

_Signature = tuple[tuple[tuple[bool, bool], ...], tuple[int, ...], tuple[tuple[InFlight, ...], ...]]
"""Of a rank's stages: whether the model starts and ends there, the most blocks, what is in flight."""


class RankFloor:
    """The floors of one shape's ranks. Holds where all blocks are of one class.

    `split` is the least share of a stage's backward passes that are split.
    """

    def __init__(
        self,
        book: RecipeBook,
        limit_bytes: float,
        degrees: Degrees,
        in_flight: Sequence[Flights],
        limits: Sequence[tuple[int, int]],
        split: float,
    ) -> None:
        self.book, self.shape, self.limit_bytes = book, book.shape, limit_bytes
        self.in_flight, self.limits = in_flight, limits
        self.stages: list[list[int]] = [[] for _ in range(degrees.pp)]
        for stage in range(degrees.stages):
            self.stages[degrees.pp_rank_of_stage(stage)].append(stage)
        self.last = degrees.stages - 1
        self.block_s = dict(zip(book.options, book.option_s(split), strict=True))
        self.bytes, self.bounded = book.block_bytes, book.bounded
        self._alike: dict[int, _Signature] = {}
        self._known: dict[tuple[_Signature, int, range], dict[int, float]] = {}
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

    def _signature(self, rank: int) -> _Signature:
        """What a rank's floors depend on: which ends it holds, its places, and its fullest moments."""
        stages = self.stages[rank]
        fullest = sorted(self.in_flight[rank], key=lambda v: -total_count(v))[:MOMENTS]
        return (
            self.ends(rank),
            tuple(self.limits[s][1] for s in stages),
            tuple(tuple(vector[s] for s in stages) for vector in fullest),
        )

    def ends(self, rank: int) -> tuple[tuple[bool, bool], ...]:
        """Whether the model starts and ends on each of a rank's stages."""
        return tuple((s == 0, s == self.last) for s in self.stages[rank])

    def _least_by_first_s(self, signature: _Signature, blocks: int, firsts: range) -> dict[int, float]:
        import numpy as np

        ends, (most, *others), vectors = signature
        if not self.bounded:
            return dict.fromkeys(firsts, blocks * min(self.block_s.values()))
        full, selective, seconds = self._pairs(blocks)
        recomputing = np.ceil((full + selective) / max(most, *others))
        seconds = seconds + self.shape.constants.recompute_pass_s * recomputing
        fits = np.repeat(seconds[None] < float("inf"), len(firsts), axis=0)
        for flights in vectors:
            standing, forward, freed = self._standing_bytes(flights, ends)
            begun = all(own.begun for own in flights)
            free = self.limit_bytes - standing - blocks * (self.bytes.states - self.bytes.late * (not begun))
            single = sum(1 if own.alive else high for own, high in zip(flights[1:], others, strict=True))
            for row, first in enumerate(firsts):
                behind = (first > 1 and flights[0].alive > 0) or blocks - first > single
                back = self._back_bytes(full, selective, flights) + self.bytes.behind * behind - freed
                places = [first, *others]
                kept = np.zeros(len(full))
                for counts, each in (
                    ([own.alive for own in flights], self.bytes.saved),
                    ([own.waiting for own in flights], self.bytes.waiting),
                ):
                    kept += self._kept_bytes(blocks, full, selective, _before(counts, blocks, places), each)
                fits[row] &= kept + np.maximum(back, forward) <= free
        found = ((first, seconds[fits[row]]) for row, first in enumerate(firsts))
        return {first: float(each.min()) for first, each in found if len(each)}

    def _back_bytes(self, full: Ints, selective: Ints, flights: Sequence[InFlight]) -> Floats:
        """What the backward pass of some block needs: of one that recomputes, where all stages run."""
        import numpy as np

        least = min(self.bytes.passing.values())
        counts = {Recompute.FULL: full, Recompute.SELECTIVE: selective}
        each = [
            (size - least) * (counts[option] > 0)
            for option, size in self.bytes.passing.items()
            if option in counts and all(own.alive for own in flights)
        ]
        back: Floats = least + np.max([np.zeros(len(full)), *each], axis=0)
        return back

    def fastest_mixes(
        self, sizes: Sequence[int], flights: Sequence[InFlight], free_bytes: float, most: int
    ) -> Iterator[list[RecomputeCounts]]:
        """Mixes of a rank's stages of `sizes` blocks that keep at most `free_bytes`, the fastest `most`.

        Blocks that keep least lie where most micro-batches are in flight.
        """
        import numpy as np

        blocks = sum(sizes)
        places = sorted(
            (own.alive, own.waiting, s)
            for s, (size, own) in enumerate(zip(sizes, flights, strict=True))
            for _ in range(size)
        )
        full, selective, seconds = self._pairs(blocks)
        before = np.concatenate([[0.0], np.cumsum([alive for alive, _, _ in places])])
        waits = np.concatenate([[0.0], np.cumsum([waiting for _, waiting, _ in places])])
        used = self._kept_bytes(blocks, full, selective, before, self.bytes.saved)
        used += self._kept_bytes(blocks, full, selective, waits, self.bytes.waiting)
        order = np.lexsort((used, seconds))
        order = order[used[order] <= free_bytes]
        for number in order[:most].tolist():
            counts = self._counts(blocks, int(full[number]), int(selective[number]))
            options = [option for option in self.bytes.keeping for _ in range(int(counts[option]))]
            dealt = [[0, 0, 0] for _ in sizes]
            for (_, _, stage), option in zip(places, options, strict=True):
                dealt[stage][list(Recompute).index(option)] += 1
            yield [RecomputeCounts(none=n, selective=s, full=f) for n, s, f in dealt]

    @staticmethod
    def _counts(blocks: int, full: Any, selective: Any) -> dict[Recompute, Any]:
        return {
            Recompute.NONE: blocks - full - selective,
            Recompute.SELECTIVE: selective,
            Recompute.FULL: full,
        }

    def _kept_bytes(
        self,
        blocks: int,
        full: Ints,
        selective: Ints,
        before: Floats | Ints,
        each: Mapping[Recompute, float],
    ) -> Floats:
        """What blocks keep at `each` of their options, those that keep most in the first places; before[n]
        micro-batches are in flight on the first n together."""
        import numpy as np

        counts = self._counts(blocks, full, selective)
        at, used = np.zeros_like(full), np.zeros(len(full))
        for option in self.bytes.keeping:
            used += each[option] * (before[at + counts[option]] - before[at])
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
        self, flights: Sequence[InFlight], ends: Sequence[tuple[bool, bool]]
    ) -> tuple[float, float, float]:
        """What a rank holds besides its blocks' states and activations: runtime, messages and ends; what a
        forward pass needs; and of what the ends keep, the most that is freed before blocks run back."""
        total, forward, freed = float(self.shape.runtime_bytes), 0.0, 0.0
        total += flights[0].messages * self.shape.messages.boundary_bytes()
        for flight, (first, last) in zip(flights, ends, strict=True):
            resident, saved, passing = self.book.end_bytes(first, last, begun=flight.begun)
            total += resident + flight.alive * saved
            if flight.alive:
                forward, freed = max(forward, passing), max(freed, saved)
        return total, forward, freed


def _before(counts: Sequence[int], blocks: int, places: Sequence[int]) -> Ints:
    """Micro-batches on the n emptiest of `blocks` places together, for every n: on the first stage as many
    places as it has blocks, on the others where fewest are of `counts`."""
    import numpy as np

    first, *others = places
    rest = sorted(n for n, high in zip(counts[1:], others, strict=True) for _ in range(high))
    before: Ints = np.cumsum([0, *sorted([counts[0]] * first + rest[: blocks - first])])
    return before

"""Whether ranks, one after the other, can hold all blocks of a model within a step time.

With N_r the blocks of rank r, n_r those of its first stage, R_r what it takes for each of m micro-batches
(planner.search.programme.rank_options), and e_r what a path to a later rank meets on it:

    m R_r(N_r, n_r) + sum_{j<r} e_j(n_j) <= T   for every rank r,      sum_r N_r = L

A path enters each rank at its first stage. Under schedules with whole backward passes it leaves there too; e
has both passes then, else the forward. The least prefix sums, by the blocks placed so far, follow rank after
rank.

What ranks take at least with so many blocks, if blocks recompute in parts: all ranks of a shape at once.

At each moment of a rank's row, what does not fit is freed by the option, and on the stage, that frees most
bytes a second, the blocks lying where fewest micro-batches are alive. That is a sum of few products for any
number of blocks, and so of arrays: [rank, moment, place], a place being one of a rank's stages.

What the ranks of one shape take at least, by the blocks that they hold and how they recompute.

Ranks with one stage have its fastest recipe. Of two stages all mixes are looked at, and of the more stages of
an even split too where they are few (planner.search.programme.rank_options).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.memory.activations import most_waits
from planner.search.programme.rank_options import DUST
from planner.search.programme.stage_options import RecipeBook
from planner.search.programme.stages import Limits
from planner.strategy.schedule.schedules import in_flight
from planner.strategy.strategy import Degrees, Schedule

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints
    from planner.search.programme.stages import StageSpace


class Way(NamedTuple):
    """Blocks that a rank may hold, what it takes with them for all micro-batches, and what a path to a later
    rank meets on it."""

    blocks: int
    own_s: float
    enter_s: float


def can_hold(layers: int, most: Sequence[int], ranks: Iterable[Iterable[Way]], within_s: float) -> bool:
    """Whether one way of each rank, of `layers` blocks together, keeps `within_s`.

    `most` are the most blocks of each rank's ways. Ranks are asked for their ways one after the other, and
    none once those before cannot be done in time.
    """
    least_s, later = {0: 0.0}, sum(most)
    for ways, high in zip(ranks, most, strict=True):
        later -= high
        after_s: dict[int, float] = {}
        for blocks, own_s, enter_s in ways:
            latest_s = within_s - own_s
            for before, before_s in least_s.items():
                placed, entered_s = before + blocks, before_s + enter_s
                if before_s > latest_s or not layers - later <= placed <= layers:
                    continue
                if entered_s < after_s.get(placed, float("inf")):
                    after_s[placed] = entered_s
        if not after_s:
            return False
        least_s = after_s
    return layers in least_s


REMEMBERED = 1024


class RankMoments(NamedTuple):
    """What is in flight on each place of every rank at its fullest moments [rank, moment, place], and the
    messages of the rank [rank, moment]; ranks with fewer moments have their last again."""

    alive: Ints
    waiting: Ints
    begun: Ints
    messages: Ints


def moments_of(degrees: Degrees, waits: int) -> RankMoments:
    """Those of a shape's table (planner.strategy.schedule.schedules.in_flight)."""
    d = degrees
    return _moments(d.schedule, d.pp, d.chunks, d.num_micro_batches, waits)


@lru_cache(maxsize=REMEMBERED)
def _moments(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int) -> RankMoments:
    import numpy as np

    flights = in_flight(schedule, pp, chunks, num_micro_batches, waits)
    most = max(map(len, flights))
    rows = [
        [[each[stage] for stage in sorted(each)] for each in (*row, *row[-1:] * (most - len(row)))]
        for row in flights
    ]
    found = np.asarray([[[tuple(own) for own in each] for each in row] for row in rows], dtype=np.int64)
    alive, waiting, begun, messages, _ = np.moveaxis(found, -1, 0)
    return RankMoments(alive, waiting, begun > 0, messages[:, :, 0])


class Room(NamedTuple):
    """What a block of each place holds by its kind [rank, moment, place, kind], and what all blocks of
    the rank may hold together [rank, moment]."""

    held: Floats
    free: Floats


class Passes(NamedTuple):
    """What a block of each place holds by its kind [rank, moment, place, kind], what the pass back of one
    needs beyond the least that any does [rank, kind], what it needs more while the gradients of a block
    behind it are reduced that kept as much as one of a kind [rank, kind], and what all blocks of the rank may
    hold while that which needs least runs back [rank, moment]."""

    held: Floats
    more: Floats
    behind: Floats
    free: Floats


class _Ends(NamedTuple):
    """What ranks hold besides blocks [rank, moment], what a forward pass needs, and of what the ends keep,
    the most that is freed before blocks run back."""

    standing: Floats
    passing: Floats
    freed: Floats


class RankParts:
    """The floors of one shape's ranks. A block's kind is its class and option.

    `split` is the least share of a stage's backward passes that are split; `bounded` says whether what ranks
    hold is known.
    """

    def __init__(self, space: StageSpace, *, split: float, bounded: bool) -> None:
        import numpy as np

        self.space, self.bounded = space, bounded
        self.moments = moments_of(
            space.degrees, most_waits(space.model.problem.engine_settings, space.degrees)
        )
        books = {id(book): book for book in space.books}
        numbers = {name: number for number, name in enumerate(books)}
        self._books, self._kinds = list(books.values()), np.asarray([numbers[id(b)] for b in space.books])
        self._split = split
        self._limit_bytes = np.asarray(space.limits_bytes) * (1 + DUST)

    @property
    def _kind_count(self) -> int:
        return len(self._books[0].shape.classes) * len(self._books[0].options)

    def _of(self, figure: Callable[[RecipeBook], Any]) -> Floats:
        """A figure of each rank's book [rank], or of its options [rank, option]."""
        import numpy as np

        each: Floats = np.asarray([figure(book) for book in self._books], dtype=np.float64)[self._kinds]
        return each

    def by_kind(self, name: str) -> Floats:
        """Bytes of a block of each rank by its class and option [rank, kind]."""
        return self._of(lambda book: book.kind_figures[name])

    @cached_property
    def room(self) -> Room | None:
        """What limits the blocks of ranks; None where that is not known."""
        import numpy as np

        if not self.bounded:
            return None
        (alive, waiting, begun, _), ends = self.moments, self._ends
        held = alive[..., None] * self.by_kind("saved")[:, None, None]
        held += waiting[..., None] * self.by_kind("waiting")[:, None, None]
        held += self.by_kind("states")[:, None, None]
        late = np.where(begun.all(axis=-1), 0.0, 1.0)[..., None, None]
        held -= self.by_kind("late")[:, None, None] * late
        least = self.by_kind("passing").min(axis=-1)[:, None]
        return Room(held, self._left - np.maximum(least - ends.freed, ends.passing))

    @property
    def _left(self) -> Floats:
        """What the ends leave of the memory [rank, moment]."""
        left: Floats = self._limit_bytes[:, None] - self._ends.standing
        return left

    def rows(self, limits: Limits) -> Room:
        """Rooms of which each must hold all blocks, [way, rank] instead of [rank], where each stage's blocks
        lie within limits; without bounds those of blocks that hold nothing.

        As they are; with what the pass back of the mean block needs, of all stages that run and of each; and,
        where these have two blocks or more, while one of the mean's is reduced. With n_so blocks of option o
        on them and c_o what a pass needs,

            the largest of their passes  >=  sum c_o n_so / sum n_so  >=  c + sum (c_o - c) n_so / N

        as no stage's pass needs less than its mean, c being the least of all and N the most that they hold.
        """
        import numpy as np

        room, alive = self.room, self.moments.alive > 0
        if room is None:
            return Room(np.zeros((1, *alive.shape, self._kind_count)), np.ones((1, *alive.shape[:2])))
        low, high = np.asarray(limits).T[:, self.space.stages_of]
        passing = self.by_kind("passing")
        reducing = passing - self.by_kind("saved") + self.by_kind("reducing")
        left = self._left + self._ends.freed
        held, free = [room.held], [room.free]
        places = np.arange(alive.shape[-1])
        for chosen in (places >= 0, *(places == place for place in places)):
            there = alive & chosen
            most = np.maximum(np.where(there, high[:, None], 0).sum(axis=-1), 1)
            some = there.any(axis=-1)
            two = some & (~there | (low[:, None] > 1)).all(axis=-1)
            for each, running in ((passing, some), (reducing, two)):
                least = each.min(axis=-1, keepdims=True)
                share = (each - least)[:, None, None] / most[:, :, None, None]
                held.append(room.held + share * (there & running[:, :, None])[..., None])
                free.append(np.where(running, left - least, room.free))
        return Room(np.stack(held), np.stack(free))

    def passes(self) -> Passes | None:
        """What passes back need; None without bounds."""
        import numpy as np

        if self.room is None:
            return None
        passing = self.by_kind("passing")
        least = passing.min(axis=-1, keepdims=True)
        behind = np.maximum(self.by_kind("reducing") - self.by_kind("saved"), 0.0)
        return Passes(self.room.held, passing - least, behind, self._left + self._ends.freed - least)

    @cached_property
    def _ends(self) -> _Ends:
        import numpy as np

        (alive, _, begun, messages), space = self.moments, self.space
        last = space.degrees.stages - 1
        where = np.full((len(alive), 1, alive.shape[-1]), 2)
        where[space.rank_of[0], 0, 0] = 0
        where[space.rank_of[last], 0, space.stages_of[space.rank_of[last]].index(last)] = 1
        ranks = np.arange(len(alive))[:, None, None]
        figures = self._of(attrgetter("end_figures"))[ranks, begun.astype(np.int64), where]
        resident, saved, passing = np.moveaxis(figures, -1, 0)
        runtime = self._of(attrgetter("shape.runtime_bytes"))[:, None]
        standing = runtime + (resident + alive * saved).sum(axis=-1)
        standing += messages * self._of(lambda book: book.shape.messages.boundary_bytes())[:, None]
        forward, freed = (np.where(alive > 0, each, 0.0).max(axis=-1) for each in (passing, saved))
        return _Ends(standing, forward, freed)

    def least_s(self, most: int) -> Floats:
        """What every rank takes at least for a micro-batch with 0, 1, ... `most` blocks of one class [rank,
        blocks]; infinite where they cannot fit."""
        import numpy as np

        room, blocks = self.room, np.arange(most + 1)
        option_s = self._of(lambda book: book.option_s(self._split))
        fastest_s = option_s.min(axis=-1, keepdims=True)
        found: Floats = fastest_s * blocks
        if room is None:
            return found
        free = room.free[:, :, None]
        fits = self._least_sum(room.held.min(axis=-1), blocks) <= free
        more_s = (option_s - fastest_s)[:, None, None]
        quick = np.where(more_s > 0, np.inf, room.held).min(axis=-1)
        over = self._least_sum(quick, blocks) - free
        pass_s = self._of(attrgetter("shape.constants.recompute_pass_s"))
        with np.errstate(divide="ignore", invalid="ignore"):
            freed = np.where(more_s > 0, (quick[..., None] - room.held) / more_s, 0.0).max(axis=(-2, -1))
            again_s = over / freed[:, :, None] + pass_s[:, None, None]
        found += np.where((over > 0) & (freed > 0)[:, :, None], again_s, 0.0).max(axis=1)
        found[~fits.all(axis=1)] = np.inf
        return found

    def _least_sum(self, each: Floats, blocks: Ints) -> Floats:
        """The sum over so many blocks where each adds least [rank, moment, blocks]."""
        import numpy as np

        places = np.asarray(self.space.size_limits)[:, 1][self.space.stages_of]
        order = np.argsort(each, axis=-1, kind="stable")
        most = np.take_along_axis(np.broadcast_to(places[:, None], each.shape), order, axis=-1)
        held = np.clip(blocks - (np.cumsum(most, axis=-1) - most)[..., None], 0, most[..., None])
        total: Floats = (np.take_along_axis(each, order, axis=-1)[..., None] * held).sum(axis=-2)
        return total


Span = tuple[int, int]


class RankWays:
    """The ranks of a space."""

    def __init__(self, space: StageSpace) -> None:
        self.space, self.degrees = space, space.degrees
        self._known: dict[tuple[int, int], dict[int, float]] = {}

    def can_hold(self, by_rank: Limits, left_s: float) -> bool:
        """Whether ranks that are entered one after the other can hold all blocks in time if memory has room
        for all."""
        space = self.space
        entered = {name: space.enter_s(book) for name, book in {id(b): b for b in space.books}.items()}

        def ways(rank: int) -> Iterator[Way]:
            low, high = by_rank[rank]
            fixed_s, block_s = entered[id(space.books[rank])]
            for blocks in range(low, high + 1):
                for first, own_s in self._roomy_ways(rank, blocks).items():
                    yield Way(blocks, own_s, fixed_s + block_s * first)

        most = [high for _, high in by_rank]
        return can_hold(space.layers, most, map(ways, range(self.degrees.pp)), left_s)

    def parts_s(self, most: int) -> Floats:
        """What every rank takes at least for a micro-batch with 0, 1, ... `most` blocks, found in next to no
        time [rank, blocks]."""
        import numpy as np

        held_s: Floats = np.asarray(self.space.held_s)[:, None]
        return (self.parts.least_s(most) + held_s) * (1 - DUST)

    def done(self, rank: int, blocks: int, own_s: float) -> bool:
        """Whether a rank may hold so many blocks and take less than `own_s` for a micro-batch."""
        if self.degrees.chunks == 1:
            column = self.space.recipe(rank, self.space.span(rank, blocks))
            return column is not None and column.whole_s(self.degrees.schedule) < own_s
        all_s = own_s * self.degrees.num_micro_batches
        if (rank, blocks) not in self._known and self._mixed(rank, blocks):
            firsts = self._firsts(rank, blocks)
            return any(
                self._mixed_s(rank, blocks, n) < all_s
                for n in sorted(firsts, key=lambda n: abs(2 * n - blocks))
            )
        return min(self.ways(rank, blocks).values(), default=float("inf")) < all_s

    def ways(self, rank: int, blocks: int) -> dict[int, float]:
        """What a rank that holds so many blocks takes at least for all micro-batches, by how many of them its
        first stage has."""
        key = rank, blocks
        if key not in self._known:
            self._known[key] = self._all_ways(rank, blocks)
        return self._known[key]

    def _roomy_ways(self, rank: int, blocks: int) -> dict[int, float]:
        """The same where memory has room for all, with as few blocks on the first stage as can be."""
        own_s = self.degrees.num_micro_batches * (blocks * self.space.block_s[rank] + self.space.held_s[rank])
        return dict.fromkeys(self._firsts(rank, blocks)[:1], own_s)

    def _firsts(self, rank: int, blocks: int) -> range:
        """How many of a rank's blocks its first stage may hold."""
        low, high, least, most = self._limits[rank]
        return range(max(low, blocks - most), min(high, blocks - least) + 1)

    @cached_property
    def _limits(self) -> list[tuple[int, int, int, int]]:
        """Of each rank, the least and the most blocks of its first stage, and of the others together."""
        limits = []
        for stages in self.space.stages_of:
            (low, high), *others = (self.space.size_limits[s] for s in stages)
            limits.append((low, high, sum(least for least, _ in others), sum(most for _, most in others)))
        return limits

    def _all_ways(self, rank: int, blocks: int) -> dict[int, float]:
        m, firsts = self.degrees.num_micro_batches, self._firsts(rank, blocks)
        if self._mixed(rank, blocks):
            found = {n: self._mixed_s(rank, blocks, n) for n in firsts}
        else:
            held_s = self.space.held_s[rank]
            floors = self.space.floors[rank].least_by_first_s(rank, blocks, firsts)
            found = {first: m * (least_s + held_s) for first, least_s in floors.items()}
        return {first: own_s for first, own_s in found.items() if own_s < float("inf")}

    def _mixed(self, rank: int, blocks: int) -> bool:
        """Whether all mixes of a rank's stages are looked at."""
        two = len(self.space.stages_of[rank]) == 2
        return two and self.space.mixes[rank].few((blocks // 2, blocks - blocks // 2))

    def _mixed_s(self, rank: int, blocks: int, first: int) -> float:
        """What a rank of two stages takes at least for all micro-batches, the first with so many blocks."""
        one, other = self.space.stages_of[rank]
        spans = self.space.span(one, first), self.space.span(other, blocks - first)
        return self.space.mixes[rank].least_s(self.space.all_held(rank, spans))

    @cached_property
    def parts(self) -> RankParts:
        """The floors of all ranks at once, if blocks recompute in parts."""
        return RankParts(self.space, split=self.space.split_share, bounded=self.space.books[0].bounded)

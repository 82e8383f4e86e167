"""What ranks take at least with so many blocks, if blocks recompute in parts: all ranks of a shape at once.

At each moment of a rank's row, what does not fit is freed by the option, and on the stage, that frees most
bytes a second, the blocks lying where fewest micro-batches are alive. That is a sum of few products for any
number of blocks, and so of arrays: [rank, moment, place], a place being one of a rank's stages.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.schedule import in_flight
from planner.search.rank_floor import DUST, RankFloor
from planner.search.sizes import Limits
from planner.strategy import Degrees, Schedule

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

REMEMBERED = 1024


class Moments(NamedTuple):
    """What is in flight on each place of every rank at its fullest moments, and the messages of the rank
    [rank, moment]; ranks with fewer moments have their last again."""

    alive: Ints
    waiting: Ints
    begun: Ints
    messages: Ints


def moments_of(degrees: Degrees, waits: int) -> Moments:
    """Those of a shape's table (planner.cost.schedule.in_flight)."""
    d = degrees
    return _moments(d.schedule, d.pp, d.chunks, d.num_micro_batches, waits)


@lru_cache(maxsize=REMEMBERED)
def _moments(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int) -> Moments:
    import numpy as np

    flights = in_flight(schedule, pp, chunks, num_micro_batches, waits)
    most = max(map(len, flights))
    rows = [
        [[each[stage] for stage in sorted(each)] for each in (*row, *row[-1:] * (most - len(row)))]
        for row in flights
    ]
    found = np.asarray([[[tuple(own) for own in each] for each in row] for row in rows], dtype=np.int64)
    alive, waiting, begun, messages = np.moveaxis(found, -1, 0)
    return Moments(alive, waiting, begun, messages[:, :, 0])


class Room(NamedTuple):
    """What a block of each place holds by its option [rank, moment, place, option], and what all blocks of
    the rank may hold together [rank, moment]."""

    held: Floats
    free: Floats


class _Ends(NamedTuple):
    """What ranks hold besides blocks [rank, moment], what a forward pass needs, and of what the ends keep,
    the most that is freed before blocks run back."""

    standing: Floats
    passing: Floats
    freed: Floats


class RankParts:
    """The floors of one shape's ranks on one kind of device."""

    def __init__(self, floor: RankFloor, moments: Moments) -> None:
        self.floor, self.moments = floor, moments

    @cached_property
    def room(self) -> Room | None:
        """What limits the blocks of ranks; None where that is not known."""
        import numpy as np

        floor, moments = self.floor, self.moments
        if not floor.bounded:
            return None
        options = list(floor.block_s)
        own = floor.bytes
        saved, waiting = (np.asarray([of[o] for o in options]) for of in (own.saved, own.waiting))
        held = moments.alive[..., None] * saved + moments.waiting[..., None] * waiting
        begun = moments.begun.all(axis=-1)
        held += np.where(begun, own.states, own.states - own.late)[:, :, None, None]
        ends = self._ends
        passing = np.maximum(min(own.passing.values()) - ends.freed, ends.passing)
        return Room(held, self._limit_bytes - ends.standing - passing)

    @property
    def _limit_bytes(self) -> float:
        return self.floor.limit_bytes * (1 + DUST)

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

        room, floor = self.room, self.floor
        if room is None:
            shape = 1, *self.moments.alive.shape
            return Room(np.zeros((*shape, len(floor.block_s))), np.ones(shape[:-1]))
        own, alive = floor.bytes, self.moments.alive > 0
        low, high = (np.asarray([[limits[s][n] for s in stages] for stages in floor.stages]) for n in (0, 1))
        passing, saved = (np.asarray([of[o] for o in floor.block_s]) for of in (own.passing, own.saved))
        left = self._limit_bytes - self._ends.standing + self._ends.freed
        held, free = [room.held], [room.free]
        places = np.arange(alive.shape[-1])
        for chosen in (places >= 0, *(places == place for place in places)):
            there = alive & chosen
            most = np.where(there, high[:, None], 0).sum(axis=-1)
            some = there.any(axis=-1)
            two = some & (~there | (low[:, None] > 1)).all(axis=-1)
            for each, running in ((passing, some), (passing - saved + own.reducing, two)):
                share = (there & running[:, :, None])[..., None] * (each - each.min())
                held.append(room.held + share / np.maximum(most, 1)[:, :, None, None])
                free.append(np.where(running, left - each.min(), room.free))
        return Room(np.stack(held), np.stack(free))

    @cached_property
    def _ends(self) -> _Ends:
        import numpy as np

        floor, moments = self.floor, self.moments
        resident, saved, passes = (np.zeros(moments.alive.shape) for _ in range(3))
        kinds = np.asarray([floor.ends(rank) for rank in range(len(moments.alive))])  # [rank, place, 2]
        for first, last in {tuple(kind) for kind in kinds.reshape(-1, 2).tolist()}:
            there = ((kinds == [first, last]).all(axis=-1))[:, None]
            for begun in (False, True):
                own = there & (moments.begun == begun)
                resident[own], saved[own], passes[own] = floor.bytes.ends(first, last, begun)
        alive = moments.alive > 0
        standing = floor.shape.runtime_bytes + (resident + moments.alive * saved).sum(axis=-1)
        standing += moments.messages * floor.shape.messages.boundary_bytes()
        forward, freed = (np.where(alive, each, 0.0).max(axis=-1) for each in (passes, saved))
        return _Ends(standing, forward, freed)

    def least_s(self, most: int) -> Floats:
        """What every rank takes at least for a micro-batch with 0, 1, ... `most` blocks [rank, blocks];
        infinite where they cannot fit."""
        import numpy as np

        floor, room, blocks = self.floor, self.room, np.arange(most + 1)
        each_s = np.asarray(list(floor.block_s.values()))
        fastest_s = float(each_s.min())
        found: Floats = np.repeat(blocks[None] * fastest_s, len(self.moments.alive), axis=0)
        if room is None:
            return found
        free = room.free[:, :, None]
        fits = self._least_sum(room.held.min(axis=-1), blocks) <= free
        quick = room.held[..., each_s == fastest_s].min(axis=-1)
        over = self._least_sum(quick, blocks) - free
        slower = each_s > fastest_s
        if slower.any():
            freed = quick[..., None] - room.held[..., slower]
            rate = (freed / (each_s[slower] - fastest_s)).max(axis=(-2, -1))
            with np.errstate(divide="ignore", invalid="ignore"):
                more = over / rate[:, :, None] + floor.shape.physics.recompute_pass_s
            found += np.where((over > 0) & (rate > 0)[:, :, None], more, 0.0).max(axis=1)
        found[~fits.all(axis=1)] = np.inf
        return found

    def _least_sum(self, each: Floats, blocks: Ints) -> Floats:
        """The sum over so many blocks where each adds least [rank, moment, blocks]."""
        import numpy as np

        places = np.asarray([[self.floor.limits[s][1] for s in own] for own in self.floor.stages])
        order = np.argsort(each, axis=-1, kind="stable")
        most = np.take_along_axis(np.broadcast_to(places[:, None], each.shape), order, axis=-1)
        held = np.clip(blocks - (np.cumsum(most, axis=-1) - most)[..., None], 0, most[..., None])
        total: Floats = (np.take_along_axis(each, order, axis=-1)[..., None] * held).sum(axis=-2)
        return total

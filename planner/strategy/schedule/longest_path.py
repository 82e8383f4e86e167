"""The longest path through a schedule's table, for devices that have cores of their own.

An action ends at

    end = max(end of the action before it in its row, end of what it needs + message) + its seconds

The order in which actions can be worked out depends on the table alone: it is found once, and a replay is
one pass over it. 64 stages with 512 micro-batches are 65,536 actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from planner.foundation.frozen import frozen
from planner.strategy.schedule.table import KINDS, Table

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

WIDE = 12
"""Rows from which numpy, a wave of all ranks at a time, orders a table faster than a loop over actions."""
WIDE_WAVE = 24
"""Places a wave from which numpy also adds up a table's times faster than a loop over places."""


@frozen
class ActionOrder:
    """A table's actions in an order in which each comes after what it waits for.

    Only those that wait for a message, or whose message is waited for, have a place, from 1 up; place 0 is a
    time long ago. The others (weight gradients, mostly) follow the action before them in their row at once,
    so what they take is counted to the next place of the row, or to the row's end.

    For each place, `ranks` is its row, `needed` the place of the action that must have sent, `cells` what it
    costs; places between two of `waves` (none: unknown) do not wait for each other. `passing_cells` are those
    of actions without a place, `passing_into` the index of the place that they count to; rows' ends come
    behind all places. `rows` has the place of each action of a row, or 0.
    """

    ranks: Ints
    needed: Ints
    cells: Ints
    waves: list[int]
    passing_cells: Ints
    passing_into: Ints
    rows: tuple[Ints, ...]

    def durations(self, cell_s: Sequence[float]) -> Durations:
        """What the places take."""
        import numpy as np

        each, places = np.asarray(cell_s, dtype=np.float64), len(self.needed)
        slots = places + len(self.rows)
        passing = np.bincount(self.passing_into, each[self.passing_cells], slots).astype(np.float64)
        return Durations(
            order=self,
            before_s=passing[:places],
            own_s=each[self.cells],
            last_s=passing[places:],
        )


@frozen
class Durations:
    """Seconds of an order's places: what passes before each in its row, its own, what ends its row."""

    order: ActionOrder
    before_s: Floats
    own_s: Floats
    last_s: Floats

    def ends_s(self, begin_s: Sequence[float], hop_s: float) -> tuple[Floats, list[float]]:
        """When the action of each place ends, and when each row does; row r may begin at begin_s[r]."""
        wide = self.order.waves and len(self.own_s) >= WIDE_WAVE * len(self.order.waves)
        ends, free = self._by_waves(begin_s, hop_s) if wide else self._one_by_one(begin_s, hop_s)
        return ends, (free + self.last_s).tolist()

    def _one_by_one(self, begin_s: Sequence[float], hop_s: float) -> tuple[Floats, Floats]:
        import numpy as np

        ends, free = [-float("inf")], list(begin_s)
        append, order = ends.append, self.order
        places = (order.ranks, order.needed, self.before_s, self.own_s)
        for rank, needed, before_s, own_s in zip(*(each.tolist() for each in places), strict=True):
            ready, arrived = free[rank] + before_s, ends[needed] + hop_s
            free[rank] = end = (ready if ready >= arrived else arrived) + own_s
            append(end)
        return np.asarray(ends), np.asarray(free)

    def _by_waves(self, begin_s: Sequence[float], hop_s: float) -> tuple[Floats, Floats]:
        import numpy as np

        order, free = self.order, np.array(begin_s, dtype=np.float64)
        ends = np.empty(len(self.own_s) + 1)
        ends[0] = -np.inf
        for first, stop in pairwise(order.waves):
            rank = order.ranks[first:stop]
            ready = free.take(rank)
            ready += self.before_s[first:stop]
            arrived = ends.take(order.needed[first:stop])
            arrived += hop_s
            np.maximum(ready, arrived, out=ready)
            ready += self.own_s[first:stop]
            free[rank] = ready
            ends[first + 1 : stop + 1] = ready
        return ends, free


def many_row_ends_s(order: ActionOrder, cell_s: Floats, begin_s: Floats, hop_s: float) -> Floats:
    """When each row ends, for many durations at once: cell_s[cell, n], begin_s[row, n] -> ends[row, n]."""
    import numpy as np

    places, many = len(order.needed), cell_s.shape[1]
    slots = np.zeros((places + len(order.rows), many))
    np.add.at(slots, order.passing_into, cell_s[order.passing_cells])
    ends = np.empty((places + 1, many))
    ends[0] = -np.inf
    free = begin_s.copy()
    steps = (order.ranks.tolist(), order.needed.tolist(), order.cells.tolist())
    for place, (rank, needed, cell) in enumerate(zip(*steps, strict=True)):
        ready = free[rank] + slots[place]
        np.maximum(ready, ends[needed] + hop_s, out=ready)
        ready += cell_s[cell]
        free[rank] = ends[place + 1] = ready
    row_ends: Floats = free + slots[places:]
    return row_ends


def action_order(table: Table) -> ActionOrder:
    """The order in which a table's actions can run. Raises ValueError where the table waits for itself."""
    if table.known_order is None:
        table.known_order = _order_actions(table)
    order: ActionOrder = table.known_order
    return order


def _order_actions(table: Table) -> ActionOrder:
    import numpy as np

    codes, lengths = np.concatenate(table.codes), [len(row) for row in table.codes]
    ranks, rows = np.repeat(np.arange(len(lengths)), lengths), len(lengths)
    needs = _needs(codes, ranks, table)
    placed = needs < len(codes)
    placed[needs[placed]] = True
    index = np.concatenate([[0], np.cumsum(placed)])  # of an action among the placed, or of the next of them
    begins = np.concatenate([[0], np.cumsum(lengths)])
    starts, waits = index[begins], index[needs[placed]]
    order, waves = _waves(waits, starts) if rows >= WIDE else (_loop(waits, starts), [])
    places = np.zeros(len(order) + 1, dtype=np.int64)
    places[order] = 1 + np.arange(len(order))
    passing, cells = ~placed, codes // table.num_micro_batches
    after, row = index[:-1][passing], ranks[passing]
    return ActionOrder(
        ranks=ranks[placed][order],
        needed=places[waits[order]],
        cells=cells[placed][order],
        waves=waves,
        passing_cells=cells[passing],
        passing_into=np.where(after < starts[row + 1], places[after] - 1, len(order) + row),
        rows=tuple(np.split(np.where(placed, places[index[:-1]], 0), begins[1:-1])),
    )


def _needs(codes: Ints, ranks: Ints, table: Table) -> Ints:
    """For each action the one, on another rank, whose message it needs; the number of actions if none.

    Where both are on one rank their order in the row is enough. A need that nothing meets is the action
    itself: that waits for ever.
    """
    import numpy as np

    none = len(codes)
    found = np.full(table.stages * len(KINDS) * table.num_micro_batches, -1)
    found[codes] = np.arange(none)
    by_stage = found.reshape(-1, len(KINDS), table.num_micro_batches)
    forward, backward, inputs, _, paired = by_stage.swapaxes(0, 1)
    down, up = np.maximum(forward, paired), np.maximum(backward, inputs)
    sent = np.maximum(forward, paired + (paired >= 0))
    needs = np.full(none + 1, none)  # one more, for actions that there are not
    for own, sender in ((down[1:], sent[:-1]), (up[:-1], up[1:])):
        local = (sender >= 0) & (sender < own) & (ranks[sender] == ranks[own])
        needs[own] = np.where(local, none, np.where(sender < 0, own, sender))
    return needs[:none]


def _loop(needs: Ints, begins: Ints) -> Ints:
    """An order, found by running each row as far as it goes."""
    import numpy as np

    waits, done = needs.tolist(), [False] * len(needs) + [True]
    positions, stops = begins[:-1].tolist(), begins[1:].tolist()
    order: list[int] = []
    while len(order) < len(waits):
        before = len(order)
        for rank, stop in enumerate(stops):
            position = positions[rank]
            while position < stop and done[waits[position]]:
                done[position] = True
                order.append(position)
                position += 1
            positions[rank] = position
        if len(order) == before:
            raise ValueError("the schedule table waits for itself")
    return np.asarray(order, dtype=np.int64)


def _waves(needs: Ints, begins: Ints) -> tuple[Ints, list[int]]:
    """An order, found by running, wave after wave, the next action of every row that can run; waves' limits.

    Each row gets one more action at its end, which never can.
    """
    import numpy as np

    total, rows = len(needs), len(begins) - 1
    own = np.insert(np.arange(total), begins[1:], total)
    shifted = np.append(np.arange(total) + np.repeat(np.arange(rows), np.diff(begins)), total + rows)
    waits = np.insert(shifted[needs], begins[1:], total + rows + 1)
    done = np.zeros(total + rows + 2, dtype=bool)
    done[total + rows] = True  # nothing is needed
    positions = begins[:-1] + np.arange(rows)
    waves: list[Ints] = [np.empty(0, dtype=np.int64)]
    found = 0
    while found < total:
        ready = done[waits[positions]]
        wave = positions[ready]
        if not len(wave):
            raise ValueError("the schedule table waits for itself")
        done[wave] = True
        positions += ready
        waves.append(wave)
        found += len(wave)
    return own[np.concatenate(waves)], list(accumulate(map(len, waves)))

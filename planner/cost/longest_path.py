"""The longest path through a schedule's table, for devices that have cores of their own.

An action ends at

    end = max(end of the action before it in its row, end of what it needs + message) + its seconds

The order in which actions can be worked out depends on the table alone: it is found once, and a replay is
one pass over it. 64 stages with 512 micro-batches are 65,536 actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planner.codec import noun
from planner.cost.action import ActionKind
from planner.cost.table import KINDS, PAIRED, Table

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]

FEW = 3000
"""Actions up to which a loop orders a table faster than numpy does."""


@noun
class ActionOrder:
    """A table's actions in an order in which each comes after what it waits for.

    Only those that wait for a message, or whose message is waited for, have a place: the others (weight
    gradients, mostly) follow the action before them in their row at once, so what they take is counted to
    the next place of the row. Places count from 1 + rows: place 0 is a time long ago, places 1 to rows are
    where rows begin, and behind all others each row has one for its end.

    `before` and `needed` are, for each place, that of the row before and that of the action that must have
    sent (0: none), `cells` what the action costs. `passing_cells` are those of actions without a place,
    `passing_into` the index of the place that they are counted to. `rows` has the place of every action of
    a row (0: none), `lasts` the last place of each row before its end.
    """

    before: list[int]
    needed: list[int]
    cells: Ints
    passing_cells: Ints
    passing_into: Ints
    rows: tuple[Ints, ...]
    lasts: list[int]

    def times(self, begin_s: Sequence[float], cell_s: Sequence[float]) -> OrderTimes:
        """What the places take; row r may begin at begin_s[r]."""
        import numpy as np

        each = np.asarray(cell_s)
        passing = np.bincount(self.passing_into, each[self.passing_cells], len(self.before) + len(self.rows))
        gaps = passing.tolist()
        return OrderTimes(
            order=self, begin_s=begin_s, gaps_s=gaps[: len(self.before)], own_s=each[self.cells].tolist(),
            tails_s=gaps[len(self.before) :],
        )


@noun
class OrderTimes:
    """Seconds of an order's places: before each, what passes in its row; of its own; behind the last."""

    order: ActionOrder
    begin_s: Sequence[float]
    gaps_s: list[float]
    own_s: list[float]
    tails_s: list[float]

    def ends_s(self, hop_s: float) -> list[float]:
        """When the action of each place ends, a message between rows taking `hop_s`."""
        ends = [-float("inf"), *self.begin_s]
        append = ends.append
        order = self.order
        for before, needed, gap_s, own_s in zip(
            order.before, order.needed, self.gaps_s, self.own_s, strict=True
        ):
            free, arrived = ends[before] + gap_s, ends[needed] + hop_s
            append((free if free >= arrived else arrived) + own_s)
        for last, tail_s in zip(order.lasts, self.tails_s, strict=True):
            append(ends[last] + tail_s)
        return ends


def order_actions(table: Table) -> ActionOrder:
    """The order of a table. Raises ValueError where it waits for itself."""
    import numpy as np

    lengths = [len(row) for row in table.codes]
    cells, micro_batches = np.divmod(np.concatenate(table.codes), table.num_micro_batches)
    total, ranks = len(cells), np.repeat(np.arange(len(lengths)), lengths)
    needs = _needs(cells, micro_batches, ranks, table)
    placed = needs < total
    placed[needs[placed]] = True
    index = np.concatenate([[0], np.cumsum(placed)])  # of an action among the placed, or of the next of them
    begins = np.concatenate([[0], np.cumsum(lengths)])
    starts, waits = index[begins], index[needs[placed]]
    order = None
    if len(waits) > FEW:
        order = _in_step(cells[placed], _beat(table)[micro_batches[placed]], waits, starts)
    if order is None:
        order = _loop(waits, starts)
    places = _places(order, len(lengths))
    before, filled = places[np.arange(len(waits)) - 1], np.flatnonzero(np.diff(starts))
    before[starts[filled]] = 1 + filled
    own = index[:-1]
    passing, ends = ~placed, starts[ranks + 1]
    into = np.where(own < ends, places[own] - 1 - len(lengths), len(waits) + ranks)[passing]
    return ActionOrder(
        before=before[order].tolist(),
        needed=places[waits[order]].tolist(),
        cells=cells[placed][order],
        passing_cells=cells[passing],
        passing_into=into,
        rows=tuple(np.split(np.where(placed, places[own], 0), begins[1:-1])),
        lasts=np.where(np.diff(starts), places[starts[1:] - 1], 1 + np.arange(len(lengths))).tolist(),
    )


def _places(order: Ints, rows: int) -> Ints:
    """Where each one stands in the order, behind the rows' beginnings; the last, which is none, at 0."""
    import numpy as np

    places = np.zeros(len(order) + 1, dtype=np.int64)
    places[order] = 1 + rows + np.arange(len(order))
    return places


def _needs(cells: Ints, micro_batch: Ints, ranks: Ints, table: Table) -> Ints:
    """For each action the one, on another rank, whose message it needs; the number of actions if none.

    Where both are on one rank their order in the row is enough. A need that nothing meets, or that comes
    later in the same row, is the action itself: that waits for ever.
    """
    import numpy as np

    none, own = len(cells), np.arange(len(cells))
    stage, kind = np.divmod(cells, len(KINDS))
    needs = np.full(none, none)
    forwards = np.asarray([k is ActionKind.FORWARD for k in KINDS])
    for step, wanted in ((-1, forwards), (1, np.asarray([k.sends_gradients for k in KINDS]))):
        sends = np.flatnonzero(wanted[kind])
        sender = np.full((table.stages + 2, table.num_micro_batches), -1)
        sender[stage[sends] + 1, micro_batch[sends]] = sends + (kind[sends] == PAIRED)
        peer = stage[sends] + step
        waits = sends[(peer >= 0) & (peer < table.stages)]
        needs[waits] = sender[stage[waits] + step + 1, micro_batch[waits]]
    needs = np.where(needs < 0, own, needs)
    local = (needs < own) & (ranks[np.minimum(needs, none - 1)] == ranks)
    return np.where(local, none, needs)


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


def _beat(table: Table) -> Ints:
    """When each micro-batch has its turn: by number, or where rows go through their stages in rounds of as
    many micro-batches as there are rows, by how many forwards come before its first in a row."""
    import numpy as np

    m, rows = table.num_micro_batches, len(table)
    turns: Ints = np.arange(m)
    first = table.codes[0][: rows + 1] // m
    if rows < m and len(first) > rows and first[0] == first[rows - 1] != first[rows]:
        turns = turns // rows * rows * len(table.stages_of(0)) + turns % rows
    return turns


def _in_step(cells: Ints, turns: Ints, waits: Ints, starts: Ints) -> Ints | None:
    """An order for tables with a steady state, without following it: by n turn + offset(role).

    The n roles are an action's cell and the next one's in its row, which tells warm-up from steady state.
    With d the least difference of turns over all actions of two roles one of which waits for the other,

        offset(later) >= offset(earlier) + 1 - n d

    has an answer, found by relaxing all at once up to n times, unless a circle of roles comes back in the
    same turn. None then, and where there are too many roles for a table of their pairs.
    """
    import numpy as np

    roles, n = _roles(cells, starts)
    if n * n > 64 * len(cells):
        return None
    earlier, later = _edges(waits, starts)
    least = np.full(n * n, len(turns) * len(cells))
    np.minimum.at(least, roles[later] * n + roles[earlier], turns[later] - turns[earlier])
    pairs = np.flatnonzero(least < len(turns) * len(cells))  # in order of the later
    more = 1 - n * least[pairs]
    targets, begins = np.unique(pairs // n, return_index=True)
    offsets = np.zeros(n, dtype=np.int64)
    for _ in range(n + 1):
        raised = np.maximum(np.maximum.reduceat(offsets[pairs % n] + more, begins), offsets[targets])
        if np.array_equal(raised, offsets[targets]):
            return np.argsort(n * turns + offsets[roles], kind="stable")
        offsets[targets] = raised
    return None


def _roles(cells: Ints, starts: Ints) -> tuple[Ints, int]:
    """The number of each action's role, and how many there are."""
    import numpy as np

    numbers, count = _renumbered(cells)
    following = np.append(numbers[1:], count)
    following[starts[1:][np.diff(starts) > 0] - 1] = count
    return _renumbered(numbers * (count + 1) + following)


def _renumbered(keys: Ints) -> tuple[Ints, int]:
    """Keys as numbers without gaps, in the same order, and how many differ."""
    import numpy as np

    present = np.bincount(keys) > 0
    return (np.cumsum(present) - 1)[keys], int(present.sum())


def _edges(waits: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """Each pair of which the second waits for the first: neighbours in a row, senders and receivers."""
    import numpy as np

    follows = np.ones(len(waits), dtype=bool)
    follows[starts[:-1][np.diff(starts) > 0]] = False
    rows, receives = np.flatnonzero(follows), np.flatnonzero(waits < len(waits))
    return np.concatenate([rows - 1, waits[receives]]), np.concatenate([rows, receives])

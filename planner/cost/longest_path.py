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

WIDE = 12
"""Rows from which numpy, a wave of all ranks at a time, orders a table faster than a loop over actions."""


@noun
class ActionOrder:
    """A table's actions in an order in which each comes after what it waits for.

    Places count from 1 + rows: place 0 is a time long ago, places 1 to rows are where rows begin.
    `before` and `needed` are the places of the action before in the row and of the one that must have sent
    (0: none), `cells` says what the action costs, `rows` the place of each row's actions, in its order.
    """

    before: list[int]
    needed: list[int]
    cells: list[int]
    rows: tuple[list[int], ...]

    def ends_s(self, begin_s: Sequence[float], cell_s: Sequence[float], hop_s: float) -> list[float]:
        """When the action of each place ends; row r may begin at begin_s[r]."""
        ends = [-float("inf"), *begin_s]
        append = ends.append
        for before, needed, number in zip(self.before, self.needed, self.cells, strict=True):
            free, arrived = ends[before], ends[needed] + hop_s
            append((free if free >= arrived else arrived) + cell_s[number])
        return ends


def order_actions(table: Table) -> ActionOrder:
    """The order of a table. Raises ValueError where it waits for itself."""
    import numpy as np

    lengths = [len(row) for row in table.codes]
    codes = np.concatenate([table.array(rank) for rank in range(len(table))])
    cells, micro_batches = np.divmod(codes, table.num_micro_batches)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    needs = _needs(cells, micro_batches, np.repeat(np.arange(len(lengths)), lengths), table)
    order = _waves(needs, begins) if len(lengths) >= WIDE else _loop(needs, begins)
    places = np.empty(len(cells) + 1, dtype=np.int64)
    places[order] = 1 + len(lengths) + np.arange(len(cells))
    places[-1] = 0
    before = places[np.arange(len(cells)) - 1]
    filled = [rank for rank, length in enumerate(lengths) if length]
    before[begins[filled]] = 1 + np.asarray(filled)
    return ActionOrder(
        before=before[order].tolist(),
        needed=places[needs[order]].tolist(),
        cells=cells[order].tolist(),
        rows=tuple(places[a:b].tolist() for a, b in pairwise(begins.tolist())),
    )


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


def _waves(needs: Ints, begins: Ints) -> Ints:
    """An order, found by running, wave after wave, the next action of every row that can run.

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
    waves: list[Ints] = []
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
    order: Ints = own[np.concatenate(waves)]
    return order

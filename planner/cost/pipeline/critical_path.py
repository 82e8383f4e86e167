"""The critical path of a replay: what decides when the last rank has reduced its gradients.

Of the same table, it is a path under any other durations too, so that its length bounds every replay from
below:

    unshard of its first rank + sum over stages and kinds of count x seconds + hops x message
        + reduction of its last rank  <=  end of the last reduction
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.pipeline.simulate import PathTimes, Replay
from planner.strategy.schedule.table import KINDS

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]


class CriticalPath(NamedTuple):
    """Where a path starts and ends, how many messages it takes, and its actions: counts[stage, kind]."""

    first_rank: int
    last_rank: int
    hops: int
    counts: Ints


def critical_path(replay: Replay, hop_s: float) -> CriticalPath:
    """The path that decides the end of a replay whose devices have cores of their own."""
    assert isinstance(replay.times, PathTimes), "shared cores have no longest path"
    return longest_path(replay.times, replay.reduce_s, hop_s)


def longest_path(times: PathTimes, reduce_s: Sequence[float], hop_s: float) -> CriticalPath:
    """The path that decides when the last rank has reduced its gradients, in `reduce_s` after its row."""
    import numpy as np

    order, durations = times.table.order, times.durations
    rows = len(times.table)
    last_rank = max(range(rows), key=lambda rank: times.row_ends_s[rank] + reduce_s[rank])
    before = _places_before(order.rows, len(order.needed))
    cells = np.zeros(times.table.stages * len(KINDS), dtype=np.int64)
    visited: list[int] = []
    along_rows = [len(order.needed) + last_rank]  # slots whose actions without a place are on the path
    own = order.rows[last_rank]
    place, hops, rank = int(own[own.nonzero()[0][-1]]), 0, last_rank
    while place:
        visited.append(place)
        rank, previous = int(order.ranks[place - 1]), int(before[place])
        begin_s = float(times.ends_s[previous]) if previous else times.begin_s[rank]
        arrived_s = float(times.ends_s[order.needed[place - 1]]) + hop_s
        if arrived_s > begin_s + float(durations.before_s[place - 1]):
            place, hops = int(order.needed[place - 1]), hops + 1
        else:
            along_rows.append(place - 1)
            place = previous
    np.add.at(cells, order.cells[np.asarray(visited) - 1], 1)
    passing = np.isin(order.passing_into, along_rows)
    np.add.at(cells, order.passing_cells[passing], 1)
    return CriticalPath(rank, last_rank, hops, cells.reshape(-1, len(KINDS)))


def _places_before(rows: tuple[Ints, ...], places: int) -> Ints:
    """For each place the place before it in its row, or 0."""
    import numpy as np

    before = np.zeros(places + 1, dtype=np.int64)
    for row in rows:
        placed = row[row > 0]
        before[placed[1:]] = placed[:-1]
    return before

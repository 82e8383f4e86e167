"""Paths that run along one row of a table, entered through the stages before and left through them again.

A row is entered at the first forward of one of its stages, after a forward of every stage before; it is left
behind the last pass back of one of them, before a pass back of every stage before, or followed to its end.
Of an interleaved table with even stages one of them is the longest path.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from planner.strategy.schedule.schedules import build_table
from planner.strategy.schedule.table import BACKWARD, FORWARD, INPUT_GRAD, KINDS, PAIRED, Table
from planner.strategy.strategy import Degrees, Schedule

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

REMEMBERED = 64


class RowPaths(NamedTuple):
    """The paths of a table, ranks holding v stages each.

    `ranks` [path] is the row, `stages` [path, v] what it holds and `own` [path, v, kind] its actions on the
    path; `entered` and `left` [path] are the stages before which there is a forward, and behind which a pass
    back; `whole` [path, stage] says whether that pass is a whole one, `last` [path] which rank comes last.
    """

    ranks: Ints
    stages: Ints
    own: Ints
    entered: Ints
    left: Ints
    whole: Ints
    last: Ints
    hops: Ints

    def only(self, numbers: Ints) -> RowPaths:
        """Some of them."""
        return RowPaths(*(field[numbers] for field in self))

    def seconds(self, each_s: Floats) -> Floats:
        """What a path takes of every stage [path, stage, n], whose actions take each_s [stage, kind, n]."""
        import numpy as np

        numbers = np.arange(self.whole.shape[1])
        back_s = np.where(self.whole[:, :, None], each_s[:, BACKWARD], each_s[:, INPUT_GRAD])
        found: Floats = (numbers < self.entered[:, None])[:, :, None] * each_s[:, FORWARD]
        found += (numbers < self.left[:, None])[:, :, None] * back_s
        own_s = np.einsum("pvk,pvkn->pvn", self.own, each_s[self.stages])
        found[np.arange(len(found))[:, None], self.stages] += own_s
        return found


def row_paths(degrees: Degrees) -> RowPaths:
    """The paths of a shape's table."""
    d = degrees
    return _row_paths(d.schedule, d.pp, d.chunks, d.num_micro_batches)


@lru_cache(maxsize=REMEMBERED)
def _row_paths(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int) -> RowPaths:
    import numpy as np

    degrees = Degrees(pp=pp, schedule=schedule, chunks=chunks, num_micro_batches=num_micro_batches)
    table = build_table(schedule, pp, chunks, num_micro_batches)
    rank_of = [degrees.pp_rank_of_stage(s) for s in range(degrees.stages)]
    hops = np.concatenate([[0], np.cumsum(np.diff(rank_of) != 0)])
    whole = _whole(table)
    each = [_of_row(table, rank, hops, whole) for rank in range(pp)]
    return RowPaths(*(np.concatenate(parts) for parts in zip(*each, strict=True)))


def _whole(table: Table) -> Ints:
    """Whether the pass back of a stage and micro-batch is a whole one [stage, micro-batch]."""
    import numpy as np

    found = np.zeros((table.stages * len(KINDS), table.num_micro_batches), dtype=bool)
    for row in table.codes:
        found.ravel()[row] = True
    whole: Ints = found.reshape(table.stages, len(KINDS), -1)[:, BACKWARD]
    return whole


def _of_row(table: Table, rank: int, hops: Ints, whole: Ints) -> tuple[Ints, ...]:
    """The paths along one row: the fields of RowPaths."""
    import numpy as np

    row, stages = table.codes[rank], np.asarray(table.stages_of(rank))
    cells, micro_batches = np.divmod(row, table.num_micro_batches)
    stage, kind = np.divmod(cells, len(KINDS))
    own, v = stage == stages[:, None], len(stages)
    forward, back = (np.isin(kind, kinds) for kinds in ((FORWARD, PAIRED), (BACKWARD, INPUT_GRAD)))
    first = (own & forward).argmax(axis=1)
    final = np.append(len(row) - 1 - (own & back)[:, ::-1].argmax(axis=1), len(row) - 1)
    breaks = np.asarray(sorted({0, *first.tolist(), *(final + 1).tolist()}))
    number = np.searchsorted(stages, stage) * len(KINDS) + kind
    parts = np.searchsorted(breaks, np.arange(len(row)), side="right")
    size = v * len(KINDS)
    counts = np.bincount(parts * size + number, minlength=(len(breaks) + 1) * size).reshape(-1, size)
    before = np.cumsum(counts, axis=0)  # [n]: up to break n
    starts, ends = (np.searchsorted(breaks, each) for each in (first, final + 1))
    entries, exits = (each.ravel() for each in np.indices((v, v + 1)))
    kept = final[exits] >= first[entries]
    entries, exits = entries[kept], exits[kept]
    left = np.append(stages, 0)[exits]
    at_end = exits == v
    return (
        np.full(len(entries), rank),
        np.repeat(stages[None], len(entries), axis=0),
        (before[ends[exits]] - before[starts[entries]]).reshape(-1, v, len(KINDS)),
        stages[entries],
        left,
        whole.T[micro_batches[final[exits]]],
        np.where(at_end, rank, 0),
        hops[stages[entries]] + np.where(at_end, 0, hops[left]),
    )

"""A linear programme that grows: the least T of some variables under rows that are added as they matter.

Paths that run along one row of a table, entered through the stages before and left through them again.

A row is entered at the first forward of one of its stages, after a forward of every stage before; it is left
behind the last pass back of one of them, before a pass back of every stage before, or followed to its end.
Of an interleaved table with even stages one of them is the longest path.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from planner.model.sublayer import Recompute
from planner.search.bounds.rank_bounds import RankParts
from planner.search.programme.stage_options import RecipeBook, option_passes
from planner.search.programme.stages import Sizes, StageSpace
from planner.strategy.schedule.schedules import build_table
from planner.strategy.schedule.table import BACKWARD, FORWARD, INPUT_GRAD, KINDS, PAIRED, Table
from planner.strategy.strategy import Degrees, Schedule, Zero

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


class PathRows(NamedTuple):
    """Paths along rows: seconds by block [path, stage x kind] and besides [path], and whose row."""

    each: Floats
    fixed: Floats
    ranks: Ints

    def longest(self, x: Floats, than_s: float) -> list[int]:
        """Of each rank the path that is longest for some blocks, if it takes more than a time."""
        import numpy as np

        lengths = self.each @ x + self.fixed
        order = np.lexsort((-lengths, self.ranks))
        order = order[np.diff(self.ranks[order], prepend=-1) > 0]
        return [number for number in order.tolist() if lengths[number] > than_s]


class MemoryRows(NamedTuple):
    """What a block holds of what all of a rank may [rank, moment, place, kind], a place being one of the
    rank's `stages` [rank, place]."""

    shares: Floats
    stages: Ints

    def fullest(self, x: Floats, than: float) -> list[tuple[int, int]]:
        """Of each rank the moment that is fullest for some blocks, if it is more than a share."""
        import numpy as np

        held = np.einsum("rmpo,rpo->rm", self.shares, x.reshape(-1, self.shares.shape[-1])[self.stages])
        fullest = held.argmax(axis=1)
        ranks = (held[np.arange(len(held)), fullest] > than).nonzero()[0]
        return list(zip(ranks.tolist(), fullest[ranks].tolist(), strict=True))

    def rows(self, chosen: list[tuple[int, int]]) -> Floats:
        """Some ranks and moments as rows [row, stage x kind]."""
        import numpy as np

        ranks, _, places, options = self.shares.shape
        rows = np.zeros((len(chosen), ranks * places, options))
        for row, (rank, moment) in zip(rows, chosen, strict=True):
            row[self.stages[rank]] = self.shares[rank, moment]
        return rows.reshape(len(chosen), ranks * places * options)


def _figures(book: RecipeBook, options: tuple[Recompute, ...]) -> tuple[Floats, Floats]:
    """What a stage takes at least for each of its blocks [figure, kind] and besides [figure]: its actions by
    kind, its gathering, its reduction. A block's kind is its class and option."""
    import numpy as np

    shape, zero = book.shape, book.shape.degrees.zero
    shown = shape.constants.dp_exposed if shape.overlaps else 1.0
    gathers, reduces = zero in (Zero.OPTIMIZER, Zero.GRADIENTS), zero in (Zero.NONE, Zero.OPTIMIZER)
    once = np.asarray(
        [
            (shape.once_s(shape.updates[unit]) * gathers, shape.once_s(shape.reduces[unit]) * reduces)
            for unit in (shape.block_units[key] for key in shape.classes)
        ]
    ).T  # [figure, class]
    passes = np.concatenate([option_passes(shape, key, options) for key in shape.classes]).T
    block_s = np.concatenate([passes, shown * np.repeat(once, len(options), axis=1)])
    return block_s, np.concatenate([book.least_passes.action, (1 - shown) * once.min(axis=1)])


class RelaxationRows:
    """The data of the programme of one shape: seconds and bytes of a block by stage and kind."""

    def __init__(self, space: StageSpace, parts: RankParts) -> None:
        self.space, self.parts = space, parts
        self.table, self.hop_s = space.table, space.hop_s
        self.options, self.classes = space.books[0].options, list(space.shape.classes)

    @cached_property
    def figures(self) -> tuple[Floats, Floats]:
        """What stages take at least for each block [stage, figure, kind], and besides [stage, figure]: their
        actions by kind, their gathering, their reduction."""
        import numpy as np

        space = self.space
        books = {id(book): book for book in space.books}
        known = {name: _figures(book, self.options) for name, book in books.items()}
        each = [known[id(space.books[rank])] for rank in space.rank_of]
        block_s, fixed_s = np.stack([own for own, _ in each]), np.stack([own for _, own in each])
        for stage, first in ((0, 0), (-1, space.layers - 1)):
            book = space.books[space.rank_of[stage]]
            least, key = book.least_passes, space.shape.layer_model.keys[first]
            ends = least.stage_s(first, first + 1) - least.action
            own = option_passes(book.shape, key, self.options).min(axis=0)
            fixed_s[stage, : len(KINDS)] += ends - own
        return block_s, fixed_s

    @property
    def block_s(self) -> Floats:
        return self.figures[0]

    @property
    def fixed_s(self) -> Floats:
        return self.figures[1]

    @cached_property
    def paths(self) -> PathRows:
        """The seconds of the paths along rows."""
        return self.seconds_of(row_paths(self.space.degrees))

    def seconds_of(self, paths: RowPaths) -> PathRows:
        import numpy as np

        kinds = len(KINDS)
        block_s = paths.seconds(self.block_s[:, :kinds])
        fixed_s = paths.seconds(self.fixed_s[:, :kinds, None]).sum(axis=(1, 2)) + paths.hops * self.hop_s
        rank_of, numbers = np.asarray(self.space.rank_of), np.arange(len(paths.last))
        for figure, ranks in ((kinds, np.zeros_like(numbers)), (kinds + 1, paths.last)):
            there = rank_of == ranks[:, None]
            block_s += there[:, :, None] * self.block_s[:, figure]
            fixed_s += there @ self.fixed_s[:, figure]
        return PathRows(block_s.reshape(len(numbers), -1), fixed_s, paths.ranks)

    def sums(self, sizes: Sizes, counts: Ints | None) -> tuple[Floats, Floats, Floats]:
        """Sums of blocks [row, stage x kind] and what they are at least and at most [row]: of stages, ranks,
        classes, or the `counts` [stage, class] of each stage."""
        import numpy as np

        space, stages, classes = self.space, len(sizes.stages), len(self.classes)
        if counts is None:
            ranks = np.asarray(space.rank_of) == np.arange(space.degrees.pp)[:, None]
            of_stages = np.repeat(np.concatenate([np.eye(stages), ranks]), classes, axis=1)
            sums = np.concatenate([of_stages, np.tile(np.eye(classes), stages)])
            totals = [(n, n) for n in (space.shape.count(key, 0, space.layers) for key in self.classes)]
            limits = np.asarray([*sizes.stages, *sizes.ranks, *totals], dtype=np.float64)
        else:
            sums = np.eye(stages * classes)
            limits = np.repeat(counts.reshape(-1, 1), 2, axis=1).astype(np.float64)
        return np.repeat(sums, len(self.options), axis=1), *limits.T

    def memory(self, sizes: Sizes) -> MemoryRows:
        """What blocks hold within sizes."""
        import numpy as np

        held, free = self.parts.rows(sizes.stages)
        shares = np.moveaxis(held / np.maximum(free, 1.0)[..., None, None], 0, 1)
        ranks, _, _, *places = shares.shape
        return MemoryRows(shares.reshape(ranks, -1, *places), np.asarray(self.space.stages_of))

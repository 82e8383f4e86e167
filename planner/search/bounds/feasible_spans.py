"""Cuts of a model of several layer classes into stages, one a rank, that may keep a step time.

Which path is longest through a table depends on all stages, but every stage lies on paths that go through the
others once or twice, whatever their number of layers: with f and b the passes of the stages before and after
stage r,

    in     sum_{j<r} f_j, then its row from the first forward on
    down   sum_j f_j + sum_{j>r} b_j, then its row from the first pass back on
    end    its row to the end
    out    its row to the last pass back, then sum_{j<r} b_j and what rank 0 still does
    round  its row to the last forward, then sum_{j>r} f_j + sum_j b_j and what rank 0 still does

A way in and a way out make a path. The stages before a layer take no less than their fastest chain of spans
that ends there, and those after it likewise. So the spans of a stage that are in time follow from where it
begins and ends alone: first with the cheapest options, then with the recomputation that its memory asks
for if blocks recompute in parts, then with recipes, until no chain of those that are left gets slower. That
some stage holds more layers than the mean, which relaxations do not see, is seen here.

Spans are arrays over [stage, first, end], counted among the layers near a boundary of the even split.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.search.programme.stage_options import option_passes
from planner.search.programme.stages import Spans
from planner.strategy.schedule.table import BACKWARD, FORWARD, INPUT_GRAD, KINDS, PAIRED, Table

if TYPE_CHECKING:
    from planner.foundation.arrays import Bools, Floats, Ints
    from planner.search.bounds.rank_bounds import RankParts
    from planner.search.programme.stages import StageSpace


class _StagePaths(NamedTuple):
    """The paths through each rank's row, one of them again where a rank has fewer: its actions by kind
    [stage, path, kind], how often it goes forward and back through the stages before and after [stage, path,
    2], its messages, and whether it ends as rank 0 does [stage, path]."""

    own: Ints
    before: Ints
    after: Ints
    hops: Ints
    tail: Ints


@lru_cache(maxsize=256)
def _stage_paths(table: Table) -> _StagePaths:
    """The paths of every rank, each with one stage."""
    import numpy as np

    each = [_paths_of(table, rank) for rank in range(len(table))]
    most = max(map(len, each))
    padded = [paths + paths[:1] * (most - len(paths)) for paths in each]
    fields = zip(*(zip(*paths, strict=True) for paths in padded), strict=True)
    return _StagePaths(*(np.asarray(field) for field in fields))


def _paths_of(table: Table, rank: int) -> list[tuple[Any, ...]]:
    """The paths of one rank: the fields of _StagePaths."""
    import numpy as np

    kinds, later = _row_kinds(table, rank), len(table) - 1 - rank
    forwards, backs = _places(kinds, FORWARD, PAIRED), _places(kinds, BACKWARD, INPUT_GRAD)
    last_forward, first_back, last_back = forwards[-1], backs[0], backs[-1]
    forth, back = np.eye(len(KINDS), dtype=np.int64)[[0, kinds[first_back]]]
    ways_in = (  # where it begins in the row, its actions besides, through stages before, after, messages
        (0, 0 * forth, (1, 0), (0, 0), rank),
        (first_back, forth, (1, 0), (1, 1), rank + 2 * later),
    )
    ways_out = (
        (len(kinds), 0 * back, (0, 0), (0, 0), 0),
        (last_back + 1, 0 * back, (0, 1), (0, 0), rank),
        (last_forward + 1, back, (0, 1), (1, 1), rank + 2 * later),
    )
    return [
        (
            np.bincount(kinds[begin:end], minlength=len(KINDS)) + more + still,
            np.add(before, before_out),
            np.add(after, after_out),
            hops + hops_out,
            before_out[1],
        )
        for begin, more, before, after, hops in ways_in
        for end, still, before_out, after_out, hops_out in ways_out
        if begin < end
    ]


def _row_kinds(table: Table, rank: int) -> Ints:
    """The kinds of a rank's actions by number."""
    kinds: Ints = table.codes[rank] // table.num_micro_batches % len(KINDS)
    return kinds


def _places(kinds: Ints, *of: int) -> list[int]:
    """Where a row has actions of some kinds."""
    import numpy as np

    found: list[int] = np.nonzero(np.isin(kinds, of))[0].tolist()
    return found


class _Held(NamedTuple):
    """Which spans stages may hold [stage, first, end], and the seconds of their actions [stage, kind, first,
    end]."""

    there: Bools
    seconds: Floats


class Cuts:
    """The cuts of one shape near its even one."""

    def __init__(self, space: StageSpace, parts: RankParts) -> None:
        import numpy as np

        self.space, self.parts = space, parts
        self.stages, self.table = len(space.table), space.table
        most = max(map(len, space.near))
        layers = [[*near] + [near[-1]] * (most - len(near)) for near in space.near]
        self.firsts, self.ends = np.asarray(layers[:-1]), np.asarray(layers[1:])
        counts, places = np.asarray([len(near) for near in space.near]), np.arange(most)
        begins, ends = (places < own[:, None] for own in (counts[:-1], counts[1:]))
        longer = self.ends[:, None, :] > self.firsts[:, :, None]
        self._every = begins[:, :, None] & ends[:, None, :] & longer
        books = {id(book): book for book in space.books}
        numbers = {name: number for number, name in enumerate(books)}
        self._book = np.asarray([numbers[id(book)] for book in space.books])
        self._own = [book.least_passes for book in books.values()]
        back = INPUT_GRAD if space.degrees.schedule.splits_every_backward else BACKWARD
        self._kinds = [FORWARD, back]
        sums, action = (np.min(parts, axis=0)[self._kinds] for parts in zip(*self._own, strict=True))
        stages = np.arange(self.stages)[:, None, None]
        self._before_s = stages * action[:, None] + np.moveaxis(sums[:, self.firsts], 0, 1)
        later = (self.stages - 1 - stages) * action[:, None]
        self._after_s = later + sums[:, -1:] - np.moveaxis(sums[:, self.ends], 0, 1)
        paths = self._paths = _stage_paths(self.table)
        hop_s, tail_s = space.shape.messages.p2p_s(), self._tail_s()
        self._besides_s = paths.hops * hop_s + paths.tail * tail_s
        self._known: dict[float, list[Spans] | None] = {}

    def within(self, to_beat_s: float) -> list[Spans] | None:
        """Of each stage the spans that lie in a cut which may take less; None where there is none."""
        if to_beat_s not in self._known:
            self._known[to_beat_s] = self._within(to_beat_s)
        return self._known[to_beat_s]

    def _within(self, to_beat_s: float) -> list[Spans] | None:
        import numpy as np

        within_s = self.space.within_s(to_beat_s)
        least = self._least()
        there = _joined(self._in_time(_Held(self._every, least), within_s))
        if there is None:
            return None
        again_s = self._again_s()
        fits = np.all(np.isfinite(again_s), axis=1, keepdims=True)
        in_parts = _Held(there & fits[:, 0], least + np.where(fits, again_s, 0.0))
        there = _joined(self._in_time(in_parts, within_s))
        found = there is not None and self._with_recipes(_Held(there, least.copy()), within_s)
        while found:
            left = _joined(self._around(found, within_s))
            if left is None:
                return None
            if np.array_equal(left, found.there):
                return [self._spans(stage, left[stage]) for stage in range(self.stages)]
            found = found._replace(there=left)
        return None

    def _least(self) -> Floats:
        """What actions of all spans take at least."""
        import numpy as np

        each = []
        for own in self._own:
            behind, before = (own.sums[:, layers] for layers in (self.ends, self.firsts))
            each.append(behind[:, :, None, :] - before[:, :, :, None] + own.action[:, None, None, None])
        least: Floats = np.stack(each)[self._book, :, np.arange(self.stages)]
        return least

    def _again_s(self) -> Floats:
        """What actions take more at least where blocks recompute in parts
        (planner.search.bounds.rank_bounds) [stage, kind, first, end]; infinite where blocks cannot fit."""
        import numpy as np

        space, room = self.space, self.parts.room
        if room is None:
            return np.zeros((self.stages, len(KINDS), 1, 1))
        classes, options = list(space.shape.classes), space.books[0].options
        among = np.eye(len(classes))[[classes.index(key) for key in space.shape.layer_model.keys]]
        upto = np.pad(np.cumsum(among.T, axis=1), ((0, 0), (1, 0)))  # blocks of each class before each layer
        counts = upto[:, self.ends][:, :, None, :] - upto[:, self.firsts][:, :, :, None]
        held = room.held[:, :, 0].reshape(*room.held.shape[:2], len(classes), len(options))
        shapes = {id(book): book.shape for book in space.books}.values()
        known = [[option_passes(shape, key, options) for key in classes] for shape in shapes]
        passes = np.asarray(known)[self._book]  # [stage, class, option, kind]
        more = passes - passes.min(axis=2, keepdims=True)
        fits = np.einsum("smc,csij->smij", held.min(axis=-1), counts) <= room.free[:, :, None, None]
        found = np.zeros((self.stages, len(KINDS), *counts.shape[2:]))
        for kind in range(len(KINDS)):
            quick = np.where(more[:, None, :, :, kind] > 0, np.inf, held).min(axis=-1)
            freed = quick[..., None] - held
            with np.errstate(divide="ignore", invalid="ignore"):
                each_s = np.where(freed > 0, more[:, None, :, :, kind] / freed, np.inf).min(axis=(2, 3))
            each_s[~np.isfinite(each_s)] = 0.0
            over = np.einsum("smc,csij->smij", quick, counts) - room.free[:, :, None, None]
            found[:, kind] = (np.maximum(over, 0.0) * each_s[:, :, None, None]).max(axis=1)
        return np.where(fits.all(axis=1)[:, None], found, np.inf)

    def _in_time(
        self, held: _Held, within_s: float, before: Floats | None = None, after: Floats | None = None
    ) -> Bools:
        """Which spans are in time, but for gathering, reduction and updates; `before` and `after` [stage, 2,
        n] are what all stages there take for a forward, and a pass back."""
        import numpy as np

        before = self._before_s if before is None else before
        after = self._after_s if after is None else after
        paths = self._paths
        own_s = np.einsum("spk,skij->spij", paths.own, np.where(held.there[:, None], held.seconds, 0.0))
        around_s = np.einsum("spd,sdi->spi", paths.before, before)[:, :, :, None]
        around_s = around_s + np.einsum("spd,sdj->spj", paths.after, after)[:, :, None, :]
        worst_s = (own_s + around_s + self._besides_s[:, :, None, None]).max(axis=1)
        in_time: Bools = held.there & (worst_s < within_s)
        return in_time

    def _with_recipes(self, held: _Held, within_s: float) -> _Held | None:
        """Those that are in time with their own recipes, stage after stage where one before it ends."""
        import numpy as np

        there, reached = np.zeros_like(held.there), held.there[0].any(axis=1)
        for stage in range(self.stages):
            there[stage] = held.there[stage] & reached[:, None]
            self._put_recipes(stage, there[stage], held.seconds[stage])
            there[stage] = self._in_time(held._replace(there=there), within_s)[stage]
            reached = there[stage].any(axis=0)
            if not reached.any():
                return None
        left = _joined(there)
        return None if left is None else held._replace(there=left)

    def _put_recipes(self, stage: int, there: Bools, seconds: Floats) -> None:
        """Puts in what the recipes of spans take; those that have none are there no more. Spans alike between
        the same ends have the same."""
        import numpy as np

        book, known = self.space.books[stage], dict[tuple[int, int], tuple[float, ...] | None]()
        for i, j in np.argwhere(there).tolist():
            span = int(self.firsts[stage, i]), int(self.ends[stage, j])
            like = book.blocks(*span)
            if like not in known:
                column = self.space.recipe(stage, span)
                known[like] = None if column is None else column.passes_s
            passes_s = known[like]
            if passes_s is None:
                there[i, j] = False
            else:
                seconds[:, i, j] = passes_s

    def _around(self, held: _Held, within_s: float) -> Bools:
        """Those that are in time with the fastest chains of spans before and after them."""
        import numpy as np

        each_s = np.where(held.there[:, None], held.seconds[:, self._kinds], np.inf)
        each_s[:, 1] += each_s[:, 0]  # forward, and both
        before = _chained(each_s)
        after = _chained(np.swapaxes(each_s, 2, 3)[::-1])[::-1]
        for chains in (before, after):
            chains[~np.isfinite(chains)] = 0.0  # no span of those that are left begins or ends there
            chains[:, 1] -= chains[:, 0]
        return self._in_time(held, within_s, before, after)

    def _spans(self, stage: int, there: Bools) -> Spans:
        """The spans of a stage by their first layers."""
        rows = (
            [(int(first), int(end)) for end in self.ends[stage][own]]
            for first, own in zip(self.firsts[stage], there, strict=True)
        )
        return [row for row in rows if row]

    def _tail_s(self) -> float:
        """What rank 0 does at least behind its last pass back."""
        import numpy as np

        kinds, own = _row_kinds(self.table, 0), self._own[self._book[0]]
        last = _places(kinds, BACKWARD, INPUT_GRAD)[-1]
        counts = np.bincount(kinds[last + 1 :], minlength=len(KINDS))
        return float(counts @ own.stage_s(0, self.space.near[1][0]))


def _chained(each_s: Floats) -> Floats:
    """Of each stage the least of chains that come before it [stage, 2, n], by where they end."""
    import numpy as np

    found = np.full(each_s.shape[:3], np.inf)
    found[0, :, 0] = 0.0
    for stage, own_s in enumerate(each_s[:-1]):
        found[stage + 1] = (found[stage][:, :, None] + own_s).min(axis=1)
    return found


def _joined(there: Bools) -> Bools | None:
    """The spans that lie in whole cuts; None where there are none."""
    left, reached = there.copy(), there[0].any(axis=1)
    for own in left:
        own &= reached[:, None]
        reached = own.any(axis=0)
    for own in left[::-1]:
        own &= reached
        reached = own.any(axis=1)
    return left if left[0].any() else None

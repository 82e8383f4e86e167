"""Cuts of a model of several layer classes into stages, one a rank, that may keep a step time.

Which path is longest through a table depends on all stages, but every stage lies on paths that the cut alone
decides but for its own recipe: with f and b the passes of the stages before and after stage r,

    in     sum_{j<r} f_j, then its row from the first forward on
    down   sum_j f_j + sum_{j>r} b_j, then its row from the first pass back on
    end    its row to the end
    out    its row to the last pass back, then sum_{j<r} b_j and what rank 0 still does
    round  its row to the last forward, then sum_{j>r} f_j + sum_j b_j and what rank 0 still does

A way in and a way out make a path. Layers before and after count with their cheapest options, and what they
take together depends on where the stage begins and ends alone. So the spans of a stage that are in time follow
for themselves, and those that lie in a whole cut by going through the stages once forth and once back. That
some stage holds more layers than the mean, which relaxations do not see, is seen here.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.passes import Pass
from planner.cost.stage import ShapeModel
from planner.cost.table import BACKWARD, INPUT_GRAD, KINDS, PAIRED, WEIGHT_GRAD, Table
from planner.search.recipes import Column, RecipeBook
from planner.strategy import Recompute

if TYPE_CHECKING:
    import numpy as np

    from planner.search.stage_space import StageSpace

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

Span = tuple[int, int]
Spans = list[list[Span]]
"""Blocks [first, end) that a stage may hold: for each first layer, ends in ascending order."""


class _RowPath(NamedTuple):
    """A path through one rank's row: its actions there by kind, how often it passes forward and back through
    the stages before and after, its messages, and whether what rank 0 does last is on it."""

    own: Ints
    before: tuple[int, int]
    after: tuple[int, int]
    hops: int
    tail: bool


def _row_paths(table: Table, rank: int) -> list[_RowPath]:
    """The paths of a rank that holds one stage."""
    import numpy as np

    kinds, last = _row_kinds(table, rank), len(table) - 1 - rank
    forwards, backs = np.nonzero(kinds == 0)[0], np.nonzero((kinds == BACKWARD) | (kinds == INPUT_GRAD))[0]
    back = int(kinds[backs[0]])
    ways_in = (
        (0, np.zeros(4, dtype=np.int64), (1, 0), (0, 0), rank),
        (int(backs[0]), _one(0), (1, 0), (1, 1), rank + 2 * last),
    )
    ways_out = (
        (len(kinds), np.zeros(4, dtype=np.int64), (0, 0), (0, 0), 0),
        (int(backs[-1]) + 1, np.zeros(4, dtype=np.int64), (0, 1), (0, 0), rank),
        (int(forwards[-1]) + 1, _one(back), (0, 1), (1, 1), rank + 2 * last),
    )
    return [
        _RowPath(
            np.bincount(kinds[begin:end], minlength=4) + more + still,
            (before[0] + then[0], before[1] + then[1]),
            (after[0] + beyond[0], after[1] + beyond[1]),
            hops + hops_out,
            then[1] > 0,
        )
        for begin, more, before, after, hops in ways_in
        for end, still, then, beyond, hops_out in ways_out
        if begin < end
    ]


def _row_kinds(table: Table, rank: int) -> Ints:
    """The kinds of a rank's actions by number; a paired forward is one."""
    kinds = table.codes[rank] // table.num_micro_batches % len(KINDS)
    return kinds * (kinds != PAIRED)


def _one(kind: int) -> Ints:
    import numpy as np

    return (np.arange(4) == kind).astype(np.int64)


def _least_parts_s(shape: ShapeModel, key: str, options: tuple[Recompute, ...]) -> list[float]:
    """A block's F, B, I and W (planner.cost.simulate.split_backward), each with the option that takes least;
    of I and W that torch divides, for a whole stage, no more than they take there."""
    each = []
    for option in options:
        forward, backward = shape.passes(key, option)
        if shape.problem.stack.recomputes_once:
            products_s = shape.deferrable_s[key]
            left_s = products_s * (option is Recompute.NONE)
        else:
            frozen = shape.problem.workload.adapters is not None
            left_s = 0.0 if frozen else backward.compute_s / 2
            products_s = min(left_s, forward.compute_s)
        each.append(_parts_s(forward, backward, left_s, products_s))
    return [min(seconds) for seconds in zip(*each, strict=True)]


def _parts_s(forward: Pass, backward: Pass, left_s: float, products_s: float) -> tuple[float, ...]:
    """F, B, I and W where `left_s` of the backward is not in I, and `products_s` are in W."""
    half_s = backward.host_s / 2
    return forward.total_s, backward.total_s, backward.total_s - left_s - half_s, products_s + half_s


class _Layers(NamedTuple):
    """Least seconds by kind [kind, layers]: of all layers before each, and of an action besides."""

    sums: Floats
    action: Floats


def _layers(book: RecipeBook) -> _Layers:
    """The least seconds of a book's layers; embedding and head lie with the first and the last."""
    import numpy as np

    shape, keys = book.shape, book.shape.layer_model.keys
    known = {key: _least_parts_s(shape, key, book.options) for key in shape.classes}
    each = np.asarray([known[key] for key in keys]).T
    for place, (forward, backward) in ((0, shape.embedding_passes), (-1, shape.head_passes)):
        left_s = 0.0 if shape.problem.stack.recomputes_once else backward.compute_s / 2
        each[:, place] += _parts_s(forward, backward, left_s, 0.0)
    sums = np.concatenate([np.zeros((4, 1)), np.cumsum(each, axis=1)], axis=1)
    return _Layers(sums, np.asarray(_parts_s(shape.action, shape.action, 0.0, 0.0)))


class Cuts:
    """The cuts of one shape near its even one."""

    def __init__(self, space: StageSpace) -> None:
        import numpy as np

        self.space, self.table = space, space.table
        self.hop_s = space.shape.messages.p2p_s()
        books = {id(book): book for book in space.books}
        known = {key: _layers(book) for key, book in books.items()}
        self._own = [known[id(book)] for book in space.books]
        self._least = _Layers(
            np.min([each.sums for each in known.values()], axis=0),
            np.min([each.action for each in known.values()], axis=0),
        )
        self._back = INPUT_GRAD if space.degrees.schedule.splits_every_backward else BACKWARD
        self._paths = [_row_paths(self.table, rank) for rank in range(len(self.table))]
        self._counts = [np.stack([path.own for path in each]) for each in self._paths]
        self._settled = False
        self._others = [self._others_s(stage) for stage in range(len(self.table))]

    def within(self, to_beat_s: float) -> list[Spans] | None:
        """Of each stage the spans that lie in a cut which may take less; None where there is no cut."""
        within_s = self.space.within_s(to_beat_s)
        quick = _joined(self._quick(within_s))
        return quick and self._with_recipes(quick, within_s)

    def _quick(self, within_s: float) -> list[set[Span]]:
        """The spans of each stage that are in time with the cheapest options."""
        import numpy as np

        found = []
        for stage, (own, others) in enumerate(zip(self._own, self._others, strict=True)):
            firsts, ends = self._places(stage)
            parts = (
                own.sums[:, None, ends] - own.sums[:, firsts, None] + own.action[:, None, None]
            )  # [kind, first, end]
            total_s = np.tensordot(self._counts[stage], parts, axes=1) + others
            rows, columns = np.nonzero((total_s.max(axis=0) < within_s) & (ends > firsts[:, None]))
            found.append(set(zip(firsts[rows].tolist(), ends[columns].tolist(), strict=True)))
        return found

    def _with_recipes(self, spans: list[Spans], within_s: float) -> list[Spans] | None:
        """Those that are in time with recipes: at first their own, then those of the stages around them."""
        found, reached = [], {0}
        for stage, each in enumerate(spans):
            known = self._recipes(stage, [row for row in each if row[0][0] in reached])
            kept = {span: seconds for span, seconds in known.items() if self._in_time(stage, span, seconds, within_s)}
            reached = {end for _, end in kept}
            found.append(kept)
            if not kept:
                return None
        joined = _joined([set(each) for each in found])
        while joined is not None:
            left = [{span: known[span] for row in each for span in row} for each, known in zip(joined, found, strict=True)]
            if list(map(len, left)) == list(map(len, found)) and found is not left and self._settled:
                return joined
            found = self._around(left, within_s)
            self._settled = list(map(len, left)) == list(map(len, found))
            joined = _joined([set(each) for each in found])
        return None

    def _around(self, found: list[dict[Span, Floats]], within_s: float) -> list[dict[Span, Floats]]:
        """Those that are in time where stages before and after have recipes too."""
        import numpy as np

        both = [{span: float(s[0] + s[self._back]) for span, s in each.items()} for each in found]
        forth = [{span: float(s[0]) for span, s in each.items()} for each in found]
        before, before_f, after = least_before(both), least_before(forth), least_after(both)
        kept = []
        for stage, each in enumerate(found):
            own = {}
            for span, seconds in each.items():
                total = 0.0
                for path in self._paths[stage]:
                    f, b = path.before
                    t = float(path.own @ seconds) + (before[stage][span[0]] if b else before_f[stage][span[0]])
                    t += path.after[0] * after[stage][span[1]] + path.hops * self.hop_s + path.tail * self._tail_s
                    total = max(total, t)
                if total < within_s:
                    own[span] = seconds
            kept.append(own)
        return kept

    def _recipes(self, stage: int, spans: Spans) -> dict[Span, Floats]:
        """Seconds by kind of recipes: longer spans than one without a recipe have none."""
        import numpy as np

        known = {}
        for row in spans:
            for span in row:
                column = self.space.recipe(stage, span)
                if column is None:
                    break
                known[span] = np.asarray(column.passes_s[:4])
        return known

    def _in_time(self, stage: int, span: Span, seconds: Floats, within_s: float) -> bool:
        firsts, ends = self._places(stage)
        others = self._others[stage][:, span[0] - firsts[0], span[1] - ends[0]]
        return float((self._counts[stage] @ seconds + others).max()) < within_s

    def _places(self, stage: int) -> tuple[Ints, Ints]:
        """Where a stage may begin and end."""
        import numpy as np

        return np.asarray(self.space.near(stage)), np.asarray(self.space.near(stage + 1))

    def _others_s(self, stage: int) -> Floats:
        """What the paths of a stage take besides its own actions: [path, first, end]."""
        import numpy as np

        firsts, ends = self._places(stage)
        sums, action = self._least
        kinds = [0, self._back]
        before = sums[kinds][:, firsts] + stage * action[kinds, None]
        after = sums[kinds][:, -1:] - sums[kinds][:, ends] + (len(self.table) - 1 - stage) * action[kinds, None]
        tail_s = self._tail_s
        each = []
        for path in self._paths[stage]:
            total = (np.asarray(path.before) @ before)[:, None] + np.asarray(path.after) @ after
            each.append(total + path.hops * self.hop_s + path.tail * tail_s)
        return np.stack(each)

    @property
    def _tail_s(self) -> float:
        """What rank 0 does at least behind its last pass back."""
        import numpy as np

        kinds = _row_kinds(self.table, 0)
        last = int(np.nonzero((kinds == BACKWARD) | (kinds == INPUT_GRAD))[0][-1])
        counts, own = np.bincount(kinds[last + 1 :], minlength=4), self._own[0]
        return float(counts @ (own.sums[:, self.space.near(1)[0]] + own.action))


def _joined(spans: list[set[Span]]) -> list[Spans] | None:
    """The spans that lie in whole cuts, in order; None where there are none."""
    forth, reached = [], {0}
    for each in spans:
        forth.append({span for span in each if span[0] in reached})
        reached = {end for _, end in forth[-1]}
    back: list[Spans] = []
    for kept in reversed(forth):
        joined = sorted(span for span in kept if span[1] in reached)
        reached = {first for first, _ in joined}
        back.append([list(row) for _, row in groupby(joined, key=itemgetter(0))])
    return back[::-1] if all(back) else None


def least_before(spans: list[dict[Span, float]]) -> list[dict[int, float]]:
    sums = [{0: 0.0}]
    for each in spans:
        after: dict[int, float] = {}
        for (first, end), seconds in each.items():
            total = sums[-1].get(first, float("inf")) + seconds
            if total < after.get(end, float("inf")):
                after[end] = total
        sums.append(after)
    return sums

def least_after(spans: list[dict[Span, float]]) -> list[dict[int, float]]:
    (last,) = {end for _, end in spans[-1]}
    sums = [{last: 0.0}]
    for each in reversed(spans):
        before: dict[int, float] = {}
        for (first, end), seconds in each.items():
            total = sums[-1].get(end, float("inf")) + seconds
            if total < before.get(first, float("inf")):
                before[first] = total
        sums.append(before)
    return sums[::-1][1:]

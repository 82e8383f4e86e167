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
begins and ends alone: first with the cheapest options, then with recipes, until no chain of those that
are left gets slower. That some stage holds more layers than the mean, which relaxations do not see, is seen
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.table import BACKWARD, FORWARD, INPUT_GRAD, KINDS, PAIRED, Table

if TYPE_CHECKING:
    import numpy as np

    from planner.search.stage_space import StageSpace

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

Spans = list[list[tuple[int, int]]]
"""Blocks [first, end) that a stage may hold: for each first layer, ends in ascending order."""


class _StagePaths(NamedTuple):
    """The paths through one rank's row: its actions by kind [path, kind], how often it goes forward and back
    through the stages before and after [path, 2], its messages, and whether it ends as rank 0 does."""

    own: Ints
    before: Ints
    after: Ints
    hops: Ints
    tail: Ints


class _Held(NamedTuple):
    """Spans that a stage may hold, by first layers and ends, and the seconds of its actions [n, kind]."""

    firsts: Ints
    ends: Ints
    seconds: Floats

    def only(self, kept: Any) -> _Held:
        """Some of them."""
        return _Held(self.firsts[kept], self.ends[kept], self.seconds[kept])


@lru_cache(maxsize=256)
def _stage_paths(table: Table) -> tuple[_StagePaths, ...]:
    """The paths of every rank, each with one stage."""
    import numpy as np

    found = []
    for rank in range(len(table)):
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
        each = [
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
        found.append(_StagePaths(*map(np.asarray, zip(*each, strict=True))))
    return tuple(found)


def _row_kinds(table: Table, rank: int) -> Ints:
    """The kinds of a rank's actions by number."""
    kinds: Ints = table.codes[rank] // table.num_micro_batches % len(KINDS)
    return kinds


def _places(kinds: Ints, *of: int) -> list[int]:
    """Where a row has actions of some kinds."""
    import numpy as np

    found: list[int] = np.nonzero(np.isin(kinds, of))[0].tolist()
    return found


class Cuts:
    """The cuts of one shape near its even one."""

    def __init__(self, space: StageSpace) -> None:
        import numpy as np

        self.space, self.stages, self.table = space, len(space.table), space.table
        self.near = [np.asarray(layers) for layers in space.near]
        self._own = [book.least_passes for book in space.books]
        each = {id(book): book.least_passes for book in space.books}.values()
        back = INPUT_GRAD if space.degrees.schedule.splits_every_backward else BACKWARD
        self._kinds = [FORWARD, back]
        sums, action = (np.min(parts, axis=0)[self._kinds] for parts in zip(*each, strict=True))
        stages = np.arange(self.stages + 1)[:, None, None]
        self._before_s = stages * action[:, None] + sums
        self._after_s = (self.stages - stages) * action[:, None] + sums[:, -1:] - sums
        paths = self._paths = _stage_paths(self.table)
        hop_s, tail_s = space.shape.messages.p2p_s(), self._tail_s()
        self._besides_s = [each.hops * hop_s + each.tail * tail_s for each in paths]
        self._known: dict[float, list[Spans] | None] = {}

    def within(self, to_beat_s: float) -> list[Spans] | None:
        """Of each stage the spans that lie in a cut which may take less; None where there is none."""
        if to_beat_s not in self._known:
            self._known[to_beat_s] = self._within(to_beat_s)
        return self._known[to_beat_s]

    def _within(self, to_beat_s: float) -> list[Spans] | None:
        within_s = self.space.within_s(to_beat_s)
        found = _joined([self._quick(stage, within_s) for stage in range(self.stages)])
        found = found and self._with_recipes(found, within_s)
        while found is not None:
            left = self._around(found, within_s)
            if all(len(a.ends) == len(b.ends) for a, b in zip(left, found, strict=True)):
                return [_spans(each) for each in found]
            found = _joined(left)
        return None

    def _quick(self, stage: int, within_s: float) -> _Held:
        """The spans of a stage that are in time with the cheapest options."""
        import numpy as np

        own = self._own[stage]
        firsts, ends = (each.ravel() for each in np.meshgrid(*self.near[stage : stage + 2], indexing="ij"))
        firsts, ends = firsts[ends > firsts], ends[ends > firsts]
        held = _Held(firsts, ends, own.stage_s(firsts, ends).T)
        before, after = self._before_s[stage][:, firsts], self._after_s[stage + 1][:, ends]
        return held.only(self._least_s(stage, held, before, after) < within_s)

    def _least_s(self, stage: int, held: _Held, before: Floats, after: Floats) -> Floats:
        """What a step takes at least with each span, but for gathering, reduction and updates; `before` and
        `after` [2, n] are what all stages there take for a forward, and a pass back."""
        paths = self._paths[stage]
        total_s = paths.own @ held.seconds.T + paths.before @ before + paths.after @ after
        worst_s: Floats = (total_s + self._besides_s[stage][:, None]).max(axis=0)
        return worst_s

    def _with_recipes(self, found: list[_Held], within_s: float) -> list[_Held] | None:
        """Those that are in time with their own recipes, stage after stage where one before it ends."""
        import numpy as np

        kept, reached = [], np.asarray([0])
        for stage, each in enumerate(found):
            held = self._recipes(stage, each.only(_among(each.firsts, reached)))
            before, after = self._before_s[stage][:, held.firsts], self._after_s[stage + 1][:, held.ends]
            kept.append(held.only(self._least_s(stage, held, before, after) < within_s))
            reached = kept[-1].ends
            if not len(reached):
                return None
        return _joined(kept)

    def _recipes(self, stage: int, held: _Held) -> _Held:
        """Spans that have a recipe, with what it takes; of several between the same ends it is the same."""
        import numpy as np

        book, known = self.space.books[stage], dict[tuple[int, int], tuple[float, ...] | None]()
        each = []
        for span in zip(held.firsts.tolist(), held.ends.tolist(), strict=True):
            like = book.blocks(*span)
            if like not in known:
                column = self.space.recipe(stage, span)
                known[like] = None if column is None else column.passes_s
            each.append(known[like])
        kept = [number for number, seconds in enumerate(each) if seconds is not None]
        seconds = np.asarray([each[number] for number in kept], dtype=np.float64).reshape(-1, len(KINDS))
        return _Held(held.firsts[kept], held.ends[kept], seconds)

    def _around(self, found: list[_Held], within_s: float) -> list[_Held]:
        """Those that are in time with the fastest chains of spans before and after them."""
        each_s = [held.seconds[:, self._kinds] @ [[1, 1], [0, 1]] for held in found]  # forward, and both
        begins, ends = ([getattr(held, name) for held in found] for name in ("firsts", "ends"))
        before = _chained(begins, ends, each_s, 0, self.space.layers)
        after = _chained(ends[::-1], begins[::-1], each_s[::-1], self.space.layers, self.space.layers)[::-1]
        kept = []
        for stage, held in enumerate(found):
            around = (_parts(before[stage][:, held.firsts]), _parts(after[stage][:, held.ends]))
            kept.append(held.only(self._least_s(stage, held, *around) < within_s))
        return kept

    def _tail_s(self) -> float:
        """What rank 0 does at least behind its last pass back."""
        import numpy as np

        kinds, own = _row_kinds(self.table, 0), self._own[0]
        last = _places(kinds, BACKWARD, INPUT_GRAD)[-1]
        counts = np.bincount(kinds[last + 1 :], minlength=len(KINDS))
        return float(counts @ own.stage_s(0, self.near[1][0]))


def _parts(sums: Floats) -> Floats:
    """A forward and a pass back [2, n] of least forwards and least sums of both."""
    import numpy as np

    return np.stack([sums[0], sums[1] - sums[0]])


def _chained(
    begins: Sequence[Ints], ends: Sequence[Ints], each_s: Sequence[Floats], start: int, layers: int
) -> list[Floats]:
    """Of each stage the least of chains that come before it [2, layers + 1], by where they end."""
    import numpy as np

    least = np.full((2, layers + 1), np.inf)
    least[:, start] = 0.0
    found = [least]
    for first, end, seconds in zip(begins[:-1], ends[:-1], each_s[:-1], strict=True):
        least = np.full((2, layers + 1), np.inf)
        for row, own_s in enumerate(seconds.T):
            np.minimum.at(least[row], end, found[-1][row][first] + own_s)
        found.append(least)
    return found


def _among(layers: Ints, reached: Ints) -> Any:
    """Which of some layers are reached: numpy.isin, sooner done where they are few."""
    import numpy as np

    known = np.zeros(max(layers.max(initial=0), reached.max(initial=0)) + 1, dtype=bool)
    known[reached] = True
    return known[layers]


def _joined(found: list[_Held]) -> list[_Held] | None:
    """The spans that lie in whole cuts; None where there are none."""
    import numpy as np

    forth, reached = list[_Held](), np.asarray([0])
    for held in found:
        forth.append(held.only(_among(held.firsts, reached)))
        reached = forth[-1].ends
    back = list[_Held]()
    for held in reversed(forth):
        back.append(held.only(_among(held.ends, reached)))
        reached = back[-1].firsts
    return back[::-1] if all(len(held.ends) for held in back) else None


def _spans(held: _Held) -> Spans:
    """The spans of a stage by their first layers."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for first, end in sorted(zip(held.firsts.tolist(), held.ends.tolist(), strict=True)):
        rows.setdefault(first, []).append((first, end))
    return list(rows.values())

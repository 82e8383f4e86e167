"""A shape's stages in fractions of blocks: a linear programme whose optimum no strategy beats.

With x_so the blocks of stage s of kind o, which is their class and recompute option, n_s = sum over o of
x_so, and every figure no more than what a stage takes (planner.search.least_passes),

    minimise T
    path q     T >= sum over s, k of a_qsk t_sk(x) + hops_q h + gathering(first rank) + reduction(last rank)
    stage s    least_s <= n_s <= most_s
    rank r     least_r <= sum of n_s over its stages <= most_r
    class c    sum of x_so over all s and the o of its kinds = its blocks in the model, or on each stage
    moment v   states, ends, what a pass needs, and what is in flight on the stages of its rank, <= limit

Blocks and what ranks may hold are whole elsewhere (planner.search.stage_space), which is why limits of ranks
belong here: where no rank may hold more than its equal part, all hold just that. Paths along rows
(planner.search.row_paths) are there from the beginning, those of them that matter. What is found then is
replayed, between it and the best found before, and the longest path becomes a row, a few times. The dual of
this programme is the game that planner.search.path_bound plays, in fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from planner.cost.evaluate import CostModel
from planner.cost.replay import CriticalPath, PathTimes, longest_path
from planner.model.sublayer import Recompute
from planner.search.dominance_proofs import Proof, Proofs, least_sum
from planner.search.least_passes import option_passes
from planner.search.linear import LinearProgramme, Solution
from planner.search.row_paths import RowPaths, row_paths
from planner.search.sizes import Sizes
from planner.search.timed import MAX_PLACES, timed
from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.table import KINDS
from planner.strategy.strategy import Zero

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints
    from planner.search.recipes import RecipeBook
    from planner.search.stage_space import StageSpace

EXACT = 1e-6
"""Share of an optimum by which HiGHS, whose tolerance is less, may be off."""
BEHIND = 0.7
"""What is replayed lies so far from what is found towards the best replayed before: its path cuts deeper than
that of a corner."""
NEAR = 1e-3
"""Share of a bound by which a replay may lie above it, and be its own."""
LEAST_ROUNDS = 2
"""Replays, but for one, before a search for a bound gives up that cannot succeed."""
WHOLE_ROUNDS = 4
"""Replays of whole blocks."""
WORTH_TIMING = 0.97
"""Share of the time to beat from which on a bound is worth a programme of whole blocks and all paths."""
FEW_STAGES = 32
"""Stages up to which blocks may be whole."""
KNOWN: WeakKeyDictionary[CostModel, Proofs] = WeakKeyDictionary()
"""What ruled out shapes of a problem before."""
MAX_PARTS = 1_000_000
"""Stages of all paths along rows together beyond which a shape is not relaxed: that would take long."""


class Whole(NamedTuple):
    """Nodes of branch and bound that are spent on whole blocks each time, where paths are added one by one
    (planner.search.timed has its own), and seconds in all (None: any)."""

    nodes: int
    seconds: float | None = None


class Relaxed(NamedTuple):
    """What no strategy beats within some limits, and blocks of each stage, in fractions, that nearly reach it
    (None: there are none), with what these take."""

    bound_s: float
    blocks: Floats | None
    replayed_s: float = float("inf")


class _Paths(NamedTuple):
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


class _Memory(NamedTuple):
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


class Relaxation:
    """The programme of one shape on ranks with cores of their own."""

    def __init__(self, space: StageSpace) -> None:
        self.space, self.table, self.hop_s = space, space.table, space.hop_s
        self.options, self.classes = space.books[0].options, list(space.shape.classes)
        self._cuts: list[tuple[Floats, Floats]] = []
        self._proofs = KNOWN.setdefault(space.model, Proofs())

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
    def _block_s(self) -> Floats:
        return self.figures[0]

    @property
    def _fixed_s(self) -> Floats:
        return self.figures[1]

    def within(self, to_beat_s: float, sizes: Sizes, rounds: int, whole: Whole | None = None) -> Relaxed:
        """What no strategy beats within sizes, or `to_beat_s`, after so many replays at most; of few stages,
        with `whole` blocks in the end."""
        return self._bound(
            to_beat_s, sizes, rounds, whole if self.space.degrees.stages <= FEW_STAGES else None
        )

    def even(self, to_beat_s: float, rounds: int) -> Relaxed:
        """The same of the even split, of any classes."""
        import numpy as np

        shape, spans = self.space.shape, list(pairwise(self.space.even))
        counts = np.asarray([[shape.count(key, *span) for key in self.classes] for span in spans])
        return self._bound(to_beat_s, self._sizes([(b - a, b - a) for a, b in spans]), rounds, None, counts)

    def near(self, to_beat_s: float, rounds: int) -> Relaxed:
        """The same of all cuts near it, as if layers of each class lay anywhere."""
        stages = range(self.space.degrees.stages)
        each = [[end - first for spans in self.space.spans(s, None) for first, end in spans] for s in stages]
        return self._bound(to_beat_s, self._sizes([(min(own), max(own)) for own in each]), rounds)

    def _sizes(self, stages: Sequence[tuple[int, int]]) -> Sizes:
        """Those of ranks whose stages lie within limits."""
        ranks = ([stages[s] for s in own] for own in self.space.stages_of)
        return Sizes(tuple(stages), tuple((sum(a for a, _ in own), sum(b for _, b in own)) for own in ranks))

    def _bound(
        self,
        to_beat_s: float,
        sizes: Sizes,
        rounds: int,
        whole: Whole | None = None,
        counts: Ints | None = None,
    ) -> Relaxed:
        """The optimum with the step of the optimizer, where devices have cores of their own and it does not
        take long to find."""
        space = self.space
        parts = space.degrees.stages**2 * (space.degrees.chunks + 1)
        if parts > MAX_PARTS or space.model.sharing:
            return Relaxed(0.0, None)
        found = self._least(to_beat_s - space.optimizer_s, sizes, rounds, whole, counts)
        bound_s, replayed_s = (each + space.optimizer_s for each in (found.bound_s, found.replayed_s))
        return found._replace(bound_s=min(to_beat_s, bound_s), replayed_s=replayed_s)

    @cached_property
    def paths(self) -> _Paths:
        """The seconds of the paths along rows."""
        return self._seconds(row_paths(self.space.degrees))

    def _seconds(self, paths: RowPaths) -> _Paths:
        import numpy as np

        kinds = len(KINDS)
        block_s = paths.seconds(self._block_s[:, :kinds])
        fixed_s = paths.seconds(self._fixed_s[:, :kinds, None]).sum(axis=(1, 2)) + paths.hops * self.hop_s
        rank_of, numbers = np.asarray(self.space.rank_of), np.arange(len(paths.last))
        for figure, ranks in ((kinds, np.zeros_like(numbers)), (kinds + 1, paths.last)):
            there = rank_of == ranks[:, None]
            block_s += there[:, :, None] * self._block_s[:, figure]
            fixed_s += there @ self._fixed_s[:, figure]
        return _Paths(block_s.reshape(len(numbers), -1), fixed_s, paths.ranks)

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

    def memory(self, sizes: Sizes) -> _Memory:
        """What blocks hold within sizes."""
        import numpy as np

        held, free = self.space.ranks.parts.rows(sizes.stages)
        shares = np.moveaxis(held / np.maximum(free, 1.0)[..., None, None], 0, 1)
        ranks, _, _, *places = shares.shape
        return _Memory(shares.reshape(ranks, -1, *places), np.asarray(self.space.stages_of))

    def _least(
        self, within_s: float, sizes: Sizes, rounds: int, whole: Whole | None, counts: Ints | None
    ) -> Relaxed:
        """The optimum within sizes, or any bound of at least `within_s`.

        Where blocks are of several classes, `counts` [stage, class] may be those of each stage.
        """
        first = rounds == 0 and counts is None and not self._cuts and len(self.classes) == 1
        if first and self._proven(within_s, sizes):
            return Relaxed(within_s, None)
        programme = _Programme(self, sizes, counts)
        for cut in self._cuts:
            programme.add(*cut)
        found = self._least_of(programme, within_s, rounds, BEHIND)
        if first and within_s <= found.bound_s < float("inf"):
            self._proofs.add(self.space.degrees, len(self.options), programme.proof(found.bound_s))
        if whole is None or found.bound_s >= within_s:
            return found
        near = found.bound_s >= WORTH_TIMING * within_s
        if near and len(action_order(self.table).needed) <= MAX_PLACES:
            exact = timed(self, sizes, whole.seconds)
            other = Relaxed(float("inf"), None) if exact is None else Relaxed(*exact)
        else:
            programme.make_whole(whole, within_s * (1 + EXACT))
            other = self._least_of(programme, within_s, WHOLE_ROUNDS, 0.0)
        return Relaxed(max(found.bound_s, other.bound_s), other.blocks)

    def _proven(self, within_s: float, sizes: Sizes) -> bool:
        """Whether what ruled out another shape with this table says that no strategy takes less."""
        memory: _Memory | None = None
        for proof in self._proofs.of(self.space.degrees, len(self.options)):
            paths = self._seconds(row_paths(self.space.degrees).only(proof.paths))
            each, least_s = proof.weights @ paths.each, float(proof.weights @ paths.fixed)
            if proof.moments:
                memory, prices = memory or self.memory(sizes), proof.prices * within_s
                if memory.shares.shape[1] != proof.moment_count:
                    continue
                each, least_s = each + prices @ memory.rows(proof.moments), least_s - prices.sum()
            stages = each.reshape(len(sizes.stages), -1).min(axis=1).tolist()
            least_s += least_sum(stages, sizes, self.space.rank_of, self.space.layers)
            if least_s >= within_s * (1 + 4 * EXACT):
                return True
        return False

    def _least_of(self, programme: _Programme, within_s: float, rounds: int, behind: float) -> Relaxed:
        """The same of a programme, `behind` being how far replays stay behind what is found."""
        best_s, best, bound_s = float("inf"), None, 0.0
        for number in range(rounds + 1):
            found = programme.solved(within_s)
            if found is None:
                return Relaxed(float("inf"), None)
            bound_s = max(bound_s, found.least)
            if bound_s >= within_s or number == rounds or found.variables is None:
                break
            x = found.variables if best is None else behind * best + (1 - behind) * found.variables
            path, ends_s = self._replayed(x)
            if ends_s < best_s:
                best_s, best = ends_s, x
            if best_s <= bound_s * (1 + NEAR) or (number >= LEAST_ROUNDS and best_s < within_s):
                break  # the optimum lies between them, or below what is to be ruled out
            self._cuts.append(self._cut(path))
            programme.add(*self._cuts[-1])
        blocks = None if best is None else best.reshape(len(self._fixed_s), -1).sum(axis=1)
        return Relaxed(bound_s, blocks, best_s)

    def _replayed(self, x: Floats) -> tuple[CriticalPath, float]:
        """The longest path with these blocks, and its length."""
        import numpy as np

        space, kinds = self.space, len(KINDS)
        each = (self._block_s * x.reshape(len(self._fixed_s), 1, -1)).sum(axis=2) + self._fixed_s
        once = np.zeros((2, space.degrees.pp))
        np.add.at(once[0], space.rank_of, each[:, kinds])
        np.add.at(once[1], space.rank_of, each[:, kinds + 1])
        begin_s, reduce_s = once.tolist()
        cell_s = each[:, :kinds].ravel().tolist()
        durations = action_order(self.table).durations(cell_s)
        ends_s, row_ends_s = durations.ends_s(begin_s, self.hop_s)
        times = PathTimes(
            table=self.table,
            durations=durations,
            begin_s=tuple(begin_s),
            ends_s=ends_s,
            row_ends_s=row_ends_s,
            cell_s=cell_s,
        )
        length_s = max(end + reduce for end, reduce in zip(row_ends_s, reduce_s, strict=True))
        return longest_path(times, reduce_s, self.hop_s), length_s

    def _cut(self, path: CriticalPath) -> tuple[Floats, Floats]:
        """A path as seconds by block and besides."""
        import numpy as np

        counts = np.zeros(self._fixed_s.shape)
        counts[:, : len(KINDS)] = path.counts
        counts[self.space.stages_of[path.first_rank], len(KINDS)] = 1
        counts[self.space.stages_of[path.last_rank], len(KINDS) + 1] = 1
        block_s = (counts[:, :, None] * self._block_s).sum(axis=1).reshape(1, -1)
        return block_s, np.asarray([(counts * self._fixed_s).sum() + path.hops * self.hop_s])


class _Programme:
    """The programme of some sizes, with the rows that matter so far; variables are x_so, then T in units of
    about a step: HiGHS's tolerances are none of seconds."""

    def __init__(self, relaxation: Relaxation, sizes: Sizes, counts: Ints | None) -> None:
        import numpy as np

        self.paths, self.memory = relaxation.paths, relaxation.memory(sizes)
        options, stages, classes = len(relaxation.options), len(sizes.stages), len(relaxation.classes)
        self.linear = LinearProgramme(*relaxation.sums(sizes, counts))
        self._added: dict[int | tuple[int, int], None] = {}
        """Paths by number and moments by rank, in the order of their rows."""
        x = np.zeros((stages, classes, options))
        x[:, :, 0] = np.asarray(sizes.stages).mean(axis=1, keepdims=True) / classes
        self._scale_s = float((self.paths.each @ x.ravel() + self.paths.fixed).max()) or 1.0
        self._add_most(x.ravel(), -np.inf, 0.0)

    def _add_most(self, x: Floats, than_s: float, than: float) -> bool:
        """Adds of each rank the longest path, and its fullest moment, for some blocks, where they are more
        than a time and a share of the memory; whether there are any that were not there before."""
        import numpy as np

        longest = [each for each in self.paths.longest(x, than_s) if each not in self._added]
        fullest = [each for each in self.memory.fullest(x, than) if each not in self._added]
        self._added |= dict.fromkeys([*longest, *fullest])
        self.add(self.paths.each[longest], self.paths.fixed[longest])
        if fullest:
            self.linear.add(np.pad(self.memory.rows(fullest), ((0, 0), (0, 1))), np.ones(len(fullest)))
        return bool(longest or fullest)

    def proof(self, bound_s: float) -> Proof:
        """What its optimum follows from, if no other rows were added."""
        import numpy as np

        prices = dict(zip(self._added, self.linear.prices(len(self._added)).tolist(), strict=True))
        paths = {key: price for key, price in prices.items() if isinstance(key, int) and price > 0}
        moments = {key: price for key, price in prices.items() if isinstance(key, tuple) and price > 0}
        weights = np.asarray(list(paths.values()))
        shares = np.asarray(list(moments.values())) * self._scale_s / bound_s
        return Proof(
            paths=np.asarray(list(paths)),
            weights=weights / weights.sum(),
            moments=list(moments),
            moment_count=self.memory.shares.shape[1],
            prices=shares / weights.sum(),
        )

    def add(self, block_s: Floats, fixed_s: Floats) -> None:
        """Adds paths as rows."""
        import numpy as np

        if len(block_s):
            rows = np.pad(block_s / self._scale_s, ((0, 0), (0, 1)), constant_values=-1.0)
            self.linear.add(rows, -fixed_s / self._scale_s)

    def make_whole(self, whole: Whole, most_s: float) -> None:
        """Asks for whole blocks from now on, and for no more than `most_s`."""
        self.linear.make_whole(whole.nodes, whole.seconds, most=most_s / self._scale_s)

    def solved(self, enough_s: float) -> Solution | None:
        """The optimum, EXACT less; None where there is none. Paths and moments are added that it breaks,
        while it is less than `enough_s`."""
        while True:
            found = self.linear.solved()
            if found is None:
                return None
            least_s = found.least * self._scale_s * (1 - EXACT)
            found = found._replace(least=least_s, value=found.value * self._scale_s)
            if found.variables is None or found.least >= enough_s:
                return found
            if not self._add_most(found.variables, found.value * (1 + EXACT), 1 + EXACT):
                return found


def _figures(book: RecipeBook, options: tuple[Recompute, ...]) -> tuple[Floats, Floats]:
    """What a stage takes at least for each of its blocks [figure, kind] and besides [figure]: its actions by
    kind, its gathering, its reduction. A block's kind is its class and option."""
    import numpy as np

    shape, zero = book.shape, book.shape.degrees.zero
    shown = shape.physics.dp_exposed if shape.overlaps else 1.0
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

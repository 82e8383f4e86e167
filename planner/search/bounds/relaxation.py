"""Proofs that a shape cannot beat a time, tried on other shapes with the same table.

The dual of a relaxation is a weight for each of some paths, which sum to 1, and a
price for the memory of some moments. With a_so what weighted paths take for a block of stage s of kind o, and
what it holds by these prices,

    T  >=  sum_so a_so x_so + what paths take besides - prices

for all blocks x, whatever the shape that weights and prices were found for; and the least of it over all x
within limits is a sum over stages, each block going where it costs least. Shapes with one table differ in
how long actions take, but what rules out one of them rules out most of the others.

A shape's stages in fractions of blocks: a linear programme whose optimum no strategy beats.

With x_so the blocks of stage s of kind o, which is their class and recompute option, n_s = sum over o of
x_so, and every figure no more than what a stage takes (planner.search.programme.stage_options),

    minimise T
    path q     T >= sum over s, k of a_qsk t_sk(x) + hops_q h + gathering(first rank) + reduction(last rank)
    stage s    least_s <= n_s <= most_s
    rank r     least_r <= sum of n_s over its stages <= most_r
    class c    sum of x_so over all s and the o of its kinds = its blocks in the model, or on each stage
    moment v   states, ends, what a pass needs, and what is in flight on the stages of its rank, <= limit

Blocks and what ranks may hold are whole elsewhere, which is why limits of ranks
belong here: where no rank may hold more than its equal part, all hold just that. Paths along rows
are there from the beginning, those of them that matter. What is found then is
replayed, between it and the best found before, and the longest path becomes a row, a few times. The dual of
this programme is the game that planner.search.bounds.fictitious_play plays, in fractions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from planner.cost.evaluate import CostModel
from planner.cost.replay import CriticalPath, PathTimes, longest_path
from planner.search.bounds.makespan_cuts import (
    MemoryRows,
    RelaxationRows,
    row_paths,
)
from planner.search.bounds.timed import MAX_PLACES, LinearProgramme, Solution, timed
from planner.search.programme.stages import Sizes
from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.table import KINDS
from planner.strategy.strategy import Degrees

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints
    from planner.search.bounds.rank_bounds import RankParts
    from planner.search.programme.stages import StageSpace


EACH, MOST = 3, 4096
"""Proofs that are remembered of one table, and tables."""


class Proof(NamedTuple):
    """Weights of paths along rows by their numbers, and prices of moments (rank and number, of so many) as
    shares of the time that was ruled out."""

    paths: Ints
    weights: Floats
    moments: list[tuple[int, int]]
    moment_count: int
    prices: Floats


class Proofs:
    """Proofs of one problem by table, the last ones of each."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], deque[Proof]] = {}

    def of(self, degrees: Degrees, kinds: int) -> Iterator[Proof]:
        """Those of shapes with the table of this one, and so many kinds of blocks."""
        return iter(self._known.get(_table(degrees, kinds), ()))

    def add(self, degrees: Degrees, kinds: int, proof: Proof) -> None:
        """Remembers what ruled out a shape."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.setdefault(_table(degrees, kinds), deque(maxlen=EACH)).appendleft(proof)


def _table(d: Degrees, kinds: int) -> tuple[object, ...]:
    return d.schedule, d.pp, d.chunks, d.num_micro_batches, d.device_order, kinds


def least_sum(each: Floats, sizes: Sizes, rank_of: list[int], layers: int) -> float:
    """The least that `layers` blocks cost whose stages and ranks lie within limits, at each[stage]; infinite
    where there is no way. Of a rank's blocks the next goes to its cheapest stage that has room, so that each
    costs no less than the one before: then the cheapest of all ranks that have room is best."""
    held = [low for low, _ in sizes.stages]
    ranks = [0] * len(sizes.ranks)
    for rank, low in zip(rank_of, held, strict=True):
        ranks[rank] += low
    left = layers - sum(held)
    order = sorted(range(len(held)), key=each.__getitem__)
    for needed in (True, False):  # what ranks hold at least, then what is left
        for stage in order:
            rank = rank_of[stage]
            room = sizes.ranks[rank][0 if needed else 1] - ranks[rank]
            more = max(0, min(room, sizes.stages[stage][1] - held[stage], left))
            held[stage] += more
            ranks[rank] += more
            left -= more
    kept = all(low <= own <= high for own, (low, high) in zip(ranks, sizes.ranks, strict=True))
    if left or not kept:
        return float("inf")
    return float(sum(n * own for n, own in zip(held, each, strict=True)))


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
    (planner.search.bounds.timed has its own), and seconds in all (None: any)."""

    nodes: int
    seconds: float | None = None


class Relaxed(NamedTuple):
    """What no strategy beats within some limits, and blocks of each stage, in fractions, that nearly reach it
    (None: there are none), with what these take."""

    bound_s: float
    blocks: Floats | None
    replayed_s: float = float("inf")


class Relaxation:
    """The programme of one shape on ranks with cores of their own."""

    def __init__(self, space: StageSpace, parts: RankParts) -> None:
        self.space, self.rows = space, RelaxationRows(space, parts)
        self.table, self.hop_s = space.table, space.hop_s
        self._cuts: list[tuple[Floats, Floats]] = []
        self._proofs = KNOWN.setdefault(space.model, Proofs())

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
        counts = np.asarray([[shape.count(key, *span) for key in self.rows.classes] for span in spans])
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

    def _least(
        self, within_s: float, sizes: Sizes, rounds: int, whole: Whole | None, counts: Ints | None
    ) -> Relaxed:
        """The optimum within sizes, or any bound of at least `within_s`.

        Where blocks are of several classes, `counts` [stage, class] may be those of each stage.
        """
        first = rounds == 0 and counts is None and not self._cuts and len(self.rows.classes) == 1
        if first and self._proven(within_s, sizes):
            return Relaxed(within_s, None)
        programme = _Programme(self.rows, sizes, counts)
        for cut in self._cuts:
            programme.add(*cut)
        found = self._least_of(programme, within_s, rounds, BEHIND)
        if first and within_s <= found.bound_s < float("inf"):
            self._proofs.add(self.space.degrees, len(self.rows.options), programme.proof(found.bound_s))
        if whole is None or found.bound_s >= within_s:
            return found
        near = found.bound_s >= WORTH_TIMING * within_s
        if near and len(action_order(self.table).needed) <= MAX_PLACES:
            exact = timed(self.rows, sizes, whole.seconds)
            other = Relaxed(float("inf"), None) if exact is None else Relaxed(*exact)
        else:
            programme.make_whole(whole, within_s * (1 + EXACT))
            other = self._least_of(programme, within_s, WHOLE_ROUNDS, 0.0)
        return Relaxed(max(found.bound_s, other.bound_s), other.blocks)

    def _proven(self, within_s: float, sizes: Sizes) -> bool:
        """Whether what ruled out another shape with this table says that no strategy takes less."""
        memory: MemoryRows | None = None
        for proof in self._proofs.of(self.space.degrees, len(self.rows.options)):
            paths = self.rows.seconds_of(row_paths(self.space.degrees).only(proof.paths))
            each, least_s = proof.weights @ paths.each, float(proof.weights @ paths.fixed)
            if proof.moments:
                memory, prices = memory or self.rows.memory(sizes), proof.prices * within_s
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
        blocks = None if best is None else best.reshape(len(self.rows.fixed_s), -1).sum(axis=1)
        return Relaxed(bound_s, blocks, best_s)

    def _replayed(self, x: Floats) -> tuple[CriticalPath, float]:
        """The longest path with these blocks, and its length."""
        import numpy as np

        space, kinds = self.space, len(KINDS)
        each = (self.rows.block_s * x.reshape(len(self.rows.fixed_s), 1, -1)).sum(axis=2) + self.rows.fixed_s
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

        counts = np.zeros(self.rows.fixed_s.shape)
        counts[:, : len(KINDS)] = path.counts
        counts[self.space.stages_of[path.first_rank], len(KINDS)] = 1
        counts[self.space.stages_of[path.last_rank], len(KINDS) + 1] = 1
        block_s = (counts[:, :, None] * self.rows.block_s).sum(axis=1).reshape(1, -1)
        return block_s, np.asarray([(counts * self.rows.fixed_s).sum() + path.hops * self.hop_s])


class _Programme:
    """The programme of some sizes, with the rows that matter so far; variables are x_so, then T in units of
    about a step: HiGHS's tolerances are none of seconds."""

    def __init__(self, relaxation: RelaxationRows, sizes: Sizes, counts: Ints | None) -> None:
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

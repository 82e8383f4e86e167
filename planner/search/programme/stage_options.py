"""What a block of a class and the ends of a model hold under the degrees of a shape.

Stages of a block or two tell: what a second block adds is what every block of its class holds, and what a
stage of one block holds besides is its ends'.

What the layers of a model take at least, whatever recomputes: sums from which a stage's passes follow.

Gradients of inputs and of weights count as planner.cost.replay.split_backward divides a backward
pass, or,
where torch divides that of a whole stage, as no stage takes less.

Stage recipes: for a stage and the blocks that it holds, the best mix of recompute options that fits.

The mixes of n blocks over three options are few, (n + 1)(n + 2) / 2, and their times are sums: all are costed
at once, and the fastest that fits is the stage's column of the ILP. Options are dealt in layer order, so
counts say everything; where all blocks are of one class, so does their number.
"""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from operator import le
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.layer import Pass
from planner.cost.replay import SPLIT_RECOMPUTES, kind_passes
from planner.cost.stage.memory_timeline import StageMemory, least_pass_bytes, reducing_bytes, stage_pass_bytes
from planner.cost.stage.offload import with_offload
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.foundation.arrays import larger
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.model.sublayer import Recompute
from planner.strategy.schedule.table import KINDS, InFlight
from planner.strategy.strategy import Offload, RecomputeCounts, Schedule, Stage, Zero, offloaded

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints


class EndBytes(NamedTuple):
    """Of the ends that a stage holds: their states, what they keep of a micro-batch, and what a pass of the
    stage needs beside them."""

    resident: float
    saved: float
    passing: float


class BlockBytes:
    """The bytes of one book's blocks of a class.

    `saved` is what a block keeps of a micro-batch by its option, `waiting` what it holds for its weight
    gradients; `states` are those of a block, `late` the part that a pass back makes. `passing` is what its
    pass back needs by its option; while gradients of a block behind it are reduced, `reducing` more, less
    what that block kept, `behind` at least.
    """

    def __init__(self, book: RecipeBook, key: str) -> None:
        self.book, shape = book, book.shape
        self.saved = {option: shape.block(key, option).saved_bytes for option in book.options}
        self.waiting = {option: shape.waiting_bytes[key, option] for option in book.options}
        self.keeping = sorted(self.saved, key=lambda option: -self.saved[option])
        self.middle = shape.layer_model.keys.index(key, 2)
        """A layer of the class with one before it, neither of which is the model's first."""
        first, counts = self.middle - 1, (RecomputeCounts(none=size) for size in (1, 2))
        one, two = (book.column(Stage(first=first, end=first + c.layers, recompute=c)) for c in counts)
        self.states = two.resident_bytes - one.resident_bytes
        self.late = two.late_bytes - one.late_bytes
        self.passing = {option: least_pass_bytes(shape, [option], key) for option in book.options}
        self.reducing = reducing_bytes(shape)
        self.behind = least_pass_bytes(shape, book.options, behind=True) - min(self.passing.values())
        self._ends: dict[tuple[bool, bool, bool], EndBytes] = {}
        self._passing: dict[tuple[bool, bool], float] = {}

    def by_option(self, name: str) -> list[float]:
        """A figure for each option."""
        figure = getattr(self, name)
        return list(figure.values()) if isinstance(figure, dict) else [figure] * len(self.saved)

    def ends(self, first: bool, last: bool, *, begun: bool) -> EndBytes:
        """Those of a stage that holds the first or the last block, without gradients before a pass back has
        `begun`."""
        key = first, last, begun
        if key not in self._ends:
            least = self.keeping[-1]
            alone = self.book.column(self._stage(first, last, least))
            late = 0.0 if begun else alone.late_bytes - self.late
            self._ends[key] = EndBytes(
                resident=alone.resident_bytes - self.states - late,
                saved=alone.cost.saved_bytes - self.saved[least],
                passing=self._pass_bytes(first, last),
            )
        return self._ends[key]

    def _pass_bytes(self, first: bool, last: bool) -> float:
        """What a pass of a stage with these ends and one block needs at least."""
        if (first, last) not in self._passing:
            shape = self.book.shape
            costs = (shape.stage(self._stage(first, last, option)) for option in self.saved)
            self._passing[first, last] = min(stage_pass_bytes(shape, cost) for cost in costs)
        return self._passing[first, last]

    def _stage(self, first: bool, last: bool, option: Recompute) -> Stage:
        """A stage of one block."""
        start = 0 if first else self.book.layers - 1 if last else self.middle
        counts = RecomputeCounts(
            none=int(option is Recompute.NONE),
            selective=int(option is Recompute.SELECTIVE),
            full=int(option is Recompute.FULL),
        )
        return Stage(first=start, end=start + 1, recompute=counts)


class LeastPasses(NamedTuple):
    """Least seconds by kind of action (planner.strategy.schedule.table.KINDS): `sums` [kind, layers + 1] of
    all layers
    before each, embedding and head with the first and the last; `action` [kind] of what an action takes
    besides."""

    sums: Floats
    action: Floats

    def stage_s(self, firsts: Ints | int, ends: Ints | int) -> Floats:
        """What a stage's actions take at least, or those of many stages, [kind, stage]."""
        each: Floats = (self.sums[:, ends] - self.sums[:, firsts]).T + self.action
        return each.T


def least_passes(shape: LayoutModel, options: tuple[Recompute, ...]) -> LeastPasses:
    """Those of a shape's layers, each pass with the option that takes least."""
    import numpy as np

    known = {key: option_passes(shape, key, options).min(axis=0) for key in shape.classes}
    each = np.asarray([known[key] for key in shape.layer_model.keys]).T
    whole = shape.problem.engine_settings.recomputes_once or shape.problem.workload.adapters is not None
    for place, (forward, backward) in ((0, shape.embedding_passes), (-1, shape.head_passes)):
        left_s = 0.0 if whole else backward.compute_s / 2  # of frozen ends it may be below 0
        each[:, place] += _parts_s(shape, forward, backward, left_s, 0.0)
    sums = np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, axis=1)], axis=1)
    return LeastPasses(sums, np.asarray(_parts_s(shape, shape.action, shape.action, 0.0, 0.0)))


def option_passes(shape: LayoutModel, key: str, options: tuple[Recompute, ...]) -> Floats:
    """What a block of a class adds at least to its stage's actions, with each option [option, kind]."""
    import numpy as np

    unchanged, each = shape.problem.workload.adapters is not None, []
    for option in options:
        forward, backward = shape.passes(key, option)
        if shape.problem.engine_settings.recomputes_once:
            products_s = shape.deferrable_s[key]
            left_s, again_s = products_s * (option is Recompute.NONE), 0.0
        else:
            left_s = 0.0 if unchanged else backward.compute_s / 2
            products_s, again_s = min(left_s, forward.compute_s), split_again_s(shape, key, option)
        each.append(_parts_s(shape, forward, backward, left_s, products_s + again_s))
    return np.asarray(each)


def _parts_s(
    shape: LayoutModel, forward: Pass, backward: Pass, left_s: float, products_s: float
) -> tuple[float, ...]:
    """Seconds by kind where `left_s` of the backward is not in I, and `products_s` are in W."""
    later_s = 0.0 if shape.problem.workload.adapters is not None else backward.host_s / 2
    forward_s, backward_s = forward.total_s, backward.total_s
    return forward_s, backward_s, backward_s - left_s - later_s, products_s + later_s, forward_s


def split_again_s(shape: LayoutModel, key: str, option: Recompute) -> float:
    """What a split backward pass of a block takes more than a whole one (planner.cost.replay)."""
    if option is Recompute.NONE:
        return 0.0
    if shape.problem.engine_settings.recomputes_once:
        return shape.deferrable_s[key]
    return shape.passes(key, option)[1].recompute_s * (SPLIT_RECOMPUTES - 1)


MAX_MIXES = 16
"""Recomputation mixes of one stage and size that the ILP chooses from where a rank holds several stages."""


@frozen
class Column:
    """A recipe of a stage: its blocks and their options, and what they cost.

    Where all blocks are of one class it stands for any blocks as many, between the same ends. `passes_s` are
    the seconds of its actions by kind (planner.strategy.schedule.table.KINDS); `late_bytes` those of its
    states that a
    pass back makes.
    """

    stage: Stage
    cost: StageCost
    passes_s: tuple[float, ...]
    resident_bytes: float
    late_bytes: float = 0.0

    @property
    def layers(self) -> int:
        return self.stage.layers

    def held_bytes(self, flight: InFlight) -> float:
        """Its states that exist, and what micro-batches in flight keep
        (planner.cost.stage.peak_memory.held_bytes)."""
        late = 0.0 if flight.begun else self.late_bytes
        return self.resident_bytes - late + flight.kept_bytes(self.cost.saved_bytes, self.cost.waiting_bytes)

    def whole_s(self, schedule: Schedule) -> float:
        """What one micro-batch takes at least under a schedule."""
        forward_s, backward_s, inputs_s, weights_s, _ = self.passes_s
        return forward_s + (inputs_s + weights_s if schedule.splits_every_backward else backward_s)


@cache
def _fields(kind: type[Any]) -> tuple[str, ...]:
    """The names of a noun's fields; none where values of this type are none."""
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def _in_order(cost: Any, order: Ints) -> Any:
    """A cost whose figures may be arrays, or lie in passes, with their entries in an order."""
    import numpy as np

    if isinstance(cost, np.ndarray):
        return cost[order]
    kind: Any = type(cost)
    names = _fields(kind)
    return kind(**{name: _in_order(getattr(cost, name), order) for name in names}) if names else cost


@frozen
class Mixes:
    """Ways to give a stage's blocks an option each, the fastest first: their counts, and costs as arrays."""

    full: Ints
    selective: Ints
    cost: StageCost


class RecipeBook:
    """The recipes of one shape's stages, remembered by what they depend on.

    Stages with blocks of the same classes between the same ends share them, whatever the schedule. What is
    offloaded is so for all blocks of every stage; then recipes are the mixes of one option that recomputes
    with blocks that do not. Of a stage's blocks about one in `parts` at a time changes its option: with fewer
    parts there are fewer mixes to cost, and up to so large a part of the blocks recomputes needlessly.
    """

    def __init__(
        self,
        shape: LayoutModel,
        options: tuple[Recompute, ...],
        offload: Offload = Offload.NONE,
        parts: int | None = None,
    ) -> None:
        self.shape, self.options, self.offload, self.parts = shape, options, offload, parts
        self.layers = shape.problem.model.layers
        self.one_class = len(shape.classes) == 1
        self._alike: dict[tuple[tuple[str, ...], bool, bool], tuple[int, int]] = {}
        self._mixes: dict[tuple[int, int], Mixes] = {}
        self._columns: dict[Stage, Column] = {}
        self._memories: dict[int, StageMemory] = {}
        self._transients: dict[tuple[int, InFlight], float] = {}
        self._recipes: dict[tuple[int, int, tuple[InFlight, ...], float], Column | None] = {}
        self._paretos: dict[tuple[int, int], list[Column]] = {}

    @cached_property
    def least_passes(self) -> LeastPasses:
        """What the layers take at least."""
        return least_passes(self.shape, self.options)

    @cached_property
    def class_bytes(self) -> list[BlockBytes]:
        """What blocks of each class hold, and the ends of the model."""
        return [BlockBytes(self, key) for key in self.shape.classes]

    @property
    def block_bytes(self) -> BlockBytes:
        """The same where blocks are of one class."""
        (own,) = self.class_bytes
        return own

    def end_bytes(self, first: bool, last: bool, *, begun: bool) -> EndBytes:
        """What a stage holds besides its blocks: the first or the last of the model, or any in its middle."""
        keys, classes = self.shape.layer_model.keys, list(self.shape.classes)
        if first or last:
            return self.class_bytes[classes.index(keys[0 if first else -1])].ends(first, last, begun=begun)
        each = (own.ends(first, last, begun=begun) for own in self.class_bytes)
        return EndBytes(*map(min, zip(*each, strict=True)))

    @cached_property
    def end_figures(self) -> Floats:
        """The same [begun, where, figure]: where being that of the first block, of the last, or any other."""
        import numpy as np

        each = [
            [
                self.end_bytes(first, last, begun=begun)
                for first, last in ((True, False), (False, True), (False, False))
            ]
            for begun in (False, True)
        ]
        return np.asarray(each)

    @cached_property
    def kind_figures(self) -> dict[str, Floats]:
        """What a block holds by its class and option [kind]: every figure of BlockBytes by its name."""
        import numpy as np

        return {
            name: np.concatenate([own.by_option(name) for own in self.class_bytes])
            for name in ("saved", "waiting", "states", "late", "passing", "reducing")
        }

    @property
    def bounded(self) -> bool:
        """Whether what a stage holds follows from its blocks at every moment.

        In Torchtitan's moments not all gradients exist, so that what is transient may be below 0; nor in the
        own runtime's where a step has one micro-batch. What is offloaded comes and goes. Of every class there
        has to be a block with another before it, both in the middle of the model.
        """
        engine, single = self.shape.problem.engine_settings.engine, self.shape.degrees.num_micro_batches == 1
        apart = engine is Engine.TORCHTITAN or (engine is Engine.NATIVE and single)
        middle = self.shape.layer_model.keys[2:-1]
        return not apart and self.offload is Offload.NONE and set(middle) == set(self.shape.classes)

    def option_s(self, split: float) -> list[float]:
        """A micro-batch's passes of a block with each option, a share of its passes back being split, where
        blocks are of one class."""
        (key,), shape = self.shape.classes, self.shape
        each = ((option, shape.passes(key, option)) for option in self.options)
        return [
            forward.total_s + backward.total_s + split * split_again_s(shape, key, option)
            for option, (forward, backward) in each
        ]

    def least_block_s(self, key: str) -> float:
        """A micro-batch's passes of a block of a class with its cheapest option."""
        passes = (self.shape.passes(key, option) for option in self.options)
        return min(forward.total_s + backward.total_s for forward, backward in passes)

    def blocks(self, first: int, end: int) -> tuple[int, int]:
        """The blocks that stand for [first, end): the first with the same classes between the same ends."""
        if self.one_class:
            return (first, end) if first == 0 or end == self.layers else (1, 1 + end - first)
        key = self.shape.layer_model.keys[first:end], first == 0, end == self.layers
        return self._alike.setdefault(key, (first, end))

    def column(self, stage: Stage) -> Column:
        """The column of a stage; what the book offloads is added to it."""
        if stage not in self._columns:
            (away,) = offloaded((stage,), self.offload)
            cost = with_offload(self.shape, away, self.shape.stage(away))
            passes, memory = kind_passes(cost), StageMemory(self.shape, cost)
            self._columns[stage] = Column(
                stage=away,
                cost=cost,
                passes_s=tuple(passes[kind].total_s for kind in KINDS),
                resident_bytes=memory.kept.total,
                late_bytes=memory.late_bytes,
            )
        return self._columns[stage]

    def transient_bytes(self, column: Column, flight: InFlight) -> float:
        """What a column's stage holds for a moment with what is in flight."""
        key = id(column.cost), flight  # the costs of columns live as long as the book
        if key not in self._transients:
            if key[0] not in self._memories:
                self._memories[key[0]] = StageMemory(self.shape, column.cost)
            self._transients[key] = self._memories[key[0]].transient_bytes(flight)
        return self._transients[key]

    def pure(self, first: int, end: int) -> list[Column]:
        """The columns in which all blocks have the same option."""
        layers = end - first
        each = {
            Recompute.NONE: RecomputeCounts(none=layers),
            Recompute.SELECTIVE: RecomputeCounts(none=0, selective=layers),
            Recompute.FULL: RecomputeCounts(none=0, full=layers),
        }
        stages = [Stage(first=first, end=end, recompute=each[option]) for option in self.options]
        return [self.column(stage) for stage in stages]

    def recipe(
        self, first: int, end: int, flights: tuple[InFlight, ...], limit_bytes: float
    ) -> Column | None:
        """The fastest column of the blocks [first, end) within `limit_bytes` at all moments, or None where
        none fits."""
        first, end = self.blocks(first, end)
        key = first, end, flights, limit_bytes
        if key not in self._recipes:
            self._recipes[key] = self._recipe(*key)
        return self._recipes[key]

    def _recipe(
        self, first: int, end: int, flights: tuple[InFlight, ...], limit_bytes: float
    ) -> Column | None:
        fastest = self._fastest(first, end)
        if fastest is not None:
            column = self.column(fastest)
            if self._used_bytes(column.cost, flights) <= limit_bytes:
                return column
        if self.offload is not Offload.NONE:
            return self._offloaded(first, end, flights, limit_bytes)
        mixes = self.mixes(first, end)
        fits = (self._used_bytes(mixes.cost, flights) + 0.0 * mixes.full <= limit_bytes).nonzero()[0]
        return self.column(self._stage(mixes, int(fits[0]), first, end)) if len(fits) else None

    def _offloaded(
        self, first: int, end: int, flights: tuple[InFlight, ...], limit_bytes: float
    ) -> Column | None:
        layers = end - first
        counts = [RecomputeCounts(none=layers)] * (Recompute.NONE in self.options)
        for again in range(layers if Recompute.NONE not in self.options else 1, layers + 1):
            if Recompute.SELECTIVE in self.options:
                counts.append(RecomputeCounts(none=layers - again, selective=again))
            if Recompute.FULL in self.options:
                counts.append(RecomputeCounts(none=layers - again, full=again))
        stages = (Stage(first=first, end=end, recompute=each) for each in counts)
        columns = (self.column(stage) for stage in stages)
        fitting = [c for c in columns if self._used_bytes(c.cost, flights) <= limit_bytes]
        return min(fitting, key=lambda c: c.cost.backward.total_s, default=None)

    def _fastest(self, first: int, end: int) -> Stage | None:
        """The mix that takes least time where that is known beforehand: nothing is recomputed."""
        if Recompute.NONE not in self.options or self.shape.layer_model.samples:
            return None
        return Stage(first=first, end=end, recompute=RecomputeCounts(none=end - first))

    def _used_bytes(self, cost: StageCost, flights: tuple[InFlight, ...]) -> float:
        """What a stage, or each of many mixes of one, takes at the worst of its moments."""
        memory = StageMemory(self.shape, cost)
        return self.shape.runtime_bytes + larger(*map(memory.reserved_bytes, flights))

    @staticmethod
    def _stage(mixes: Mixes, number: int, first: int, end: int) -> Stage:
        full, selective = int(mixes.full[number]), int(mixes.selective[number])
        counts = RecomputeCounts(none=end - first - full - selective, selective=selective, full=full)
        return Stage(first=first, end=end, recompute=counts)

    def mix(self, span: tuple[int, int], number: int) -> Column:
        """The column of a mix by its number among `mixes`."""
        return self.column(self._stage(self.mixes(*span), number, *span))

    def forget(self) -> None:
        """Gives back the mixes, which take most memory; they are made again where they are asked for."""
        self._mixes.clear()

    def mixes(self, first: int, end: int) -> Mixes:
        """Every way to give the blocks [first, end) an option each."""
        if (first, end) not in self._mixes:
            self._mixes[first, end] = self._all_mixes(first, end)
        return self._mixes[first, end]

    def _all_mixes(self, first: int, end: int) -> Mixes:
        import numpy as np

        layers = end - first
        full, selective = (each.ravel() for each in np.indices((layers + 1, layers + 1)))
        legal = full + selective <= layers
        if self.parts is not None and layers > self.parts:
            grain = -(-layers // self.parts)
            legal &= (full % grain == 0) | (full == layers)
            legal &= (selective % grain == 0) | (full + selective == layers)
        if Recompute.NONE not in self.options:
            legal &= full + selective == layers
        if Recompute.SELECTIVE not in self.options:
            legal &= selective == 0
        if Recompute.FULL not in self.options:
            legal &= full == 0
        full, selective = full[legal], selective[legal]
        cost = self.shape.mixed_stages(first, end, full, selective)
        order = np.lexsort((selective, full, cost.backward.total_s + 0.0 * full))
        return Mixes(full=full[order], selective=selective[order], cost=_in_order(cost, order))

    def pareto(self, first: int, end: int) -> list[Column]:
        """Columns of the blocks [first, end) none of which is both slower and larger than another.

        Of more than MAX_MIXES, evenly many are kept from the fastest to the smallest: this narrows the space
        that the certificate speaks of to strategies with these mixes.
        """
        first, end = self.blocks(first, end)
        if (first, end) not in self._paretos:
            self._paretos[first, end] = self._pareto(first, end)
        return self._paretos[first, end]

    def _pareto(self, first: int, end: int) -> list[Column]:
        if self.offload is not Offload.NONE:
            return self.pure(first, end)
        mixes = self.mixes(first, end)
        zero = 0.0 * mixes.full
        sizes = (mixes.cost.block_saved_bytes + zero).tolist()
        waiting = (mixes.cost.waiting_bytes + zero).tolist()
        transients = (mixes.cost.block_transient_bytes + zero).tolist()
        kept: list[tuple[float, float, float]] = []
        chosen = []
        for number, own in enumerate(zip(sizes, waiting, transients, strict=True)):
            if any(all(map(le, other, own)) for other in kept):
                continue
            kept.append(own)
            chosen.append(number)
        if len(chosen) > MAX_MIXES:
            step = (len(chosen) - 1) / (MAX_MIXES - 1)
            chosen = [chosen[round(number * step)] for number in range(MAX_MIXES)]
        return [self.column(self._stage(mixes, number, first, end)) for number in chosen]


def least_once_s(shape: LayoutModel) -> float:
    """What a stage gathers before and reduces after all passes takes at least: one block's."""
    units, zero = shape.block_units.values(), shape.degrees.zero
    gathers = zero in (Zero.OPTIMIZER, Zero.GRADIENTS)
    reduces = zero in (Zero.NONE, Zero.OPTIMIZER)
    return min(
        (shape.once_s(shape.updates[unit]) if gathers else 0.0)
        + (shape.once_s(shape.reduces[unit]) if reduces else 0.0)
        for unit in units
    )

"""How long a step takes whose stages all take as long, in passes of the whole model: no bound, but near.

With F, I and W of a stage a second each, v stages on each of p ranks and m micro-batches, a step takes
3 m v seconds of work and a bubble:

    GPipe, 1F1B, interleaved    3 (p - 1)
    ZB-H1                       max(p - 1, 2 p - 1 - m)          arXiv 2401.10241, table 1, where m >= p
    ZB-V                        max(p - 1, 4 p - 2 - 2 m)        no bubble but the way down to the last rank
    DualPipeV                   2 (p - 1)                        github.com/deepseek-ai/DualPipe

and the whole model 3 v p. Of few micro-batches the two zero-bubble schedules wait for the first to come back.

A cheap lower bound on the step time of a shape, before any stage is cut.

With the cheapest option for every block, the whole model's passes F, B (W = F + B) and p ranks:

    no pipeline     exact
    GPipe           W (1 + (m - 1) / p)
    1F1B            W (m + p - 1) / p                       if m > p (see below)
                    W (1 + (m - 1) / 2p)                    else
    interleaved     W m (m + 2 a) / (p (m + a)), a = (p - 1) / 2v, and W at least    (see below)
    ZB-H1           W q / (1 - (1 - q / m)^p), q = 1/2      a forward and its I are half of both passes
    other V         W max(m / p, 1/2)
    shared cores    m W devices / throughput

Where the model does not fit without it, W includes the least recomputation (Recomputing).

The second line for 1F1B averages, over stages i, the two paths with m forwards then one descent, and one
descent then m backwards. The first weighs the paths that descend twice, C_i = sum_{j<i} t_j +
(m - w_i) t_i + 2 S_i, by a_i >= 0 with a_{i+1} = a_i (m - p - 1 + i) / (m - p + 1 + i), which makes the
weight of every t_j equal; since even stages make every C_i equal to (m + p - 1) t, that weight is
(m + p - 1) / p, and no split of W can do better.

Interleaved, with R_r what rank r takes for a micro-batch: the paths that enter its row at each of its v
stages average to m R_r + sum_{j<r} R_j / v over all r, for what a later entry leaves out on one rank it
meets on another. These average to sum_r w_r R_r, w_r = m / p + (p - 1 - r) / (p v), and no rank takes less
than m R_r: a combination of both with equal weights on every R_r has the weight m (m + 2 a) / (p (m + a)).
ZB-H1: no rank ends before sum_{j<r} (f_j + b_j / 2) + m t_r; weights that fall by 1 - q / m from rank to
rank make those of every t_j equal.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.layer import Pass
from planner.cost.memory.activations import most_waits
from planner.cost.memory.parameter_state import offloaded_states, states_of
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.memory_timeline import least_pass_bytes
from planner.cost.stage.sharded_layers import Sizes
from planner.cost.stage.stage import LayoutModel
from planner.job.engine_settings import Engine, EngineSettings
from planner.model.sublayer import Recompute
from planner.search.programme.stage_options import least_once_s, split_again_s
from planner.strategy.schedule.schedules import fullest
from planner.strategy.strategy import Degrees, Offload, Schedule


def even_factor(degrees: Degrees) -> float:
    """A step of even stages, in passes of the whole model for one micro-batch."""
    p, m, v = degrees.pp, degrees.num_micro_batches, degrees.chunks
    if p == 1:
        return float(m)
    match degrees.schedule:
        case Schedule.GPIPE | Schedule.ONE_F_ONE_B | Schedule.INTERLEAVED:
            bubble = 3 * (p - 1)
        case Schedule.ZB_H1:
            bubble = max(p - 1, 2 * p - 1 - m)
        case Schedule.ZBV:
            bubble = max(p - 1, 4 * p - 2 - 2 * m)
        case Schedule.DUALPIPEV:
            bubble = 2 * (p - 1)
    return (3 * m * v + bubble) / (3 * v * p)


class Counts(NamedTuple):
    """Micro-batches of layers, where fewest are first: of the first 0, 1, ... layers together, and the most
    of any."""

    sums: tuple[int, ...]
    most: int

    def bytes_of(self, sizes: Sizes) -> float:
        """The least that layers of these sizes hold, however they lie (rearrangement inequality)."""
        total, first = 0.0, 0
        for size, count in sizes:
            total += size * (self.sums[first + count] - self.sums[first])
            first += count
        return total


class Live(NamedTuple):
    """Of layers the micro-batches that are alive, and those that wait for W."""

    alive: Counts
    waiting: Counts


def _live(alive: Iterable[int], waiting: Iterable[int]) -> Live:
    each = sorted(alive), sorted(waiting)
    return Live(*(Counts(tuple(accumulate(own, initial=0)), own[-1]) for own in each))


@lru_cache
def _one_of_each(layers: int) -> Live:
    """A micro-batch of every layer."""
    return _live((1,) * layers, (0,) * layers)


def whole_units(shape: LayoutModel, options: tuple[Recompute, ...]) -> list[Pass]:
    """Both passes of the embedding, the head and all blocks of each class, with their cheapest options."""
    layers = shape.problem.model.layers
    units = [forward + backward for forward, backward in (shape.embedding_passes, shape.head_passes)]
    for key in shape.classes:
        forward, backward = min(
            (shape.passes(key, option) for option in options), key=lambda passes: passes[1].total_s
        )
        units.append((forward + backward) * shape.count(key, 0, layers))
    return units


@lru_cache(maxsize=4096)
def live_at_least(
    schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int, layers: int
) -> Live:
    """Micro-batches of each layer, at least, when most are on its rank and gradients are there.

    A stage has one layer or more; what the stages leave over counts as where fewest are.
    """
    alive, waiting = fullest(schedule, pp, chunks, num_micro_batches, waits)
    over = layers - len(alive)
    return _live(alive + (min(alive),) * over, waiting + (min(waiting),) * over)


def live_under(settings: EngineSettings, degrees: Degrees, layers: int) -> Live:
    """The same of a shape."""
    d = degrees
    return live_at_least(d.schedule, d.pp, d.chunks, d.num_micro_batches, most_waits(settings, d), layers)


@lru_cache(maxsize=4096)
def live_on_fullest(
    schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int, layers: int
) -> Live:
    """The same if all ranks were as full as the fullest, and stages even."""
    alive, waiting = fullest(schedule, pp, chunks, num_micro_batches, waits)
    ranks = [range(rank, pp * chunks, pp) for rank in range(pp)]  # whatever stages these are
    most = max(ranks, key=lambda places: sum(alive[place] + waiting[place] for place in places))
    each = [most[layer * chunks // layers] for layer in range(layers)]
    return _live((alive[place] for place in each), (waiting[place] for place in each))


class Recomputing:
    """The least recomputation with which a shape fits.

    Ranks hold the resident bytes, what a block's pass needs, and activations of micro-batches: when most are
    in flight on each rank at least `live` of the layers, in some order. What exceeds p limits must be
    recomputed away, at best by the class and option that save most bytes a second, where most are in flight.
    `split` says whether all backward passes are split.
    """

    def __init__(
        self, shape: LayoutModel, options: tuple[Recompute, ...], limit_bytes: float = math.inf
    ) -> None:
        self._shape, self._options = shape, options
        self._trades: dict[bool, list[tuple[float, float, float]]] = {}
        ranges = shape.sharded_layers.kept_ranges(options)
        self._least, self._most, self._least_waits, self._most_waits = ranges
        self._rank_bytes = memory_bound_bytes(shape) + shape.runtime_bytes + least_pass_bytes(shape, options)
        self._free_bytes = shape.degrees.pp * (limit_bytes - self._rank_bytes)

    def _traded(self, *, split: bool) -> list[tuple[float, float, float]]:
        """Of each class and option the seconds that it takes more than another, and the bytes that it keeps
        less, and lets wait less, than another."""
        if split not in self._trades:
            shape, found = self._shape, []
            for key in shape.classes:
                saved = [shape.block(key, option).saved_bytes for option in self._options]
                waiting = [shape.waiting_bytes[key, option] for option in self._options]
                times_s = [
                    shape.passes(key, option)[1].total_s
                    + (split_again_s(shape, key, option) if split else 0.0)
                    for option in self._options
                ]
                found += [
                    (time_s - min(times_s), max(saved) - size, max(waiting) - waits_for)
                    for time_s, size, waits_for in zip(times_s, saved, waiting, strict=True)
                ]
            self._trades[split] = found
        return self._trades[split]

    def _live_bytes(self, live: Live) -> float:
        """What all ranks together keep of micro-batches at least."""
        return live.alive.bytes_of(self._least) + live.waiting.bytes_of(self._least_waits)

    def least_bytes(self, live: Live) -> float:
        """What the fullest rank holds at least: no less than the mean."""
        return self._rank_bytes + self._live_bytes(live) / self._shape.degrees.pp

    def least_s(self, live: Live, *, split: bool) -> float:
        """Seconds that it takes at least for a micro-batch; infinite where the shape cannot fit."""
        alive, waiting = live
        if self._live_bytes(live) > self._free_bytes:
            return math.inf
        excess = alive.bytes_of(self._most) + waiting.bytes_of(self._most_waits) - self._free_bytes
        if excess <= 0:
            return 0.0
        spared = (
            (more_s, alive.most * size + waiting.most * waits)
            for more_s, size, waits in self._traded(split=split)
        )
        return min((excess * more_s / bytes_ for more_s, bytes_ in spared if bytes_ > 0), default=math.inf)


class BaseBound:
    """Lower bounds of the shapes that have a base in common, which differ in their schedules alone.

    `shapes` are those of the pipeline ranks and `limits_bytes` what is safe on each. Where ranks lie on
    different devices, let W be of the fastest, rank r take at least rho_r times as long for every layer, H be
    the sum of 1 / rho_r and k the factor of the schedule. A step takes at least k sum_r R_r and m R_r; the
    combination of both in which work weighs the same on every rank gives

        W k rho / (1 + k (rho H - p) / m)              rho the largest rho_r

    which of few micro-batches is less than W k. What all ranks hold together has to fit into all of them, so
    the limit of each is their mean.
    """

    def __init__(
        self,
        model: CostModel,
        shapes: Sequence[LayoutModel],
        options: tuple[Recompute, ...],
        limits_bytes: Sequence[float],
        offload: Offload = Offload.NONE,
    ) -> None:
        if offload is not Offload.NONE:
            limits_bytes = [float("inf")] * len(limits_bytes)  # what the device need not hold is not counted
        kinds, mean_bytes = {id(shape): shape for shape in shapes}, sum(limits_bytes) / len(limits_bytes)
        each = [_KindBound(model, shape, options, mean_bytes) for shape in kinds.values()]
        degrees = shapes[0].degrees
        m, per_rank = degrees.num_micro_batches, degrees.world // degrees.pp
        fastest = [min(units) for units in zip(*(kind.units_s for kind in each), strict=True)]
        self.whole_s = sum(fastest)
        self.optimizer_s = min(kind.optimizer_s for kind in each)
        self._once_s = 0.0 if model.sharing else min(kind.once_s for kind in each)
        self._kinds, self._layers = each, shapes[0].problem.model.layers
        self._stack = shapes[0].problem.engine_settings
        self._exclusive, self._ends_s = model.sharing is None, (fastest[0], fastest[1])
        known = {key: kind.block_s for key, kind in zip(kinds, each, strict=True)}
        self._block_s = [known[id(shape)] for shape in shapes]
        self._fullest: dict[tuple[int, int], float] = {}
        self.spread_s = 0.0
        if model.sharing:
            self.spread_s = each[0].work_s * m * per_rank / model.sharing.best_throughput(degrees.world)
        slower = {
            key: min(
                (own / best for own, best in zip(kind.units_s, fastest, strict=True) if best > 0), default=1.0
            )
            for key, kind in zip(kinds, each, strict=True)
        }
        self._slowest = max(slower.values())
        self._beyond = self._slowest * sum(1 / slower[id(shape)] for shape in shapes) - degrees.pp

    def of(self, degrees: Degrees) -> float:
        """No strategy of these degrees that fits has a shorter replay; infinite where none fits."""
        live, split = live_under(self._stack, degrees, self._layers), degrees.schedule.splits_every_backward
        again_s = min(kind.again_s(live, split=split) for kind in self._kinds)
        if again_s == float("inf"):
            return again_s
        factor = schedule_factor(degrees)
        if self._beyond > 0:
            factor *= max(1.0, self._slowest / (1 + factor * self._beyond / degrees.num_micro_batches))
        span_s = (self.whole_s + again_s) * factor
        if self._exclusive:
            span_s = max(span_s, degrees.num_micro_batches * self._fullest_s(degrees))
        return float(max(span_s, self.spread_s) + self._once_s * degrees.chunks + self.optimizer_s)

    def even_s(self, degrees: Degrees) -> float:
        """About what even stages take that all recompute what those of the fullest rank must, for which the
        others wait; no bound. Infinite where these do not fit."""
        pipe = degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches
        waits, split = most_waits(self._stack, degrees), degrees.schedule.splits_every_backward
        live = live_on_fullest(*pipe, waits, self._layers)
        again_s = min(kind.again_s(live, split=split) for kind in self._kinds)
        whole_s = max(self.whole_s, degrees.pp * self._fullest_s(degrees)) + again_s
        span_s = max(whole_s * even_factor(degrees), self.spread_s)
        return float(span_s + self._once_s * degrees.chunks + self.optimizer_s)

    def _fullest_s(self, degrees: Degrees) -> float:
        """What the rank that takes longest takes at least for a micro-batch, blocks being whole: each goes
        where it is done first, after one on every stage."""
        key = degrees.chunks, degrees.pp_rank_of_stage(degrees.stages - 1)
        if key not in self._fullest:
            self._fullest[key] = self._dealt_s(*key)
        return self._fullest[key]

    def _dealt_s(self, chunks: int, last: int) -> float:
        ends = [0.0] * len(self._block_s)
        ends[0] += self._ends_s[0]
        ends[last] += self._ends_s[1]
        done = [
            (end_s + (chunks + 1) * block_s, end_s + chunks * block_s, block_s)
            for end_s, block_s in zip(ends, self._block_s, strict=True)
        ]
        heapq.heapify(done)
        for _ in range(self._layers - chunks * len(done)):
            next_s, _, block_s = done[0]
            heapq.heapreplace(done, (next_s + block_s, next_s, block_s))
        return max(so_far_s for _, so_far_s, _ in done)


class _KindBound:
    """The figures of a bound where all ranks lie on one kind of device."""

    def __init__(
        self, model: CostModel, shape: LayoutModel, options: tuple[Recompute, ...], limit_bytes: float
    ) -> None:
        degrees = shape.degrees
        self._recomputing = Recomputing(shape, options, limit_bytes)
        slow = model.sharing.slowdown(degrees.world // degrees.pp) if model.sharing else 1.0
        units = whole_units(shape, options)
        self.units_s = [unit.work_s * slow + unit.fixed_s for unit in units]
        self.work_s = sum(unit.work_s for unit in units)
        self.optimizer_s = _optimizer_bound_s(model, shape)
        self.once_s = least_once_s(shape)
        each = (shape.passes(key, option) for key in shape.classes for option in options)
        self.block_s = min(forward.total_s + backward.total_s for forward, backward in each)

    def again_s(self, live: Live, *, split: bool) -> float:
        """What a micro-batch must at least recompute: with so many in flight, or one of every layer."""
        one = _one_of_each(len(live.alive.sums) - 1)
        return max(self._recomputing.least_s(live, split=split), self._recomputing.least_s(one, split=split))


def step_bound_s(
    model: CostModel, shape: LayoutModel, options: tuple[Recompute, ...], limit_bytes: float = float("inf")
) -> float:
    """No strategy of this shape, on equal devices, that fits into `limit_bytes` has a shorter replay."""
    degrees = shape.degrees
    return BaseBound(model, (shape,) * degrees.pp, options, (limit_bytes,) * degrees.pp).of(degrees)


def schedule_factor(degrees: Degrees) -> float:
    """What a step takes at least, in passes of the whole model."""
    p, m = degrees.pp, degrees.num_micro_batches
    if p == 1:
        return float(m)
    match degrees.schedule:
        case Schedule.GPIPE:
            return 1 + (m - 1) / p
        case Schedule.ONE_F_ONE_B:
            return (m + p - 1) / p if m > p else 1 + (m - 1) / (2 * p)
        case Schedule.INTERLEAVED:
            a = (p - 1) / (2 * degrees.chunks)
            return max(m * (m + 2 * a) / (p * (m + a)), 1.0)
        case Schedule.ZB_H1:
            return float(0.5 / (1 - (1 - 0.5 / m) ** p))
        case Schedule.ZBV | Schedule.DUALPIPEV:
            return max(m / p, 0.5)


def _optimizer_bound_s(model: CostModel, shape: LayoutModel) -> float:
    """The slowest rank's optimizer step is no faster than the mean over ranks."""
    slow = model.sharing.slowdown(shape.degrees.world) if model.sharing else 1.0
    return (shape.constants.step_s + shape.optimizer_s(shape.all_units()) / shape.degrees.pp) * slow


def memory_bound_bytes(shape: LayoutModel) -> float:
    """No strategy of this shape keeps less on its fullest rank: the mean of weights, gradients, state."""
    return least_state_bytes(shape.layer_model, shape.degrees)


def least_state_bytes(layers: LayerModel, degrees: Degrees, offload: Offload = Offload.NONE) -> float:
    """Bytes of weights, optimizer state and gradients on a device, the mean over pipeline ranks.

    Without gradients under FSDP2 where a step has one micro-batch: they come as its activations go.
    """
    model, shards = layers.problem.model, degrees.tp * degrees.pp
    routed = layers.params_routed / (degrees.expert_ranks * degrees.pp)
    dense = (layers.params_total - layers.params_routed) / shards
    ends = min(dense, (model.params_embedding + model.params_head) / shards)  # tied ones count twice there
    states = states_of(layers.problem, degrees)
    if offload is Offload.OPTIMIZER:
        states, _ = offloaded_states(layers.problem, degrees)
    held = states.of(dense + routed, ends, routed)
    engine = layers.problem.engine_settings.engine
    one_by_one = engine in (Engine.NATIVE, Engine.TORCHTITAN) and degrees.num_micro_batches == 1
    return held.total - (held.grads if one_by_one else 0.0)

"""Outlook: about how long a step of each of thousands of shapes takes, all at once, before any is replayed.

With W the passes of the whole model for one micro-batch without data parallelism, p ranks of v stages, m
micro-batches, f the factor of the schedule, and t the slowest rank's part of W, whose
blocks are whole and of which the last has the head:

    step ~ m t + (f - m / p) W + f p R + D

R is what the first rank recomputes, which has most in flight: it holds states s and n micro-batches of 1 / p
of the activations a, n = min(m, p), and interleaved p + (p - 1) / v. What exceeds its limit is recomputed
away by the option that saves most bytes a second, r seconds a byte:

    R = r max(0, s + a n / p - limit) / n

D, messages of data parallelism that do not hide: under ZeRO 3 gathers and reductions of every pass beyond its
compute, else the gradients of a step beyond the last backward. Shapes that cannot fit take for ever. It is no
bound: what is replayed says how near it is.

Scout: a good plan in milliseconds for any number of one offer's nodes.

A search with a certificate takes seconds; a comparison asks of hundreds of clusters. The scout tries usual
choices alone (planner.search.space), an even split of the blocks, and few recomputation mixes:

1. Every usual shape gets its outlook, all at once (planner.search.greedy_plan); passes are shared
between numbers
   of nodes.
2. Each outlook times the ratio that replays of the same choices (all but data parallelism) had to theirs says
   what to replay next. Choices never replayed count by the least ratio seen.
3. Shapes are replayed in that order, until none left promises less than the best.

What replays teach counts for one cluster alone: its plan does not depend on what was asked of others before.
Ratios of other numbers of nodes or other networks misled it: steps took up to twice as long.

Its plan is an estimate of the same cost model as every other; only the choice may be worse than a search's.
`bench/sizing.py` measures by how much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.communication.collectives import overlap_of
from planner.cost.communication.messages import Messages
from planner.cost.constants import TimeConstants, problem_time_constants
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.goodput import Job
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.peak_memory import safe_tensor_bytes
from planner.cost.stage.sharded_layers import layer_sharding
from planner.cost.stage.stage import LayoutModel
from planner.foundation.units import format_bytes
from planner.hardware.cluster import ClusterSpec
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.search.bounds.layout_bounds import least_state_bytes, schedule_factor
from planner.search.layout_search import Found, ShapeSearch
from planner.search.programme.stage_options import RecipeBook
from planner.search.programme.stages import StageSpace
from planner.search.space import Pipe, Space, alone, space_of
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Degrees, Schedule, Zero

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats


MOST_LOOKED_AT = 16
"""Shapes, in order of an outlook with messages by bytes and nominal rates, whose messages are looked at."""

Kind = tuple[object, ...]


class Activations(NamedTuple):
    """Of a kind of shape, for one micro-batch: passes without recomputation, of all, of a block on average
    and of the head; bytes that blocks keep, the most of them that recomputing saves, what a byte costs; and
    what a device holds safely."""

    passes_s: float
    forward_s: float
    block_s: float
    head_s: float
    kept_bytes: float
    savable_bytes: float
    seconds_per_byte: float
    safe_bytes: float


class Shapes(NamedTuple):
    """Shapes that promise most with their outlooks in seconds, how full a device is at least under each, as a
    share of what is safe, and the least bound of all."""

    degrees: list[Degrees]
    seconds: Floats
    fullness: Floats
    bound_s: float


class Outlook:
    """Outlooks on one offer's nodes. What does not depend on their number is remembered."""

    def __init__(self, pins: FixedChoices) -> None:
        self.pins = pins
        self._kinds: dict[Kind, Activations] = {}
        self._factors: dict[tuple[object, ...], float] = {}

    def of(self, model: CostModel, space: Space, states_bytes: Sequence[float]) -> Shapes:
        """The outlooks of a space's shapes; `states_bytes` are what a device holds of weights, gradients and
        optimizer state under each base."""
        import numpy as np

        shapes: list[tuple[Degrees, Pipe]] = []
        rows: list[tuple[float, ...]] = []
        for base, pipes, state in zip(space.bases, space.pipes, states_bytes, strict=True):
            kind, m = self._kind(model, base), base.num_micro_batches
            rough = _rough_s(model, base)
            for pipe in pipes:
                interleaved = pipe[0] is Schedule.INTERLEAVED
                factor = self._factor(base, pipe)
                shapes.append((base, pipe))
                rows.append((*kind, state, *rough, factor, base.pp, m, pipe[1], interleaved))
        if not rows:
            return Shapes([], np.zeros(0), np.zeros(0), math.inf)
        return self._shapes(model, shapes, np.asarray(rows).T)

    def _shapes(self, model: CostModel, shapes: list[tuple[Degrees, Pipe]], columns: Floats) -> Shapes:
        import numpy as np

        passes, forward, block, head, kept, savable, rate, limit = columns[:8]
        state, each, once, factor, p, m, v, interleaved = columns[8:]
        alive = np.minimum(m, p + (p - 1) / v * (interleaved > 0))
        excess = np.maximum(state + kept * alive / p - limit, 0.0)
        again = np.where(excess > 0, rate * excess / alive, 0.0)
        layers = model.problem.model.layers
        most, least = np.ceil(layers / (p * v)) * v, np.floor(layers / (p * v)) * v
        slowest = np.maximum(passes / p, np.maximum(most * block, least * block + head * (p > 1)))
        seconds = m * slowest + (factor - m / p) * passes + factor * p * again
        seconds[excess > savable * alive / p] = math.inf
        fullness = (state + (kept - savable) * alive / p) / limit
        bound_s = float((passes * factor).min())
        whole, shown = passes + p * again, overlap_of(model.problem.profile).shown_s
        rough_s = seconds + shown(each, whole) * m / p + shown(once, (whole - forward) / p)
        kept_ones = rough_s.argsort(kind="stable")[:MOST_LOOKED_AT]
        sent: dict[tuple[object, ...], tuple[float, float]] = {}
        for number in kept_ones[np.isfinite(seconds[kept_ones])]:
            each_s, once_s = self._sent(model, shapes[number][0], sent)
            behind_s = (whole[number] - forward[number]) / p[number]
            shown_s = shown(each_s, whole[number]) * m[number] / p[number] + shown(once_s, behind_s)
            seconds[number] += shown_s
        degrees = [
            dataclasses.replace(shapes[number][0], schedule=shapes[number][1][0], chunks=shapes[number][1][1])
            for number in kept_ones
        ]
        return Shapes(degrees, seconds[kept_ones], fullness[kept_ones], bound_s)

    @staticmethod
    def _sent(
        model: CostModel, degrees: Degrees, known: dict[tuple[object, ...], tuple[float, float]]
    ) -> tuple[float, float]:
        d = degrees
        key = d.tp, d.cp, d.ep, d.etp, d.pp, d.dp_shard, d.dp_replicate, d.zero
        if key not in known:
            known[key] = _sent_s(model, degrees)
        return known[key]

    def _factor(self, base: Degrees, pipe: Pipe) -> float:
        key = *pipe, base.pp, base.num_micro_batches
        if key not in self._factors:
            schedule, chunks = pipe
            self._factors[key] = schedule_factor(dataclasses.replace(base, schedule=schedule, chunks=chunks))
        return self._factors[key]

    def _kind(self, model: CostModel, base: Degrees) -> Activations:
        kind = layer_sharding(base)
        key = model.problem.cluster.network, *(kind if model.sharing else kind[:-1])
        if key not in self._kinds:
            shape = model.layout(alone(kind))
            safe = safe_tensor_bytes(model.problem, model.coverage(shape), shape.runtime_bytes)
            self._kinds[key] = _activations(shape, self.pins.recomputes, safe)
        return self._kinds[key]


def _activations(shape: LayoutModel, options: tuple[Recompute, ...], safe_bytes: float) -> Activations:
    """The figures of the whole model under degrees without data parallelism."""
    layers = shape.problem.model.layers
    ends = (shape.embedding_passes, shape.head_passes)
    passes_s = sum(forward.total_s + backward.total_s for forward, backward in ends)
    forward_s = sum(forward.total_s for forward, _ in ends)
    kept = savable = 0.0
    rates = []
    for key in shape.classes:
        count = shape.count(key, 0, layers)
        costs = {
            option: (shape.passes(key, option), shape.block(key, option).saved_bytes) for option in options
        }
        fastest = min(costs.values(), key=lambda cost: cost[0][1].total_s)
        forward, backward = fastest[0]
        passes_s += count * (forward.total_s + backward.total_s)
        forward_s += count * forward.total_s
        kept += count * fastest[1]
        savable += count * (fastest[1] - min(size for _, size in costs.values()))
        rates += [
            (again.total_s - backward.total_s) / (fastest[1] - size)
            for (_, again), size in costs.values()
            if size < fastest[1]
        ]
    head_s = sum(passes.total_s for passes in shape.head_passes)
    block_s = (passes_s - sum(f.total_s + b.total_s for f, b in ends)) / layers
    rate = min(rates, default=0.0)
    return Activations(passes_s, forward_s, block_s, head_s, kept, savable, rate, safe_bytes)


def _rough_s(model: CostModel, base: Degrees) -> tuple[float, float]:
    """About what `_sent_s` says, from bytes and nominal rates alone: ranks of a node send side by side."""
    if base.replicas == 1:
        return 0.0, 0.0
    cluster, layers = model.problem.cluster, model.layers
    rate, beside = cluster.intra.bytes_per_s, base.tp * base.cp
    if base.weight_shards * base.tp > cluster.devices_per_node and rate and cluster.inter.bytes_per_s:
        rate = min(rate, cluster.inter.bytes_per_s * max(1, cluster.devices_per_node // beside))
    if not rate:
        return 0.0, 0.0
    params = (layers.params_total - layers.params_routed) / base.tp + layers.params_routed / base.expert_ranks
    size = model.problem.workload.precision.compute_bytes
    if base.zero is Zero.PARAMETERS:
        return params * (2 * size + 4) / rate, 0.0
    return 0.0, params * (size + 4) / rate / base.pp


def _sent_s(model: CostModel, base: Degrees) -> tuple[float, float]:
    """Seconds of all messages of data parallelism: in each micro-batch's passes, and once a step."""
    if base.replicas == 1:
        return 0.0, 0.0
    layers = model.layers
    messages = Messages(model.problem, base, model.comms, layers.constants, layers.stream_width)
    units = layers.all_units(base)
    gathers = sum(messages.gather(u.dense_params, u.routed_params).total_s * count for u, count in units)
    reduces = sum(messages.reduce(u).total_s * count for u, count in units)
    if base.zero is Zero.PARAMETERS:
        return 2 * gathers + reduces, 0.0
    if base.zero is Zero.GRADIENTS:
        return reduces, gathers / base.pp
    return 0.0, (reduces + gathers * (base.zero is Zero.OPTIMIZER)) / base.pp


REPLAYED = 4
"""Shapes that are replayed for one cluster at most, of those that fit."""
PROMISE, HOPE = 0.995, 0.95
"""A shape is replayed where it promises less than PROMISE of the best step time. One of a cell that was never
replayed is taken for HOPE times the least ratio of others."""
MIX_PARTS = 8
"""Parts of a stage's blocks that may have options of their own."""

Cell = tuple[object, ...]
"""All choices of a shape but its data parallelism."""


class Scouted(NamedTuple):
    """The best plan found on some nodes, its job, and a time that no usual choice beats."""

    evaluation: Evaluation
    job: Job
    bound_s: float


class Shared:
    """What clusters of one device share in planning one run: networks have the same costs of layers unless
    runs told them apart, and clusters of equal nodes the same shapes, which hold as much state."""

    def __init__(self, pins: FixedChoices, *known: LayerModel) -> None:
        self.pins = pins
        self._layers: dict[TimeConstants, LayerModel] = {layers.constants: layers for layers in known}
        self._spaces: dict[tuple[int, int], Space] = {}
        self._states: dict[Cell, float] = {}

    def space(self, problem: PlanningProblem) -> Space:
        """The usual bases on a cluster. Those without any are made anew: their reasons name the cluster."""
        key = problem.cluster.devices, problem.cluster.devices_per_node
        space = self._spaces.get(key) or space_of(problem, self.pins, usual=True)
        if space.bases:
            self._spaces[key] = space
        return space

    def states_bytes(self, layers: LayerModel, space: Space) -> list[float]:
        """What a device holds of weights, gradients and optimizer state under each base; many share it."""
        found = []
        for d in space.bases:
            key = d.tp, d.ep, d.etp, d.cp, d.pp, d.zero, d.dp_shard, d.num_micro_batches > 1
            if key not in self._states:
                self._states[key] = least_state_bytes(layers, d, self.pins.offloaded)
            found.append(self._states[key])
        return found

    def layers(self, problem: PlanningProblem) -> LayerModel:
        """The costs of layers on a cluster."""
        constants = problem_time_constants(problem)
        if constants not in self._layers:
            self._layers[constants] = LayerModel(problem, constants)
        return self._layers[constants]


class Learned:
    """What replays teach of the other shapes of a cluster."""

    def __init__(self) -> None:
        self._ratios: dict[Cell, float] = {}
        self._fullest: dict[Cell, float] = {}

    def promised_s(self, shapes: Shapes) -> Floats:
        """The step times that replays lead to expect; infinite where one as full did not fit."""
        import numpy as np

        unseen = HOPE * min(self._ratios.values(), default=1.0)
        ratios = np.asarray([self._ratios.get(_cell(d), unseen) for d in shapes.degrees])
        fullest = np.asarray([self._fullest.get(_family(d), math.inf) for d in shapes.degrees])
        return np.where(shapes.fullness < fullest, shapes.seconds * ratios, math.inf)

    def took(self, shapes: Shapes, number: int, step_time_s: float) -> None:
        """Remembers a shape's step time."""
        self._ratios[_cell(shapes.degrees[number])] = step_time_s / float(shapes.seconds[number])

    def full(self, shapes: Shapes, number: int) -> None:
        """Remembers that a shape did not fit: of its family, none that is as full does."""
        family = _family(shapes.degrees[number])
        self._fullest[family] = min(self._fullest.get(family, math.inf), float(shapes.fullness[number]))


class Scout:
    """Plans on clusters of one kind of node, which differ in the number of their nodes alone.

    `problem` is on any of them. `why_not` says of each cluster without a plan, by its name, what stands in
    the way.
    """

    def __init__(self, problem: PlanningProblem, shared: Shared) -> None:
        self.problem, self.shared = problem, shared
        self.why_not: dict[str, str] = {}
        self._outlook = Outlook(shared.pins)

    def plan(self, cluster: ClusterSpec) -> Scouted | None:
        """A plan on a cluster; None where no usual choice keeps the rules and fits."""
        problem = dataclasses.replace(self.problem, cluster=cluster)
        model = CostModel(problem, self.shared.layers(problem))
        space = self.shared.space(problem)
        states = self.shared.states_bytes(model.layers, space)
        kept = [number for number, size in enumerate(states) if size <= problem.memory_limit_bytes]
        if not kept:
            self.why_not[cluster.name] = _why_not(space, states, problem.memory_limit_bytes)
            return None
        fitting = dataclasses.replace(
            space,
            bases=tuple(space.bases[number] for number in kept),
            pipes=tuple(space.pipes[number] for number in kept),
        )
        shapes = self._outlook.of(model, fitting, [states[number] for number in kept])
        best = self._best(model, shapes)
        if best is None:
            self.why_not[cluster.name] = "no usual choice fits into memory with its activations"
            return None
        return Scouted(best, model.job(best), shapes.bound_s)

    def _best(self, model: CostModel, shapes: Shapes) -> Evaluation | None:
        """The best of the shapes that promise most."""
        import numpy as np

        best: Found | None = None
        open_, learned, replayed = np.isfinite(shapes.seconds), Learned(), 0
        while replayed < REPLAYED and open_.any():
            promised_s = np.where(open_, learned.promised_s(shapes), math.inf)
            number = int(promised_s.argmin())
            to_beat_s = math.inf if best is None else best.step_time_s * PROMISE
            if not promised_s[number] < to_beat_s:
                break
            open_[number] = False
            found = self._replayed(model, shapes.degrees[number])
            if found is None:
                learned.full(shapes, number)
                continue
            replayed += 1
            learned.took(shapes, number, found.step_time_s)
            if best is None or found.step_time_s < best.step_time_s:
                best = found
        evaluation = None if best is None else model.evaluate(best.strategy)
        return evaluation if evaluation and evaluation.estimate.verdict is Verdict.SAFE else None

    def _replayed(self, model: CostModel, degrees: Degrees) -> Found | None:
        """An even split of a shape with recipes that are SAFE; None where none is."""
        shape = model.layout(degrees)
        limit = safe_tensor_bytes(model.problem, model.coverage(shape), shape.runtime_bytes)
        pins = self.shared.pins
        book = RecipeBook(shape, pins.recomputes, pins.offloaded, MIX_PARTS)
        space = StageSpace(model, shape, (limit,) * degrees.pp, (book,) * degrees.pp)
        return ShapeSearch(space).even()


def _why_not(space: Space, states_bytes: list[float], limit_bytes: int) -> str:
    """Why no base is left: what they hold at least, or the last rule that cut them off."""
    if states_bytes:
        return (
            f"weights, gradients and optimizer state take at least {format_bytes(min(states_bytes))} "
            f"of {format_bytes(limit_bytes)} a device"
        )
    return space.rejected[-1].detail if space.rejected else "no strategy keeps the rules"


def _cell(d: Degrees) -> Cell:
    spread = d.dp_shard < d.dp
    return d.tp, d.cp, d.ep, d.pp, d.micro_batch, d.zero, spread, d.schedule, d.chunks


def _family(d: Degrees) -> Cell:
    """Choices on which it depends how much more a device holds than its outlook says."""
    return d.tp, d.cp, d.ep, d.micro_batch, d.zero, d.pp > 1, d.schedule, d.chunks

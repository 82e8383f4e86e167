"""Which global shapes exist for a problem: every legal combination of degrees, and why others are not.

Candidates come from divisors, one degree after the other. A rule is asked as soon as the degrees that it
speaks of are chosen, so that what it cuts off is never made: that counts once, by the rule. What is left is a
base, which all schedules of one pipeline share, with the schedules that it may run. Fixed choices narrow the
candidates before they are made.

    tp, sequence parallelism, cp and its exchange, ep, expert tp      divisors
    pp, data parallelism                                              divisors of what is left
    micro-batch                                                       divisors up to MAX_MICRO_BATCH
    ZeRO stage, shards over all data ranks, one node, or NVLink domain
    schedule, stages a rank                                           up to MAX_CHUNKS

Context parallelism is a candidate where a sequence has MIN_SPLIT tokens and every rank keeps MIN_TOKENS of
it, since below that no ring hides behind attention.

Bases that another base beats in everything: it takes no more time and no more memory.

Bases that differ in sequence parallelism or in the exchange of context parallelism alone have the same
weights, the same data parallelism and the same pipeline. Where the passes of every layer with every option,
what they keep, what they hold for a moment, and the message between stages are no larger under one than under
the other, no strategy of the other is better: it is left out, unless it is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations, product

from planner.cost.evaluate import CostModel
from planner.cost.stage.sharded_layers import LayerSharding, layer_sharding
from planner.foundation.frozen import frozen, replaced
from planner.foundation.suggest import divisors
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.profile.profile import LayerKind
from planner.strategy.engines.engine_rules import (
    candidate_schedules,
    engine_rules,
    engine_strategy_rules,
    problem_refused,
)
from planner.strategy.estimate import Rejected
from planner.strategy.fixed_choices import MAX_CHUNKS, MAX_MICRO_BATCH, MAX_ORDERED, FixedChoices
from planner.strategy.parallel_rules import experts_within_replicas
from planner.strategy.placement import is_mixed
from planner.strategy.rules import (
    EXPERT_RULES,
    LAYER_RULES,
    PIPELINE_RULES,
    SEQUENCE_RULES,
    DegreesRule,
    batch_divides,
    groups_ordered,
    offload_possible,
    world_matches,
    zero_matches_shards,
)
from planner.strategy.strategy import Degrees, Offload, Schedule, Strategy, Zero, even_stages, offloaded

MAX_TOKENS = 65536
"""Nor are those with more tokens on a rank, but for single sequences."""
MAX_ODD = 3
"""Micro-batches are powers of two, or as much as this times one: products of odd sizes fill no tiles."""

USUAL_MICRO_BATCH, USUAL_CHUNKS, USUAL_PIPELINE = 8, 2, 32
USUAL_TOKENS_OF_RANK = 16384
USUAL_SPLIT, USUAL_TOKENS = 32768, 8192
USUAL_EPS = (4, 8, 16, 32, 64)
USUAL_SCHEDULES = (Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED)
"""What a search among usual choices has: see space_of."""

CLOCKED = 64
"""Bases that are made between two looks at the clock."""
MIN_TOKENS = 2048
"""Tokens of a sequence that context parallelism leaves to a rank at least, unless it is pinned."""
MIN_SPLIT = 8192
"""Sequences below this are split where that is pinned only: micro-batches get small enough without."""


Pipe = tuple[Schedule, int]
"""A schedule and the stages that each rank holds under it."""


@frozen
class Space:
    """Bases, each with the schedules that it may run, and what rules cut off.

    A base is the degrees of a shape under 1F1B, whether or not that is among its schedules. A space that is
    not `complete` was cut short by the clock.
    """

    bases: tuple[Degrees, ...]
    pipes: tuple[tuple[Pipe, ...], ...]
    rejected: tuple[Rejected, ...]
    complete: bool = True

    def shapes(self) -> Iterator[Degrees]:
        """Every legal shape."""
        for base, pipes in zip(self.bases, self.pipes, strict=True):
            for schedule, chunks in pipes:
                yield replaced(base, schedule=schedule, chunks=chunks)


def space_of(
    problem: PlanningProblem,
    pins: FixedChoices,
    expired: Callable[[], bool] = lambda: False,
    *,
    usual: bool = False,
) -> Space:
    """All bases of a problem that are made before time expires, and every cut by the rule that made it.

    `usual` leaves out what seldom wins: tp beyond a node or without sequence parallelism, cp for sequences
    below USUAL_SPLIT and in other ways than a ring, ep besides USUAL_EPS, experts split by tp, ZeRO 0 and 2
    where there is data parallelism, micro-batches above USUAL_MICRO_BATCH or USUAL_TOKENS_OF_RANK, pipelines
    longer than USUAL_PIPELINE, and schedules besides 1F1B and interleaving by USUAL_CHUNKS. What is pinned is
    not left out.
    """
    maker = _Maker(problem, pins, usual=usual)
    bases, complete = [], True
    for number, base in enumerate(maker.bases()):
        bases.append(base)
        if number % CLOCKED == 0 and expired():
            complete = False
            break
    return Space(
        complete=complete,
        bases=tuple(base for base, _ in bases),
        pipes=tuple(pipes for _, pipes in bases),
        rejected=tuple(maker.rejected),
    )


def shapes(problem: PlanningProblem, pins: FixedChoices) -> Iterator[Degrees | Rejected]:
    """Every legal shape, then what rules cut off."""
    space = space_of(problem, pins)
    yield from space.shapes()
    yield from space.rejected


class _Maker:
    def __init__(self, problem: PlanningProblem, pins: FixedChoices, *, usual: bool = False) -> None:
        self.problem, self.pins, self.usual = problem, pins, usual
        self.devices, self.batch = problem.cluster.devices, problem.workload.batch
        self.rejected: list[Rejected] = problem_refused(problem)
        self.engine_rules = engine_rules(problem.limits.engine)
        self.pipes = cache(self._pipes)

    def _keeps(self, rules: tuple[DegreesRule, ...], degrees: Degrees) -> bool:
        """Whether degrees keep some rules; the first that they break is noted."""
        for rule in rules:
            rejected = rule(self.problem, degrees)
            if rejected is not None:
                self.rejected.append(rejected)
                return False
        return True

    def bases(self) -> Iterator[tuple[Degrees, tuple[Pipe, ...]]]:
        """Legal bases; none where the engine can run the problem by no plan."""
        if self.rejected:
            return
        for layers in self._layers():
            for pp in self._pps():
                split = layers.tp * layers.cp * pp
                dp = self.pins.dp if self.pins.dp is not None else max(1, self.devices // split)
                for order in self._orders(pp):
                    whole = replaced(layers, pp=pp, dp_replicate=dp, device_order=order)
                    if self._keeps((world_matches, groups_ordered), whole) and self._fills(whole):
                        yield from self._with_data(whole)

    def _orders(self, pp: int) -> list[tuple[int, ...]]:
        """Orders of a mixed cluster's groups along the pipeline: all of up to MAX_ORDERED groups."""
        groups = range(len(self.problem.cluster.groups))
        if self.pins.device_order is not None:
            return [self.pins.device_order]
        if pp == 1 or not is_mixed(self.problem.cluster):
            return [()]
        if len(groups) > MAX_ORDERED:
            return [(), tuple(reversed(groups))]
        return [order if order != tuple(groups) else () for order in permutations(groups)]

    def _fills(self, degrees: Degrees) -> bool:
        """Whether data ranks have equal numbers of sequences."""
        if self.batch % degrees.dp == 0:
            return True
        return self._keeps((batch_divides,), degrees)

    def _layers(self) -> Iterator[Degrees]:
        """How one layer is split: everything but the pipeline and data parallelism."""
        pins, experts = self.pins, bool(self.problem.model.experts)
        most = self.problem.cluster.devices_per_node if self.usual else self.devices
        for tp in _candidates(pins.tp, [tp for tp in divisors(self.devices) if tp <= most]):
            if not self._keeps(LAYER_RULES, Degrees(tp=tp)):
                continue
            for split in self._sequences(tp):
                if not self._keeps(SEQUENCE_RULES, split):
                    continue
                etps = [pins.etp] if pins.etp is not None or not experts or tp == 1 else [1, None]
                etps = etps[:1] if self.usual else etps
                for ep, etp in product(self._eps(), etps):
                    degrees = replaced(split, ep=ep, etp=etp)
                    if self._keeps(EXPERT_RULES, degrees):
                        yield degrees

    def _sequences(self, tp: int) -> Iterator[Degrees]:
        pins, seq = self.pins, self.problem.workload.seq
        parallel = [False, True][self.usual :] if tp > 1 else [False]
        if pins.sequence_parallel is not None:
            parallel = [pins.sequence_parallel]
        least, kept = (USUAL_SPLIT, USUAL_TOKENS) if self.usual else (MIN_SPLIT, MIN_TOKENS)
        cps = [cp for cp in divisors(self.devices) if cp == 1 or seq >= max(least, cp * kept)]
        for sequence_parallel, cp in product(parallel, _candidates(pins.cp, cps)):
            exchanges = list(CpExchange) if cp > 1 and not self.usual else [CpExchange.RING]
            for exchange in exchanges if pins.cp_exchange is None else [pins.cp_exchange]:
                yield Degrees(tp=tp, sequence_parallel=sequence_parallel, cp=cp, cp_exchange=exchange)

    def _eps(self) -> list[int]:
        counts = [experts.count for experts in self.problem.model.experts]
        if self.pins.ep is not None or not counts:
            return [self.pins.ep or 1]
        eps = [ep for ep in divisors(math.gcd(*counts)) if ep <= self.devices]
        return [ep for ep in eps if ep == 1 or ep in USUAL_EPS] if self.usual else eps

    def _pps(self) -> list[int]:
        layers = self.problem.model.layers
        most = min(layers, USUAL_PIPELINE) if self.usual else layers
        return _candidates(self.pins.pp, [pp for pp in divisors(self.devices) if pp <= most])

    def _with_data(self, whole: Degrees) -> Iterator[tuple[Degrees, tuple[Pipe, ...]]]:
        """Micro-batches, and what is shared out over which data ranks."""
        local = self.batch // whole.dp
        tokens = self.problem.workload.seq / whole.cp
        largest = USUAL_MICRO_BATCH if self.usual else MAX_MICRO_BATCH
        most = max(1, min(largest, int((USUAL_TOKENS_OF_RANK if self.usual else MAX_TOKENS) / tokens)))
        micro_batches = [size for size in divisors(local) if size <= most and _odd_part(size) <= MAX_ODD]
        spreads = whole.ep > 1 or whole.expert_tp != whole.tp
        shardings = [
            replaced(whole, zero=zero, dp_shard=shard, dp_replicate=whole.dp // shard)
            for zero, shard in self._shardings(whole)
        ]
        shardings = [
            degrees
            for degrees in shardings
            if self._keeps((zero_matches_shards, experts_within_replicas)[: 1 + spreads], degrees)
        ]
        for micro_batch in _candidates(self.pins.micro_batch, micro_batches):
            m = max(1, local // micro_batch)
            if local % micro_batch:
                self._keeps((batch_divides,), replaced(whole, micro_batch=micro_batch))
                continue
            pipes, cut = self.pipes(whole.pp, m)
            self.rejected += cut
            if not self._offloads(whole):
                continue
            for degrees in shardings if pipes else []:
                base = replaced(degrees, micro_batch=micro_batch, num_micro_batches=m)
                kept = self._for_engine(base, pipes) if self.engine_rules else pipes
                if kept:
                    yield base, kept

    def _offloads(self, whole: Degrees) -> bool:
        """Whether what is pinned to host memory may lie there."""
        if self.pins.offloaded is Offload.NONE:
            return True
        even = offloaded(even_stages(self.problem.model.layers, whole.pp), self.pins.offloaded)
        broken = offload_possible(self.problem, Strategy(degrees=whole, stages=even))
        self.rejected += broken[:1]
        return not broken

    def _for_engine(self, base: Degrees, pipes: tuple[Pipe, ...]) -> tuple[Pipe, ...]:
        """The schedules of a base that the engine of the problem runs."""
        shaped = ((pipe, replaced(base, schedule=pipe[0], chunks=pipe[1])) for pipe in pipes)
        return tuple(
            pipe
            for pipe, degrees in shaped
            if self._keeps(self.engine_rules, degrees) and self._engine_offloads(degrees)
        )

    def _engine_offloads(self, degrees: Degrees) -> bool:
        """Whether the engine sends what is pinned to host memory there, by some option of recomputation."""
        what, layers = self.pins.offloaded, self.problem.model.layers
        if what is Offload.NONE or degrees.stages > layers:
            return True
        broken: list[Rejected] = []
        for option in self.pins.recomputes:
            stages = offloaded(even_stages(layers, degrees.stages, option), what)
            strategy = Strategy(degrees=degrees, stages=stages)
            rules = engine_strategy_rules(self.problem.limits.engine)
            found = (rule(self.problem, strategy) for rule in rules)
            rejected = next((fault for fault in found if fault is not None), None)
            if rejected is None:
                return True
            broken.append(rejected)
        self.rejected += broken[:1]
        return False

    def _shardings(self, whole: Degrees) -> list[tuple[Zero, int]]:
        """ZeRO stages with their shard degree: all data ranks, or those of one node (hybrid sharding)."""
        dp, pinned = whole.dp, self.pins.zero
        zeros = list(Zero) if pinned is None else [Zero(pinned)]
        if self.usual and pinned is None and dp * whole.cp > 1:
            zeros = [Zero.OPTIMIZER, Zero.PARAMETERS]
        if dp * whole.cp == 1:
            return [(zero, 1) for zero in zeros if zero is Zero.NONE or pinned is not None]
        within = self.problem.cluster.devices_per_node // (whole.tp * whole.cp)
        shards = {dp} | ({within} if 1 < within < dp and dp % within == 0 else set())
        return [(z, s) for z in zeros for s in (sorted(shards) if z is not Zero.NONE else [1])]

    def _pipes(self, pp: int, m: int) -> tuple[tuple[Pipe, ...], list[Rejected]]:
        """Schedules with their stages a rank; without a pipeline there is one, and it is nominal."""
        before = len(self.rejected)
        legal = []
        for schedule, chunks in self._schedules(pp):
            degrees = Degrees(pp=pp, num_micro_batches=m, schedule=schedule, chunks=chunks)
            if self._keeps(PIPELINE_RULES, degrees):
                legal.append((schedule, chunks))
        cut = self.rejected[before:]
        del self.rejected[before:]
        return tuple(legal), cut

    def _schedules(self, pp: int) -> Iterator[Pipe]:
        pins = self.pins
        if pp == 1 and pins.schedule is None:
            yield Schedule.ONE_F_ONE_B, pins.chunks or 1
            return
        open_ = candidate_schedules(self.problem.limits.engine)
        if self.usual:
            open_ = tuple(s for s in open_ if s in USUAL_SCHEDULES) or open_
        most = USUAL_CHUNKS if self.usual else MAX_CHUNKS
        for schedule in open_ if pins.schedule is None else (pins.schedule,):
            if schedule is Schedule.INTERLEAVED:
                counts = _candidates(pins.chunks, list(range(2, most + 1)))
            elif pins.chunks is not None and pins.schedule is not None:
                counts = [pins.chunks]
            else:
                counts = [schedule.least_chunks] if pins.chunks in (None, schedule.least_chunks) else []
            for count in counts:
                yield schedule, count


def _odd_part(number: int) -> int:
    """What is left of a number when it is halved as often as it can be."""
    return number // (number & -number)


def _candidates(pin: int | None, values: list[int]) -> list[int]:
    return values if pin is None else [pin]


def alone(kind: LayerSharding) -> Degrees:
    """Degrees of a kind without data parallelism."""
    tp, sequence_parallel, micro_batch, cp, exchange, ep, etp, devices = kind
    return Degrees(
        tp=tp,
        pp=devices // (tp * cp),
        sequence_parallel=sequence_parallel,
        micro_batch=micro_batch,
        cp=cp,
        cp_exchange=exchange,
        ep=ep,
        etp=etp,
    )


def without_dominated(
    model: CostModel,
    space: Space,
    options: tuple[Recompute, ...],
    expired: Callable[[], bool] = lambda: False,
) -> tuple[Space, int]:
    """The space without bases that others dominate, and how many shapes those had; all once time expired."""
    siblings: dict[tuple[object, ...], list[int]] = {}
    for number, base in enumerate(space.bases):
        siblings.setdefault(_but_variant(base), []).append(number)
    figures: dict[LayerSharding, tuple[float, ...]] = {}
    better: dict[tuple[LayerSharding, LayerSharding], bool] = {}

    def beats(one: LayerSharding, other: LayerSharding) -> bool:
        if (one, other) not in better and expired():
            return False
        if (one, other) not in better:
            for kind in (one, other):
                if kind not in figures:
                    figures[kind] = _figures(model, kind, options)
            better[one, other] = all(a <= b for a, b in zip(figures[one], figures[other], strict=True))
        return better[one, other]

    kept: list[int] = []
    for numbers in siblings.values():
        kinds = [layer_sharding(space.bases[number]) for number in numbers]
        kept += [
            number
            for place, number in enumerate(numbers)
            if not any(
                beats(kind, kinds[place]) and (rank < place or not beats(kinds[place], kind))
                for rank, kind in enumerate(kinds)
                if rank != place
            )
        ]
    kept.sort()
    left = Space(
        bases=tuple(space.bases[number] for number in kept),
        pipes=tuple(space.pipes[number] for number in kept),
        rejected=space.rejected,
        complete=space.complete,
    )
    return left, sum(map(len, space.pipes)) - sum(map(len, left.pipes))


def _but_variant(d: Degrees) -> tuple[object, ...]:
    return (
        (d.tp, d.pp, d.dp_replicate, d.dp_shard, d.cp, d.ep, d.etp),
        (d.zero, d.micro_batch, d.num_micro_batches, d.device_order),
    )


def _figures(model: CostModel, kind: LayerSharding, options: tuple[Recompute, ...]) -> tuple[float, ...]:
    """Seconds and bytes of every layer, on every kind of device, without data parallelism."""
    found: list[float] = []
    for own in model.kinds:
        shape = own.layout(alone(kind))
        layers = [
            (shape.passes(key, option), shape.block(key, option))
            for key in shape.classes
            for option in options
        ]
        layers.append((shape.embedding_passes, shape.layer(LayerKind.EMBEDDING)))
        layers.append((shape.head_passes, shape.layer(LayerKind.HEAD)))
        for (forward, backward), cost in layers:
            found += [forward.total_s, backward.total_s, backward.recompute_s, cost.saved_bytes]
            found += [cost.forward_transient_bytes, cost.backward_transient_bytes]
        found.append(
            shape.messages.message_bytes() / (shape.degrees.tp if shape.degrees.sequence_parallel else 1)
        )
    return tuple(found)

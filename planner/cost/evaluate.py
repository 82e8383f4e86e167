"""evaluate(): the estimate of one strategy, from the inputs alone. Pure.

The step time is the replay of the strategy's own action table; the memory is that of the rank nearest to its
limit. In a mixed cluster each pipeline rank has the costs and the limit of its own devices
(planner.strategy.placement), and every message between ranks takes as long as over the slowest link.

How much of a layout's time rests on which origin: measured, interpolated, fitted, datasheet.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from planner.cost.communication.collectives import CommCost, CommModel
from planner.cost.compute.weight_gradients import trained_flops_per_token
from planner.cost.constants import fitted_constant, problem_time_constants
from planner.cost.goodput import Job, job_figures, job_of
from planner.cost.layer import Pass
from planner.cost.memory.activations import most_waits
from planner.cost.replay import PathTimes, Replay, kind_passes, replay, sharing_of
from planner.cost.stage.layer_cost import ORIGINS, LayerModel
from planner.cost.stage.offload import with_offload
from planner.cost.stage.peak_memory import RankMemory, band, host_bytes, most_pressed, rank_memory
from planner.cost.stage.sharded_layers import SharedCosts, tensor_exchanges
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.foundation.frozen import frozen, replaced
from planner.foundation.units import DAY_S
from planner.job.problem import PlanningProblem
from planner.profile.profile import LayerKind, Op
from planner.strategy.estimate import Coverage, Estimate, MemoryBreakdown, StageEstimate, TimeBreakdown
from planner.strategy.placement import Groups, device_names, is_mixed, rank_groups, seen_from, stage_groups
from planner.strategy.schedule.schedules import ActionKind, Table, build_table, in_flight
from planner.strategy.schedule.table import Flights
from planner.strategy.strategy import Degrees, Schedule, Strategy

TIME_ERROR = {"measured": 0.10, "interpolated": 0.15, "fitted": 0.25, "datasheet": 0.40}
"""Half width of the step-time interval by origin, as a share. Measured: what bench/results holds for the
shipped CPU runs; the others widen until they are calibrated."""

NINE_IN_TEN = 1.645
"""Standard deviations within which 90 % of a normal distribution lie: intervals are of so many."""


def origins_s(layout: LayoutModel) -> dict[str, float]:
    """Seconds of one micro-batch by origin: the layers of the model and their communication."""
    seconds: defaultdict[str, float] = defaultdict(float)
    blocks = {key: layout.count(key, 0, layout.problem.model.layers) for key in layout.classes}
    counted = [(layout.block(key), count) for key, count in blocks.items()]
    counted += [(layout.layer(LayerKind.EMBEDDING), 1), (layout.layer(LayerKind.HEAD), 1)]
    for cost, count in counted:
        seconds[cost.origin] += count * (cost.forward_s + cost.backward_s)
    for key, count in blocks.items():
        cp = layout.sharded_layers.exchanged(key)
        spread_s = cp.forward_s + cp.backward_s + layout.sharded_layers.experts(key).both_s
        if spread_s > 0:
            seconds[layout.messages.spread_origin()] += count * spread_s
    for message, times in _messages(layout, blocks):
        seconds[message.origin] += times * message.seconds
    return seconds


def _messages(layout: LayoutModel, blocks: dict[str, int]) -> list[tuple[CommCost, float]]:
    """Those over tensor-parallel and data ranks, with how often a micro-batch has them."""
    degrees, own = layout.degrees, layout.messages
    found: list[tuple[CommCost, float]] = []
    if degrees.tp > 1:
        op = Op.ALL_GATHER if degrees.sequence_parallel else Op.ALL_REDUCE
        settings = layout.problem.engine_settings
        sums = sum(
            sum(tensor_exchanges(layout.classes[key], degrees, settings)) * n for key, n in blocks.items()
        )
        found.append((own.comm(op, own.hidden_bytes(), own.tp_group()), float(sums)))
    if degrees.replicas > 1:
        group = own.shard_group() if degrees.weight_shards > 1 else own.replicate_group()
        for key, count in blocks.items():
            message = own.comm(Op.ALL_REDUCE, 4.0 * layout.block_units[key].trained, group)
            found.append((message, count / degrees.num_micro_batches))
    return found


@frozen
class Evaluation:
    """An estimate with what it was made of."""

    strategy: Strategy
    estimate: Estimate
    stages: tuple[StageEstimate, ...]
    table: Table
    replay: Replay


class CostModel:
    """The cost model of one planning problem. It remembers layer costs between calls.

    `layers` are those of a problem that differs in its batch or its nodes at most, whose costs are shared;
    without them they are made, with the constants that the problem's profile has. Kinds of devices of a mixed
    cluster have models of their own, made when a pipeline rank lies on one.
    """

    def __init__(self, problem: PlanningProblem, layers: LayerModel | None = None) -> None:
        self.problem = problem
        self.layers = layers or LayerModel(problem, problem_time_constants(problem))
        self.comms = CommModel(problem)
        self.sharing = sharing_of(problem)
        self._layouts: dict[Degrees, LayoutModel] = {}
        self.shared = SharedCosts()
        self._seen: dict[Groups, CostModel] = {}

    def layout(self, degrees: Degrees) -> LayoutModel:
        """The stage costs under `degrees`, where the slowest devices govern all ranks.

        Schedules of one pipeline, and orders of groups, share them.
        """
        plain = replaced(degrees, schedule=Schedule.ONE_F_ONE_B, chunks=1, device_order=())
        if plain not in self._layouts:
            slow = self.sharing.slowdown(degrees.world) if self.sharing else 1.0
            self._layouts[plain] = LayoutModel(
                self.problem, plain, self.layers, self.comms, slow, self.shared
            )
        return self._layouts[plain].scheduled(degrees)

    def rank_layouts(self, degrees: Degrees) -> tuple[LayoutModel, ...]:
        """The stage costs of each pipeline rank, one object for ranks on equal devices.

        In a cluster of one kind, and wherever all ranks touch all groups, it is that of `layout`.
        """
        models = [self.seen_from(groups) for groups in rank_groups(self.problem.cluster, degrees)]
        layouts = {id(model): model.layout(degrees) for model in {id(m): m for m in models}.values()}
        return tuple(layouts[id(model)] for model in models)

    @property
    def kinds(self) -> list[CostModel]:
        """The models of ranks in one group of the cluster, one for each kind; itself where one is."""
        cluster = self.problem.cluster
        if not is_mixed(cluster):
            return [self]
        models = [self.seen_from((group,)) for group in range(len(cluster.groups))]
        return list({id(model): model for model in models}.values())

    @property
    def limits_bytes(self) -> list[int]:
        """The memory limit of each kind of device."""
        return [model.problem.memory_limit_bytes for model in self.kinds]

    def seen_from(self, groups: Groups) -> CostModel:
        """The model of ranks that lie on some groups of the cluster; itself where there is no other kind."""
        if groups not in self._seen:
            problem = seen_from(self.problem, groups)
            known = (model for model in (self, *self._seen.values()) if model.problem == problem)
            self._seen[groups] = next(known, None) or CostModel(problem)
        return self._seen[groups]

    def stage_costs(self, layout: LayoutModel, strategy: Strategy) -> tuple[StageCost, ...]:
        """The cost of each stage of a strategy of a layout, on the devices of its pipeline rank."""
        return _placed_costs(self._placed(layout), strategy)

    def _placed(self, layout: LayoutModel) -> tuple[LayoutModel, ...]:
        """The layout of each pipeline rank, where `layout` is that of the slowest devices."""
        if len(self.problem.cluster.groups) == 1:
            return (layout,) * layout.degrees.pp
        return self.rank_layouts(layout.degrees)

    def table(self, degrees: Degrees) -> Table:
        """The table of a layout. Layouts of one pipeline share it, with its order."""
        return build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)

    def in_flight(self, degrees: Degrees) -> tuple[Flights, ...]:
        """For every pipeline rank, what is in flight by stage at its fullest moments."""
        pipe = degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches
        return in_flight(*pipe, most_waits(self.problem.engine_settings, degrees))

    def replay(
        self,
        layout: LayoutModel,
        table: Table,
        costs: tuple[StageCost, ...],
        cell_s: list[float] | None = None,
    ) -> Replay:
        """The replay of a table under these costs, whose seconds by stage and kind may be known."""
        per_rank = layout.degrees.world // layout.degrees.pp
        step_s = max(kind.layers.constants.step_s for kind in self.kinds)
        return replay(table, costs, layout.messages.p2p_s(), self.sharing, per_rank, step_s, cell_s)

    def hops_s(self, layout: LayoutModel, costs: tuple[StageCost, ...], replayed: Replay) -> float:
        """What the step would be shorter by if messages between stages took no time."""
        if layout.messages.p2p_s() == 0.0:
            return 0.0
        if isinstance(replayed.times, PathTimes):
            free = replaced(replayed, times=replayed.times.without_messages())
        else:
            per_rank = layout.degrees.world // layout.degrees.pp
            free = replay(replayed.table, costs, 0.0, self.sharing, per_rank, layout.constants.step_s)
        return replayed.step_time_s - free.step_time_s

    def evaluate(self, strategy: Strategy, table: Table | None = None) -> Evaluation:
        """The estimate of a strategy that keeps the rules, run by its schedule's table or by another."""
        degrees = strategy.degrees
        layout = self.layout(degrees)
        layouts = self._placed(layout)
        table = self.table(degrees) if table is None else table
        costs = _placed_costs(layouts, strategy)
        replayed = self.replay(layout, table, costs)
        ranks = memory_of_ranks(layouts, table, costs)
        breakdown = time_breakdown(replayed, table, costs, self.hops_s(layout, costs, replayed))
        return Evaluation(
            strategy=strategy,
            estimate=replaced(
                self._estimate(replayed, breakdown, layouts, ranks, _doubt(layouts, strategy)),
                job=job_figures(layout, costs, replayed.step_time_s, breakdown),
            ),
            stages=self._stages(strategy, costs, ranks, layouts),
            table=table,
            replay=replayed,
        )

    def job(self, done: Evaluation) -> Job:
        """The inputs of an evaluated strategy's goodput: for other overheads or prices, only
        planner.cost.goodput.figures_of has to run again."""
        layout = self.layout(done.strategy.degrees)
        costs = self.stage_costs(layout, done.strategy)
        return job_of(layout, costs, done.estimate.step_time_s, done.estimate.breakdown)

    def _stages(
        self,
        strategy: Strategy,
        costs: tuple[StageCost, ...],
        ranks: list[RankMemory],
        layouts: tuple[LayoutModel, ...],
    ) -> tuple[StageEstimate, ...]:
        memory, degrees = _by_stage(ranks), strategy.degrees
        placed = stage_groups(self.problem.cluster, degrees, len(costs))
        limits = [layout.problem.memory_limit_bytes for layout in layouts]
        return tuple(
            StageEstimate(
                memory=memory[index],
                time_s=degrees.num_micro_batches * (cost.forward.total_s + cost.backward.total_s),
                forward_s=cost.forward.total_s,
                backward_s=cost.backward.total_s,
                device=device_names(self.problem.cluster, placed[index]),
                memory_limit_bytes=limits[degrees.pp_rank_of_stage(index)],
            )
            for index, cost in enumerate(costs)
        )

    def coverage(self, layout: LayoutModel) -> Coverage:
        """How much of a layout's time rests on which origin."""
        return self._coverage((layout,))

    def _coverage(self, layouts: Sequence[LayoutModel]) -> Coverage:
        """The same where each layout has an equal part of the model."""
        counts = Counter(map(id, layouts))
        seconds = dict.fromkeys(ORIGINS, 0.0)
        for layout in {id(layout): layout for layout in layouts}.values():
            share = counts[id(layout)] / len(layouts)
            for origin, value in origins_s(layout).items():
                seconds[origin] += share * value
        total = sum(seconds.values()) or 1.0
        return Coverage(**{origin: seconds[origin] / total for origin in ORIGINS})

    def _estimate(
        self,
        replayed: Replay,
        breakdown: TimeBreakdown,
        layouts: tuple[LayoutModel, ...],
        ranks: list[RankMemory],
        doubt: float,
    ) -> Estimate:
        workload, cluster = self.problem.workload, self.problem.cluster
        step_s = replayed.step_time_s
        tokens_per_s = workload.tokens_per_step / step_s
        kinds = {id(layout): layout for layout in layouts}.values()
        known = [(layout, self.coverage(layout)) for layout in kinds]
        error = max(_time_error(layout.problem, breakdown, coverage, doubt) for layout, coverage in known)
        memory = most_pressed(layouts, ranks, known)
        seconds = workload.tokens / tokens_per_s if workload.tokens else None
        price = cluster.price_usd_per_hour
        return Estimate(
            step_time_s=step_s,
            step_time_interval_s=(step_s * (1 - error), step_s * (1 + error)),
            tokens_per_s=tokens_per_s,
            mfu=self._mfu(tokens_per_s),
            days=seconds / DAY_S if seconds is not None else None,
            cost_usd=price * seconds / 3600 if price is not None and seconds is not None else None,
            breakdown=breakdown,
            peak_memory_bytes=memory.peak_bytes,
            memory_limit_bytes=memory.limit_bytes,
            verdict=memory.verdict,
            coverage=self._coverage(layouts),
            memory=memory.figures,
            peak_memory_interval_bytes=memory.interval_bytes,
        )

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs over the dense peak of all devices, where the peak is known."""
        workload, cluster = self.problem.workload, self.problem.cluster
        peaks = [group.device.peak_flops(workload.precision) for group in cluster.groups]
        if any(peak is None for peak in peaks):
            return None
        total = math.fsum((peak or 0.0) * g.devices for peak, g in zip(peaks, cluster.groups, strict=True))
        return float(trained_flops_per_token(self.problem.model, workload) * tokens_per_s / total)


def _placed_costs(layouts: tuple[LayoutModel, ...], strategy: Strategy) -> tuple[StageCost, ...]:
    ranks = (strategy.degrees.pp_rank_of_stage(index) for index in range(len(strategy.stages)))
    placed = ((layouts[rank], stage) for rank, stage in zip(ranks, strategy.stages, strict=True))
    return tuple(with_offload(layout, stage, layout.stage(stage)) for layout, stage in placed)


def _doubt(layouts: Sequence[LayoutModel], strategy: Strategy) -> float:
    """How little runs tell of the strategy's blocks, of the one that they tell least of."""
    options = {option for stage in strategy.stages for option in stage.recompute.options()}
    kinds = {id(layout): layout for layout in layouts}.values()
    blocks = itertools.product(kinds, options)
    doubts = (
        layout.layer_model.doubt(layout.shape_of(LayerKind.BLOCK, option, key))
        for layout, option in blocks
        for key in layout.classes
    )
    return max(doubts, default=0.0)


def _time_error(
    problem: PlanningProblem, breakdown: TimeBreakdown, coverage: Coverage, doubt: float
) -> float:
    """Half width of the step time's interval, as a share of it.

    What a calibration left out speaks for messages only where its runs told of some; else their share of
    the step is as uncertain as any that no run of this cluster speaks for; and so is a step on a device that
    none of its runs was on. It speaks for blocks as its runs had them: others are in `doubt` besides.
    """
    fitted = fitted_constant(problem, "time_error")
    if fitted is None:
        return band(TIME_ERROR, coverage)
    devices = problem.profile.devices if problem.profile else ()
    if any(devices) and problem.device.name not in devices:
        fitted = max(fitted, TIME_ERROR["fitted"])
    fitted = math.hypot(fitted, NINE_IN_TEN * doubt)
    known = band(TIME_ERROR | {"fitted": fitted}, coverage)
    if any(fitted_constant(problem, name) is not None for name in ("tp_scale", "dp_scale")):
        return known
    sent_s = sum(getattr(breakdown, f"{axis}_comm_s") for axis in ("tp", "cp", "ep", "dp", "pp"))
    share = sent_s / breakdown.total_s if breakdown.total_s else 0.0
    return (1 - share) * known + share * TIME_ERROR["fitted"]


def memory_of_ranks(
    layouts: Sequence[LayoutModel], table: Table, costs: tuple[StageCost, ...]
) -> list[RankMemory]:
    """Memory of every pipeline rank, each of its own layout."""
    ranks = []
    for rank, layout in enumerate(layouts):
        held = {stage: costs[stage] for stage in table.stages_of(rank)}
        vectors = table.in_flight(rank, most_waits(layout.problem.engine_settings, layout.degrees))
        ranks.append(RankMemory(held, rank_memory(layout, vectors, held), host_bytes(vectors, held)))
    return ranks


def _by_stage(ranks: list[RankMemory]) -> list[MemoryBreakdown]:
    memory = {index: part for rank in ranks for index, part in rank.parts.items()}
    return [memory[index] for index in range(len(memory))]


def predicted_memory_bytes(evaluation: Evaluation, kind: str) -> int:
    """The predicted peak of a kind: allocated, reserved, or device, which is the driver's."""
    figures = evaluation.estimate.memory
    assert figures is not None, "every evaluation has them"
    known = {
        "allocated": figures.allocated_bytes,
        "reserved": figures.reserved_bytes,
        "device": figures.device_bytes,
    }
    return known[kind]


def time_breakdown(
    replayed: Replay, table: Table, costs: tuple[StageCost, ...], pp_comm_s: float
) -> TimeBreakdown:
    """Seconds by cause on the busiest pipeline rank; what it waits is the bubble. Sums to the step time.

    `pp_comm_s` is what the step would be shorter by if messages between stages took no time.
    """
    each = {id(cost): kind_passes(cost) for cost in costs}  # few stages differ
    passes = [each[id(cost)] for cost in costs]
    busy = [_busy(rank, replayed, table, passes) for rank in range(len(table))]
    busiest = max(busy, key=lambda breakdown: breakdown.total_s)
    idle_s = replayed.step_time_s - busiest.total_s
    if idle_s < 1e-12 * replayed.step_time_s:  # the dust of adding floats in another order
        idle_s = 0.0
    exposed_s = min(max(pp_comm_s, 0.0), idle_s)
    return busiest + TimeBreakdown(pp_comm_s=exposed_s, bubble_s=idle_s - exposed_s)


def _busy(
    rank: int, replayed: Replay, table: Table, passes: Sequence[dict[ActionKind, Pass]]
) -> TimeBreakdown:
    total = TimeBreakdown()
    stretch = replayed.stretch[rank]
    for (stage, kind), times in table.counts(rank).items():
        passing = passes[stage][kind]
        total += TimeBreakdown(
            compute_s=passing.compute_s * stretch * times,
            recompute_s=passing.recompute_s * stretch * times,
            host_s=passing.host_s * stretch * times,
            tp_comm_s=passing.tp_s * times,
            dp_comm_s=passing.dp_s * times,
            cp_comm_s=passing.cp_s * times,
            ep_comm_s=passing.ep_s * times,
        )
    copied_s = replayed.copied_s[rank]
    messages_s = replayed.unshard_s[rank] + replayed.reduce_s[rank] - copied_s
    once = TimeBreakdown(tp_comm_s=copied_s, dp_comm_s=messages_s, optimizer_s=replayed.optimizer_s[rank])
    return total + once

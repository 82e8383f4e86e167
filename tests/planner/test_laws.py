"""Laws of the cost model, over grids of strategies."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from planner.cost.comm import CommModel, Group
from planner.cost.compute import LayerModel, LayerShape
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.physics import physics_of
from planner.problem import PlanningProblem
from planner.profile import LayerKind, Op
from planner.rules import broken_rules
from planner.search.space import Pins, shapes
from planner.strategy import Degrees, Recompute, Strategy, Zero, even_stages
from planner.workload import Precision

from . import instances


def evaluated(problem: PlanningProblem, degrees: Degrees, recompute: Recompute) -> Evaluation:
    """The estimate of degrees with even stages."""
    stages = even_stages(problem.model.layers, degrees.stages, recompute)
    strategy = Strategy(degrees=degrees, stages=stages)
    assert broken_rules(problem, strategy) == []
    return CostModel(problem).evaluate(strategy)


def grid(problem: PlanningProblem) -> list[Degrees]:
    """Every legal shape of a problem."""
    return [shape for shape in shapes(problem, Pins()) if isinstance(shape, Degrees)]


PROBLEM = instances.problem(on=instances.cluster(nodes=2, per_node=2), batch=8)


def test_the_grid_is_not_trivial() -> None:
    """The laws below run over tensor, pipeline and data parallelism together."""
    degrees = grid(PROBLEM)
    assert len(degrees) >= 100
    assert any(d.tp > 1 and d.pp > 1 for d in degrees)
    assert any(d.dp_replicate > 1 and d.dp_shard > 1 for d in degrees)


def test_one_device_has_no_communication_and_no_bubble() -> None:
    """Identity."""
    problem = instances.problem(on=instances.cluster(per_node=1))
    breakdown = evaluated(
        problem, Degrees(micro_batch=2, num_micro_batches=4), Recompute.NONE
    ).estimate.breakdown
    assert breakdown.compute_s > 0
    for name in ("tp_comm_s", "dp_comm_s", "pp_comm_s", "bubble_s", "recompute_s"):
        assert getattr(breakdown, name) == 0.0


def test_causes_and_tenants_add_up() -> None:
    """The breakdown sums to the step time, memory parts to the peak; stages hold each layer once."""
    for degrees in grid(PROBLEM):
        result = evaluated(PROBLEM, degrees, Recompute.NONE)
        estimate = result.estimate
        assert estimate.breakdown.total_s == pytest.approx(estimate.step_time_s, rel=1e-9)
        ranks = [0] * degrees.pp
        for index, stage in enumerate(result.stages):
            ranks[degrees.pp_rank_of_stage(index)] += stage.memory.total_bytes
        assert max(ranks) == estimate.peak_memory_bytes
        covered = [layer for s in result.strategy.stages for layer in range(s.first, s.end)]
        assert covered == list(range(PROBLEM.model.layers))
        coverage = estimate.coverage
        shares = dataclasses.astuple(coverage)
        assert sum(shares) == pytest.approx(1.0)


def scaled(factor: float) -> PlanningProblem:
    """The problem on devices and links `factor` times as fast."""
    on = PROBLEM.cluster
    group = on.groups[0]
    fast = instances.device(flops=1e12 * factor, bandwidth=1e11 * factor)
    links = [
        dataclasses.replace(
            link, bytes_per_s=(link.bytes_per_s or 0) * factor, latency_s=link.latency_s / factor
        )
        for link in (on.intra, on.inter)
    ]
    cluster = dataclasses.replace(
        on, groups=(dataclasses.replace(group, device=fast),), intra=links[0], inter=links[1]
    )
    return dataclasses.replace(PROBLEM, cluster=cluster)


def test_faster_is_never_slower() -> None:
    """Monotone in the speed of devices and links, for every strategy."""
    fast = scaled(4.0)
    for degrees in grid(PROBLEM)[::7]:
        slow_s = evaluated(PROBLEM, degrees, Recompute.FULL).estimate.step_time_s
        assert evaluated(fast, degrees, Recompute.FULL).estimate.step_time_s <= slow_s * (1 + 1e-12)


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    """Composition, on every group size and message size."""
    comms = CommModel(PROBLEM)
    for ranks, size, spans in itertools.product((2, 3, 4, 64), (1e3, 1e6, 1e9), (False, True)):
        group = Group(ranks=ranks, groups=1, spans_nodes=spans)
        whole = comms.cost(Op.ALL_REDUCE, size, group).seconds
        parts = [comms.cost(op, size, group).seconds for op in (Op.REDUCE_SCATTER, Op.ALL_GATHER)]
        assert whole == pytest.approx(sum(parts))


def test_more_bytes_and_less_bandwidth_are_never_cheaper() -> None:
    """Monotone in the message and in the link."""
    slow = dataclasses.replace(PROBLEM, cluster=instances.cluster(nodes=2, per_node=2, link_bytes_per_s=1e9))
    for op in Op:
        group = Group(ranks=2, groups=1, spans_nodes=False)
        sizes = [10.0**exponent for exponent in range(1, 10)]
        seconds = [CommModel(PROBLEM).cost(op, size, group).seconds for size in sizes]
        assert seconds == sorted(seconds)
        slower = [CommModel(slow).cost(op, size, group).seconds for size in sizes]
        assert all(a <= b for a, b in zip(seconds, slower, strict=True))


def test_recomputing_trades_time_for_memory() -> None:
    """None, selective, full: never faster, never larger, for blocks of every width and precision."""
    for precision, (tp, sp) in itertools.product(Precision, [(1, False), (2, False), (2, True), (4, True)]):
        problem = instances.problem(precision=precision)
        layers = LayerModel(problem, physics_of(None, problem.stack))
        costs = [
            layers.cost(
                LayerShape(
                    kind=LayerKind.BLOCK,
                    tp=tp,
                    sequence_parallel=sp,
                    micro_batch=2,
                    seq=128,
                    precision=precision,
                    recompute=option,
                )
            )
            for option in Recompute
        ]
        assert [c.backward_s for c in costs] == sorted(c.backward_s for c in costs)
        assert [c.saved_bytes for c in costs] == sorted((c.saved_bytes for c in costs), reverse=True)


def test_zero_stages_share_more_and_more() -> None:
    """Each ZeRO stage keeps no more resident bytes than the one before, shards sum to the model."""
    problem = instances.problem(precision=Precision.FP32)
    last = float("inf")
    for zero in Zero:
        degrees = Degrees(
            dp_replicate=4 if zero is Zero.NONE else 1,
            dp_shard=1 if zero is Zero.NONE else 4,
            zero=zero,
            micro_batch=1,
            num_micro_batches=2,
        )
        memory = evaluated(problem, degrees, Recompute.NONE).stages[0].memory
        if zero is Zero.PARAMETERS:
            assert 4 * memory.weights_bytes == pytest.approx(4 * problem.model.params_total, rel=1e-6)
        if zero is not Zero.NONE:
            assert 4 * memory.optimizer_bytes == pytest.approx(8 * problem.model.params_total, rel=1e-6)
        resident = memory.grads_bytes + memory.optimizer_bytes
        assert resident <= last
        last = resident


def test_equal_nodes_may_be_renamed() -> None:
    """Symmetry: the device's name changes nothing."""
    renamed = instances.problem(
        on=instances.cluster(nodes=2, per_node=2, of=instances.device(name="other")), batch=8
    )
    for degrees in grid(PROBLEM)[::29]:
        a, b = (evaluated(p, degrees, Recompute.NONE).estimate for p in (PROBLEM, renamed))
        assert a == b

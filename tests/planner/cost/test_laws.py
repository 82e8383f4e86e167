"""Laws of the cost model, over grids of strategies."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter

import pytest

from planner.cost.communication.collectives import CommModel, Group
from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.stage.layer_cost import LayerModel, LayerShape
from planner.hardware.cluster import Link
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, Op
from planner.search.space import shapes
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances


def evaluated(problem: PlanningProblem, degrees: Degrees, recompute: Recompute) -> Evaluation:
    """The estimate of degrees with even stages."""
    stages = even_stages(problem.model.layers, degrees.stages, recompute)
    strategy = Strategy(degrees=degrees, stages=stages)
    assert broken_rules(problem, strategy) == []
    return CostModel(problem).evaluate(strategy)


def grid(problem: PlanningProblem) -> list[Degrees]:
    """Every legal shape of a problem."""
    return [shape for shape in shapes(problem, FixedChoices()) if isinstance(shape, Degrees)]


PROBLEM = instances.problem(on=instances.cluster(nodes=2, per_node=2), batch=8)


def test_the_grid_is_not_trivial() -> None:
    """The laws below run over tensor, pipeline and data parallelism together."""
    degrees = grid(PROBLEM)
    assert len(degrees) >= 100
    assert any(d.tp > 1 and d.pp > 1 for d in degrees)
    assert any(d.dp_replicate > 1 and d.dp_shard > 1 for d in degrees)


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize(("micro_batch", "num_micro_batches"), [(4, 2), (2, 4), (8, 1), (1, 8)])
def test_one_device_has_no_communication_and_no_bubble(
    micro_batch: int, num_micro_batches: int, recompute: Recompute
) -> None:
    """Identity: the step is the work of its micro-batches and the optimizer."""
    problem = instances.problem(on=instances.cluster(per_node=1))
    degrees = Degrees(micro_batch=micro_batch, num_micro_batches=num_micro_batches)
    result = evaluated(problem, degrees, recompute)
    breakdown = result.estimate.breakdown
    assert breakdown.compute_s > 0
    assert (breakdown.recompute_s > 0) is (recompute is not Recompute.NONE)
    for name in ("tp_comm_s", "cp_comm_s", "ep_comm_s", "dp_comm_s", "pp_comm_s", "bubble_s"):
        assert getattr(breakdown, name) == 0.0
    assert result.stages[0].time_s + breakdown.optimizer_s == pytest.approx(breakdown.total_s)


def test_a_network_that_takes_no_time_leaves_no_communication() -> None:
    """Identity: with free links no strategy communicates, and pipelines still have their bubble.

    Where backward passes are split, the busiest rank may have none to wait for.
    """
    free = Link(name="none", latency_s=0.0, bytes_per_s=None)
    on = dataclasses.replace(PROBLEM.cluster, intra=free, inter=free)
    problem, bubbles = dataclasses.replace(PROBLEM, cluster=on), 0
    for degrees in grid(problem)[::3]:
        breakdown = evaluated(problem, degrees, Recompute.NONE).estimate.breakdown
        assert breakdown.tp_comm_s == breakdown.dp_comm_s == breakdown.pp_comm_s == 0.0, degrees.label()
        if degrees.pp == 1 or not degrees.schedule.splits_backward:
            assert (breakdown.bubble_s > 0) is (degrees.pp > 1), degrees.label()
        bubbles += breakdown.bubble_s > 0
    assert bubbles >= 10


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


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_speeds_times_k_are_times_over_k(factor: float) -> None:
    """Homogeneity: devices, links and the host k times as fast divide every cause by k, bytes stay."""
    fast = scaled(factor)
    usual = time_constants_of(None, PROBLEM.engine_settings)
    seconds = [name for name in usual.__dataclass_fields__ if name.endswith("_s")]
    quick = dataclasses.replace(usual, **{name: getattr(usual, name) / factor for name in seconds})
    assert len(seconds) >= 5
    for degrees in grid(PROBLEM)[::3]:
        stages = even_stages(PROBLEM.model.layers, degrees.stages, Recompute.SELECTIVE)
        strategy = Strategy(degrees=degrees, stages=stages)
        slow = CostModel(PROBLEM, LayerModel(PROBLEM, usual)).evaluate(strategy).estimate
        found = CostModel(fast, LayerModel(fast, quick)).evaluate(strategy).estimate
        assert factor * found.step_time_s == pytest.approx(slow.step_time_s, rel=1e-9)
        for name in type(slow.breakdown).__dataclass_fields__:
            expected = pytest.approx(getattr(slow.breakdown, name), rel=1e-6, abs=1e-9 * slow.step_time_s)
            assert factor * getattr(found.breakdown, name) == expected, (name, degrees.label())
        assert (found.memory, found.peak_memory_bytes) == (slow.memory, slow.peak_memory_bytes)


def test_every_pass_is_replayed_once() -> None:
    """Conservation: a rank's events do not overlap, and last as long as its passes and its waiting."""
    for degrees in grid(PROBLEM)[::5]:
        result = evaluated(PROBLEM, degrees, Recompute.NONE)
        for rank in range(degrees.pp):
            held = [s for s in range(degrees.stages) if degrees.pp_rank_of_stage(s) == rank]
            events = [e for e in result.replay.rank_events(rank) if e.kind in ("forward", "backward")]
            passes = Counter(found for event in events for found in re.findall(r"\d+[FBIW]\d+", event.name))
            for stage, micro_batch in itertools.product(held, range(degrees.num_micro_batches)):
                forward, whole, inputs, weights = (passes.pop(f"{stage}{k}{micro_batch}", 0) for k in "FBIW")
                assert forward == 1 and (whole, inputs, weights) in {(1, 0, 0), (0, 1, 1)}
            assert not passes
            busy_s = sum(event.duration_s for event in events)
            assert busy_s == pytest.approx(sum(result.stages[s].time_s for s in held))
            for before, after in itertools.pairwise(events):
                assert after.start_s >= (before.start_s + before.duration_s) * (1 - 1e-9)


def test_parameters_of_all_shards_are_the_models() -> None:
    """Conservation: over stages and tensor ranks, matrices count once; vectors once a tensor rank."""
    total = PROBLEM.model.params_total
    for degrees in grid(PROBLEM):
        model = CostModel(PROBLEM)
        shape = model.layout(degrees)
        strategy = Strategy(degrees=degrees, stages=even_stages(PROBLEM.model.layers, degrees.stages))
        held = degrees.tp * sum(cost.params for cost in model.stage_costs(shape, strategy))
        assert total * (1 - 1e-12) <= held <= total * (1 + 0.02 * (degrees.tp - 1)), degrees.label()
        assert degrees.tp > 1 or held == pytest.approx(total, rel=1e-12)


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
        layers = LayerModel(problem, time_constants_of(None, problem.engine_settings))
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


def test_equal_nodes_may_be_renamed_and_regrouped() -> None:
    """Symmetry: neither the device's name nor how equal nodes are listed changes anything."""
    on = PROBLEM.cluster
    (group,) = on.groups
    other = dataclasses.replace(group, device=dataclasses.replace(group.device, name="other"))
    single = dataclasses.replace(group, nodes=1)
    clusters = [dataclasses.replace(on, groups=groups) for groups in ((other,), (single, single))]
    for degrees in grid(PROBLEM)[::7]:
        first = evaluated(PROBLEM, degrees, Recompute.NONE).estimate
        for cluster in clusters:
            problem = dataclasses.replace(PROBLEM, cluster=cluster)
            assert evaluated(problem, degrees, Recompute.NONE).estimate == first


def test_kinds_of_nodes_may_be_listed_in_any_order() -> None:
    """Symmetry: of a mixed cluster, too, only the order counts in which ranks are laid over its groups."""
    on = PROBLEM.cluster
    slow = dataclasses.replace(on.groups[0], nodes=1)
    quick = dataclasses.replace(slow, device=instances.device(flops=2e12, bandwidth=3e11, name="quick"))
    mixed = [
        dataclasses.replace(PROBLEM, cluster=dataclasses.replace(on, groups=groups))
        for groups in ((slow, quick), (quick, slow))
    ]
    for degrees in grid(PROBLEM)[::29]:
        turned = dataclasses.replace(degrees, device_order=(1, 0))
        assert rejected_or_estimated(mixed[0], degrees) == rejected_or_estimated(mixed[1], turned)


def rejected_or_estimated(problem: PlanningProblem, degrees: Degrees) -> object:
    strategy = Strategy(degrees=degrees, stages=even_stages(problem.model.layers, degrees.stages))
    rules = [rejected.rule for rejected in broken_rules(problem, strategy)]
    return rules or CostModel(problem).evaluate(strategy).estimate

"""Expert parallelism: laws of its shards, products, messages and state, and its rules."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from planner.cost.communication.expert_parallel import distinct_parts, expert_pass
from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.stage.layer_cost import LayerModel
from planner.job.engine_settings import Dispatch, Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Recompute
from planner.search.bounds.layout_bounds import memory_bound_bytes
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

EXPERTS = Experts(
    count=16,
    topk=2,
    expert=Mlp(width=1024, gated=True, activation=Activation.SILU),
    shared=Mlp(width=512, gated=True, activation=Activation.SILU),
)


def mixture(experts: Experts = EXPERTS, layers: int = 4) -> ModelSpec:
    block = dataclasses.replace(instances.dense_block(512, 8), mlp=experts)
    return instances.model(hidden=512, heads=8, vocab=1024, blocks=[block] * layers)


def problem(
    per_node: int = 16,
    nodes: int = 1,
    *,
    of: ModelSpec | None = None,
    settings: EngineSettings | None = None,
    **kwargs: float,
) -> PlanningProblem:
    on = instances.cluster(
        per_node=per_node,
        nodes=nodes,
        of=instances.device(flops=1e14, bandwidth=1e12),
        **kwargs,  # type: ignore[arg-type]
    )
    made = instances.problem(of=of or mixture(), on=on, seq=1024, batch=32, limit_bytes=1 << 40)
    return dataclasses.replace(made, engine_settings=settings or EngineSettings(engine=Engine.MEGATRON))


def spread(ep: int, tp: int = 1, etp: int | None = None, **kwargs: object) -> Degrees:
    """Sixteen devices, experts over ep x etp of them."""
    dp = 16 // tp
    return Degrees(
        tp=tp, ep=ep, etp=etp, dp_shard=dp, zero=Zero.OPTIMIZER, num_micro_batches=32 // dp,
        sequence_parallel=tp > 1, **kwargs,  # type: ignore[arg-type]
    )  # fmt: skip


def evaluated(of: PlanningProblem, degrees: Degrees, recompute: Recompute = Recompute.NONE) -> Evaluation:
    strategy = Strategy(degrees=degrees, stages=even_stages(of.model.layers, degrees.stages, recompute))
    assert broken_rules(of, strategy) == []
    return CostModel(of).evaluate(strategy)


LAYOUTS = [
    spread(ep, tp, etp)
    for ep, tp, etp in itertools.product((1, 2, 4, 8, 16), (1, 2, 4), (None, 1, 2))
    if 16 % (ep * (etp or tp)) == 0 and (etp or tp) <= tp
]


def test_the_grid_holds_every_kind_of_layout() -> None:
    assert len(LAYOUTS) >= 25
    assert any(d.ep > 1 and d.expert_tp == d.tp > 1 for d in LAYOUTS)
    assert any(d.ep > 1 and d.expert_tp < d.tp for d in LAYOUTS)


def test_one_expert_rank_is_the_identity() -> None:
    """ep = 1 with shards as of the rest is what plain data and tensor parallelism cost."""
    for tp in (1, 2, 4):
        plain = dataclasses.replace(spread(1, tp), etp=None)
        assert evaluated(problem(), plain).estimate == evaluated(problem(), spread(1, tp, tp)).estimate
        assert evaluated(problem(), plain).estimate.breakdown.ep_comm_s == 0.0


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: d.label())
def test_shards_sum_to_the_model(degrees: Degrees) -> None:
    """Routed experts over ep x etp ranks, the rest over tp, norms whole."""
    shape = CostModel(problem()).layout(degrees)
    block = mixture().segments[0].block
    assert isinstance(block, Block)
    unit = next(iter(shape.block_units.values()))
    assert unit.routed_params * degrees.expert_ranks == pytest.approx(block.params_routed)
    norms = 2 * 512
    router = 512 * 16
    dense = (unit.dense_params - norms - router) * degrees.tp + norms + router
    assert dense + block.params_routed == pytest.approx(block.params)
    assert degrees.expert_replicas * degrees.expert_ranks == degrees.replicas * degrees.tp


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: d.label())
def test_state_over_all_ranks_is_that_of_the_model(degrees: Degrees) -> None:
    """Masters and moments, 12 bytes a parameter, lie once on all ranks, whoever holds the experts."""
    shape = CostModel(problem()).layout(degrees)
    unit = next(iter(shape.block_units.values()))
    each = shape.states.of(unit.params, 0.0, unit.routed_params).optimizer
    whole = 12 * (unit.dense_params * degrees.tp + unit.routed_params * degrees.expert_ranks)
    assert each * degrees.world == pytest.approx(whole)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: d.label())
def test_products_of_experts_over_ranks_are_those_of_all_tokens(degrees: Degrees) -> None:
    """Where products run at one rate and loads are even, experts take the same whatever their layout."""
    from planner.cost.compute.products import routed_s

    settings = EngineSettings(engine=Engine.MEGATRON, balanced=True)
    of = problem(settings=settings)
    layers = LayerModel(of, time_constants_of(None, settings))
    assert layers.rates is not None
    rates = dataclasses.replace(layers.rates, by_shape=None)
    block = mixture().segments[0].block
    assert isinstance(block, Block)
    shape = CostModel(of).layout(degrees).shape_of(shape_kind(), Recompute.NONE, "")
    up = next(matrix for matrix in block.matrices() if matrix.routed)
    rows = 1024 * 2
    inputs, outputs = up.shard(shape.expert_tp)
    padded = (1 + 96 / outputs) * (1 + 96 / inputs)
    expected = 2 * rows * 512 * 1024 / degrees.tp * padded / rates.flops
    assert routed_s(up, shape, rates) == pytest.approx(expected)


def shape_kind() -> object:
    from planner.profile.profile import LayerKind

    return LayerKind.BLOCK


def test_uneven_loads_slow_experts_and_forced_balance_does_not() -> None:
    own = EngineSettings(engine=Engine.MEGATRON)
    even = dataclasses.replace(own, balanced=True)
    for ep, slower in ((1, False), (4, True)):
        uneven_s, even_s = (
            evaluated(problem(settings=settings), spread(ep)).estimate.step_time_s for settings in (own, even)
        )
        assert (uneven_s > even_s * 1.01) is slower


def test_distinct_parts_against_counting() -> None:
    """Of E experts in p parts, those that hold one of k: every choice counted."""
    for count, parts, topk in ((8, 4, 2), (8, 2, 3), (6, 3, 4), (12, 4, 1)):
        size = count // parts
        choices = list(itertools.combinations(range(count), topk))
        mean = sum(len({expert // size for expert in chosen}) for chosen in choices) / len(choices)
        assert distinct_parts(count, topk, parts) == pytest.approx(mean)
    assert distinct_parts(64, 6, 1) == 1
    assert distinct_parts(64, 6, 64) == pytest.approx(6)


def test_sending_once_a_rank_is_never_dearer() -> None:
    draw = random.Random(11)
    for _ in range(20):
        per_node = draw.choice([2, 4, 8])
        topk, ep = draw.choice([1, 2, 4, 8]), draw.choice([2, 4, 8, 16])
        experts = dataclasses.replace(EXPERTS, topk=topk)
        seconds = []
        for dispatch in (Dispatch.ALL_TO_ALL, Dispatch.DEDUPLICATED):
            settings = EngineSettings(engine=Engine.MEGATRON, dispatch=dispatch)
            of = problem(per_node, 16 // per_node, of=mixture(experts), settings=settings)
            messages = CostModel(of).layout(spread(ep)).messages
            seconds.append(expert_pass(messages, experts, 512).forward_s)
        assert 0 < seconds[1] <= seconds[0] * (1 + 1e-9)


def test_messages_fall_with_bandwidth_and_rise_with_topk() -> None:
    for degrees in (spread(4), spread(16), spread(4, 2, 1), spread(2, 2, 2)):
        by_rate = [
            evaluated(problem(link_bytes_per_s=rate), degrees).estimate.breakdown.ep_comm_s
            for rate in (1e9, 1e10, 1e11)
        ]
        assert by_rate == sorted(by_rate, reverse=True) and by_rate[-1] > 0
        by_topk = [
            evaluated(
                problem(of=mixture(dataclasses.replace(EXPERTS, topk=topk))), degrees
            ).estimate.breakdown.ep_comm_s
            for topk in (1, 2, 8)
        ]
        assert by_topk == sorted(by_topk)


def test_dispatch_in_fp8_sends_half_one_way() -> None:
    def seconds(bytes_: int | None) -> float:
        settings = EngineSettings(engine=Engine.MEGATRON, dispatch_bytes=bytes_)
        shape = CostModel(problem(settings=settings, latency_s=1e-12)).layout(spread(4))
        return expert_pass(shape.messages, EXPERTS, 512).forward_s

    assert seconds(1) == pytest.approx(0.75 * seconds(None), rel=1e-3)


def test_latent_experts_send_the_latent() -> None:
    latent = dataclasses.replace(EXPERTS, latent=128)
    messages = CostModel(problem(latency_s=1e-12)).layout(spread(4)).messages
    assert expert_pass(messages, latent, 512).forward_s == pytest.approx(
        expert_pass(messages, EXPERTS, 512).forward_s / 4, rel=1e-3
    )


def test_experts_over_nodes_take_the_slower_link() -> None:
    inside = evaluated(problem(16), spread(16)).estimate.breakdown.ep_comm_s
    across = evaluated(problem(4, 4), spread(16)).estimate.breakdown.ep_comm_s
    assert across > inside


def test_more_expert_ranks_hold_less_and_reduce_less() -> None:
    shapes = [CostModel(problem()).layout(spread(ep)) for ep in (1, 2, 4, 8, 16)]
    held = [next(iter(shape.block_units.values())).params for shape in shapes]
    assert held == sorted(held, reverse=True)
    reduced = [sum(each.dp_s for each in shape.reduces.values()) for shape in shapes]
    assert reduced == sorted(reduced, reverse=True)
    bounds = [memory_bound_bytes(shape) for shape in shapes]
    assert bounds[-1] < bounds[0]


def test_memory_bound_lies_below_the_estimate() -> None:
    for degrees in LAYOUTS:
        model = CostModel(problem())
        stages = even_stages(4, 1)
        peak = model.evaluate(Strategy(degrees=degrees, stages=stages)).estimate.peak_memory_bytes
        assert memory_bound_bytes(model.layout(degrees)) <= peak


def test_recomputing_a_block_sends_once_more() -> None:
    shape = CostModel(problem()).layout(spread(4))
    key = next(iter(shape.classes))
    plain, full = (shape.passes(key, option) for option in (Recompute.NONE, Recompute.FULL))
    assert full[1].ep_s == pytest.approx(2 * plain[1].ep_s)
    assert full[0].ep_s == plain[0].ep_s == plain[1].ep_s


def test_experts_apart_leave_the_tensor_parallel_sums() -> None:
    """Without shared experts only attention's result is summed over tensor-parallel ranks."""
    alone = mixture(dataclasses.replace(EXPERTS, shared=None))
    slow = 1e7  # so that messages take longer than the device waits for its host
    tied, apart = (
        evaluated(problem(of=alone, link_bytes_per_s=slow), spread(4, 2, etp)).estimate.breakdown.tp_comm_s
        for etp in (2, 1)
    )
    beside = evaluated(problem(link_bytes_per_s=slow), spread(4, 2, 1)).estimate.breakdown.tp_comm_s
    assert apart == pytest.approx(tied, rel=1e-3)
    assert tied < beside


@pytest.mark.parametrize(
    ("degrees", "rule", "legal"),
    [
        (spread(3), "ep_divides_experts", "1, 2, 4, 8, 16"),
        (
            dataclasses.replace(spread(16), dp_shard=8, num_micro_batches=4),
            "ep_within_replicas",
            "1, 2, 4, 8",
        ),
        (
            dataclasses.replace(spread(4, 2, 1), sequence_parallel=False),
            "etp_needs_sequence_parallel",
            "sequence_parallel=true",
        ),
        (spread(2, 2, 3), "etp_divides_experts", "1, 2, 4, 8, 16"),
    ],
)
def test_rules_say_the_numbers_and_what_is_legal(degrees: Degrees, rule: str, legal: str) -> None:
    of = problem(degrees.world)
    found = {
        each.rule: each for each in broken_rules(of, Strategy(degrees=degrees, stages=even_stages(4, 1)))
    }
    assert rule in found, list(found)
    assert found[rule].legal.startswith(legal)


def test_a_dense_model_has_no_experts_to_share_out() -> None:
    of = problem(of=instances.model())
    broken = broken_rules(of, Strategy(degrees=spread(2), stages=even_stages(4, 1)))
    assert "ep_needs_experts" in [each.rule for each in broken]


def test_causes_add_up_over_the_grid() -> None:
    for degrees, recompute in itertools.product(LAYOUTS, Recompute):
        estimate = evaluated(problem(), degrees, recompute).estimate
        assert math.isclose(estimate.breakdown.total_s, estimate.step_time_s, rel_tol=1e-9)
        assert min(dataclasses.astuple(estimate.breakdown)) >= 0
        assert (estimate.breakdown.ep_comm_s > 0) is (
            degrees.ep > 1 or degrees.expert_tp not in (1, degrees.tp)
        )

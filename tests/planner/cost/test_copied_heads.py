"""Fewer key-value heads than tensor-parallel ranks: each has a whole one, copies are summed once a step."""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.evaluate import CostModel
from planner.hardware.catalog import load_model
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention
from planner.model.lora import layer_adapter_params
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import AdapterModules, Adapters
from planner.search.bounds.layout_bounds import memory_bound_bytes, step_bound_s
from planner.search.least_memory import survey
from planner.search.solve import solve
from planner.search.space import shapes
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances
from tests.planner.brute_force import EXACT, brute_force

HIDDEN, DIM, LAYERS = 256, 32, 4


def grouped(kv_heads: int, *, heads: int = 8) -> ModelSpec:
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=DIM)
    block = dataclasses.replace(instances.dense_block(HIDDEN), mixer=mixer)
    return instances.model(hidden=HIDDEN, vocab=1024, blocks=[block] * LAYERS)


def problem(model: ModelSpec, per_node: int = 8) -> PlanningProblem:
    on = instances.cluster(per_node=per_node, of=instances.device(flops=1e14, bandwidth=1e12))
    return instances.problem(of=model, on=on, limit_bytes=1 << 40)


def block_of(model: ModelSpec) -> Block:
    block = model.block(0)
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_rank_holds_a_whole_head(kv_heads: int) -> None:
    """Of 8 ranks each has a query head, a key head and a value head; the model's own count stays."""
    model = grouped(kv_heads)
    block = block_of(model)
    widths = 3 * DIM * HIDDEN + DIM * HIDDEN + 3 * 3 * HIDDEN * HIDDEN / 8
    assert block.params_shard(8) == widths + 2 * HIDDEN
    copied = 2 * DIM * HIDDEN
    assert block.params_copied(8) == ({} if kv_heads == 8 else {8 // kv_heads: copied})
    assert block.params == grouped(8).block(0).params - 2 * (8 - kv_heads) * DIM * HIDDEN
    adapters = Adapters(rank=4, modules=AdapterModules.QKV)
    assert layer_adapter_params(adapters, block, 8) == 4 * 3 * (HIDDEN + DIM)


DEGREES = {
    "tp8": Degrees(tp=8, num_micro_batches=8),
    "tp4-sp-zero1": Degrees(
        tp=4, dp_shard=2, zero=Zero.OPTIMIZER, sequence_parallel=True, num_micro_batches=4
    ),
    "tp4-pp2": Degrees(tp=4, pp=2, num_micro_batches=8),
    "tp2-zero3": Degrees(tp=2, dp_shard=4, zero=Zero.PARAMETERS, num_micro_batches=2),
}


@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("recompute", Recompute)
def test_ranks_work_as_where_each_has_a_head_of_its_own(name: str, recompute: Recompute) -> None:
    """Beside the sums over copies a step takes as long, and as much memory, as with tp key-value heads."""
    degrees = DEGREES[name]
    strategy = Strategy(degrees=degrees, stages=even_stages(LAYERS, degrees.pp, recompute))
    own, whole = (CostModel(problem(grouped(kv_heads))) for kv_heads in (1, degrees.tp))
    mine, theirs = own.evaluate(strategy), whole.evaluate(strategy)
    costs = [each.stage_costs(each.layout(degrees), strategy) for each in (own, whole)]
    for ours, wholes in zip(*costs, strict=True):
        assert ours.copied_s > 0 == wholes.copied_s
        assert ours == dataclasses.replace(
            wholes, copied_s=ours.copied_s, reduce_s=wholes.reduce_s + ours.copied_s
        )
    communicator_bytes = own.layout(degrees).memory.communicator_bytes
    more_bytes = mine.estimate.peak_memory_bytes - theirs.estimate.peak_memory_bytes
    assert more_bytes == pytest.approx(communicator_bytes, abs=8), "of the ranks that have copies of a head"
    copied_s = max(cost.copied_s for cost in costs[0])
    assert mine.estimate.step_time_s == pytest.approx(theirs.estimate.step_time_s + copied_s, rel=1e-9)
    added_s = mine.estimate.breakdown.tp_comm_s - theirs.estimate.breakdown.tp_comm_s
    assert added_s == pytest.approx(copied_s, rel=1e-6)


def test_the_more_data_ranks_share_state_the_less_is_summed_over_copies() -> None:
    cost = {}
    for name, zero in (("replicas", Zero.NONE), ("shards", Zero.OPTIMIZER)):
        ranks = {"dp_shard": 2} if zero else {"dp_replicate": 2}
        degrees = Degrees(tp=4, zero=zero, num_micro_batches=4, **ranks)
        model = CostModel(problem(grouped(1)))
        (stage,) = model.stage_costs(
            model.layout(degrees), Strategy(degrees=degrees, stages=even_stages(LAYERS, 1))
        )
        cost[name] = stage.copied_s
    assert cost["shards"] < cost["replicas"]


@pytest.mark.parametrize("name", DEGREES)
def test_bounds_stay_below_estimates(name: str) -> None:
    degrees, model = DEGREES[name], CostModel(problem(grouped(1)))
    strategy = Strategy(degrees=degrees, stages=even_stages(LAYERS, degrees.pp))
    estimate, shape = model.evaluate(strategy).estimate, model.layout(degrees)
    assert memory_bound_bytes(shape) <= estimate.peak_memory_bytes
    assert step_bound_s(model, shape, tuple(Recompute)) <= estimate.step_time_s


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("tight", [False, True])
def test_solver_equals_brute_force_over_one_key_value_head(tp: int, tight: bool) -> None:
    """With room for all, and with as much as the least demanding strategy needs."""
    mixer = Attention(heads=4, kv_heads=1, head_dim=16)
    block = dataclasses.replace(instances.dense_block(64), mixer=mixer)
    of, on = instances.model(blocks=[block] * 3), instances.cluster(per_node=4)
    asked, pins = instances.problem(of=of, on=on, seq=64, batch=4), parse_fixed_choices((f"tp={tp}",))
    if tight:
        need = survey(asked, pins).need
        assert need is not None
        asked = dataclasses.replace(asked, memory_limit_bytes=need.limit_bytes)
    best = brute_force(asked, lambda degrees: degrees.tp == tp)
    plan = solve(asked, dataclasses.replace(EXACT, pins=pins))
    assert best is not None and plan.estimate.step_time_s == pytest.approx(best, rel=1e-9)


def test_ranks_that_are_no_multiple_of_the_heads_are_refused() -> None:
    """24 query heads over 6 ranks are whole; 4 key-value heads over 6 are neither split nor copied."""
    asked = problem(grouped(4, heads=24), per_node=6)
    strategy = Strategy(degrees=Degrees(tp=6, num_micro_batches=8), stages=even_stages(LAYERS, 1))
    (broken,) = [each for each in broken_rules(asked, strategy) if each.rule == "tp_divides_heads"]
    assert "tp=6 cannot split 4 key-value heads" in broken.detail and "copies" in broken.detail
    assert broken.legal == "1, 2, 4, 8, 12, 24"


def test_one_key_value_head_is_searched_with_tensor_parallelism() -> None:
    """Llama 3 8B's 8 over 16 ranks of a node."""
    of = instances.problem(of=load_model("llama-3-8b"), on=instances.cluster(per_node=16), batch=16)
    legal = [each for each in shapes(of, FixedChoices(pp=1, zero=0)) if isinstance(each, Degrees)]
    assert max(degrees.tp for degrees in legal) == 16

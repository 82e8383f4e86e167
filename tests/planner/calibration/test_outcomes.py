"""What an expert would nod at: the choices that plans make for known models on known clusters.

Every outcome is beside its opposite: the problem with its reason taken away, or the other choice's time.
Pins and engines keep searches to a second; what an outcome speaks of is never pinned.
"""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.evaluate import CostModel
from planner.foundation.errors import InfeasibleError
from planner.strategy.plan import Plan
from planner.strategy.strategy import Strategy, Zero, even_stages
from tests.planner.catalog_problems import GAP, problem, solved, solved_s


def sizes(plan: Plan) -> list[int]:
    return [stage.layers for stage in plan.strategy.stages]


def recomputed(plan: Plan) -> list[float]:
    """The share of each stage's blocks that recompute anything, those in full counted whole."""
    counts = [stage.recompute for stage in plan.strategy.stages]
    return [(each.full + each.selective / 2) / each.layers for each in counts]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_small_model_on_a_fast_network_is_purely_data_parallel(nodes: int) -> None:
    plan = solved(problem("llama-3.2-1b", f"{nodes}x8:h100-sxm-80gb", 2048, 64 * nodes))
    degrees = plan.strategy.degrees
    assert (degrees.tp, degrees.pp, degrees.cp, degrees.dp) == (1, 1, 1, 8 * nodes)
    assert degrees.zero <= Zero.OPTIMIZER and not any(recomputed(plan))


def test_under_tight_memory_zero_rises_before_tensor_parallelism() -> None:
    """Sharing state costs messages that hide, tensor parallelism messages in every layer."""
    seen = []
    for limit in ("80GiB", "9.5GiB", "8.5GiB", "8GiB", "7.5GiB"):
        of = problem("llama-3.2-1b", "1x8:h100-sxm-80gb", 2048, 64, memory_limit=limit)
        degrees = solved(of, "pp=1", "cp=1").strategy.degrees
        seen.append((degrees.tp, int(degrees.zero)))
    assert seen[0] == (1, 1)
    assert seen[1:4] == [(1, 3)] * 3, "ZeRO 3 first"
    assert seen[4][0] > 1, "then tensor parallelism"


def test_zero_rises_stage_by_stage_where_nothing_else_may_give() -> None:
    seen = []
    for limit in ("60GiB", "14GiB", "11.5GiB", "10GiB"):
        of = problem("llama-3.2-1b", "1x8:h100-sxm-80gb", 2048, 64, memory_limit=limit)
        degrees = solved(of, "pp=1", "cp=1", "micro_batch=1", "recompute=none").strategy.degrees
        seen.append((degrees.tp, int(degrees.zero)))
    assert seen[:3] == [(1, 1), (1, 2), (1, 3)]
    assert seen[3][0] > 1


def test_on_a_slow_network_the_pipeline_crosses_nodes_and_the_rest_stays_in_them() -> None:
    def degrees(network: str) -> tuple[int, int, int]:
        of = problem("llama-13b", f"4x8:a100-sxm-80gb@{network}", 2048, 64, engine="megatron")
        found = solved(of, "schedule=1f1b", "micro_batch=1").strategy.degrees
        return found.tp, found.pp, found.dp

    tp, pp, dp = degrees("eth25x1")
    assert pp == 4 and tp > 1 and tp * dp == 8, "a stage a node: gradients are reduced within it"
    tp, pp, dp = degrees("hdr200x8")
    assert (pp, dp) == (1, 32), "on a fast one data parallelism crosses"


def test_a_long_sequence_is_split() -> None:
    """At as many tokens a step, context parallelism appears where one sequence does not fit a device."""
    long = problem("llama-3-8b", "1x8:h100-sxm-80gb", 131072, 4)
    short = problem("llama-3-8b", "1x8:h100-sxm-80gb", 4096, 128)
    assert solved(long, "schedule=1f1b").strategy.degrees.cp > 1
    assert solved(short, "schedule=1f1b", "zero=3").strategy.degrees.cp == 1
    with pytest.raises(InfeasibleError):
        solved(long, "cp=1", "tp=1", "pp=1")


def test_experts_are_spread_within_the_node_first() -> None:
    of = problem("qwen3-30b-a3b", "4x8:h100-sxm-80gb", 4096, 256)
    pins = ("pp=1", "cp=1", "tp=1", "micro_batch=4")
    plan = solved(of, *pins)
    assert plan.strategy.degrees.ep == 8, "as many as devices of a node"
    best_s = plan.estimate.step_time_s
    assert solved_s(of, *pins, "ep=16") > 1.2 * best_s, "across nodes tokens take the slower link"
    assert solved_s(of, *pins, "ep=2") > 1.05 * best_s, "fewer leave more state on each device"


@pytest.mark.parametrize("model", ["gemma-2b", "qwen2.5-1.5b"])
def test_the_last_stage_holds_fewer_layers_because_of_the_head(model: str) -> None:
    of = problem(model, "1x8:h100-sxm-80gb", 2048, 64)
    pins = ("pp=4", "tp=1", "schedule=1f1b")
    plan = solved(of, *pins)
    assert sizes(plan)[-1] <= min(sizes(plan)[:-1]) - 3
    even = Strategy(degrees=plan.strategy.degrees, stages=even_stages(of.model.layers, 4))
    assert CostModel(of).evaluate(even).estimate.step_time_s > 1.05 * plan.estimate.step_time_s
    small = dataclasses.replace(of, model=dataclasses.replace(of.model, vocab=2048))
    without = sizes(solved(small, *pins))
    assert max(without) - min(without) <= 1


@pytest.mark.parametrize("limit", ["50GiB", "40GiB"])
def test_early_stages_recompute_more_under_1f1b(limit: str) -> None:
    """Stage s of p keeps p - s micro-batches, so memory is tight there alone."""
    of = problem("llama-13b", "1x8:a100-sxm-80gb", 4096, 64, memory_limit=limit)
    pins = ("pp=8", "tp=1", "micro_batch=1", "schedule=1f1b")
    plan = solved(of, *pins)
    shares = recomputed(plan)
    assert shares[0] > 0.5 > shares[-1]
    assert sum(shares[:4]) > sum(shares[4:]) + 1
    full = [stage.recompute.full for stage in plan.strategy.stages]
    assert full == sorted(full, reverse=True) and full[0] > 0


@pytest.mark.parametrize("cluster", ["1x8:a100-sxm-80gb+1x8:h100-sxm-80gb", "1x8:h100-sxm-80gb+1x8:l40s"])
def test_faster_devices_hold_more_layers(cluster: str) -> None:
    of = problem("llama-13b", cluster, 4096, 64)
    pins = ("pp=4", "micro_batch=1", "schedule=1f1b", "tp=1", "cp=1")
    plan = solved(of, *pins)
    held: dict[str, int] = {}
    for stage, estimate in zip(plan.strategy.stages, plan.stage_estimates, strict=True):
        held[estimate.device] = held.get(estimate.device, 0) + stage.layers
    assert held["h100-sxm-80gb"] > 1.5 * min(held.values())


def test_zero_bubble_schedules_fill_bubbles_where_memory_allows_and_not_where_it_forces_recomputation() -> (
    None
):
    """A backward that is split keeps what its second half needs; recomputed, it would run forward twice."""
    pins = ("pp=4", "tp=2", "micro_batch=1")
    roomy = problem("llama-7b", "1x8:a100-sxm-80gb", 4096, 16)
    assert solved(roomy, *pins).strategy.degrees.schedule.splits_backward
    assert not solved(roomy, *pins, "recompute=full").strategy.degrees.schedule.splits_backward
    tight = problem("llama-7b", "1x8:a100-sxm-80gb", 4096, 16, memory_limit="24GiB")
    plan = solved(tight, *pins)
    assert any(recomputed(plan)) and not plan.strategy.degrees.schedule.splits_backward
    assert solved_s(tight, *pins, "schedule=zb-h1") > plan.estimate.step_time_s * (1 + GAP)


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_free_choice_of_recomputation_is_never_worse_than_a_pinned_one(chunks: int) -> None:
    """Where stages share a rank's tight memory, too: micro-batches pile up on each at other moments."""
    of = problem("llama-3.1-405b", "64x8:h100-sxm-80gb@ndr400x8", 8192, 256, engine="megatron")
    shape = ("tp=8", "pp=8", "cp=2", "cp_exchange=ring", "zero=1", "micro_batch=1", "sequence_parallel=true")
    pins = (*shape, "schedule=interleaved", f"chunks={chunks}")
    free, full = (solved(of, *pins, *more) for more in ((), ("recompute=full",)))
    assert free.strategy.degrees.chunks == full.strategy.degrees.chunks == chunks
    assert free.estimate.step_time_s <= full.estimate.step_time_s

"""Context parallelism: laws of what it computes, sends and keeps, its forms by hand, and its rules."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from planner.cost.communication.collectives import overlap_of
from planner.cost.communication.context_parallel import copies_of_heads, exchange_of, widths_of
from planner.cost.constants import TIME_SPECS, time_constants_of
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.layer import LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention, AttentionSpan, CpExchange, Reach
from planner.model.mixers import StateSpace
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, Op
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

SEQ = 4096


def grouped(heads: int = 16, kv_heads: int = 4, layers: int = 4) -> ModelSpec:
    block = dataclasses.replace(
        instances.dense_block(512, heads), mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=32)
    )
    return instances.model(hidden=512, heads=heads, vocab=1024, blocks=[block] * layers)


def problem(devices: int = 8, *, seq: int = SEQ, **kwargs: object) -> PlanningProblem:
    on = instances.cluster(per_node=devices, of=instances.device(flops=1e14, bandwidth=1e12), **kwargs)  # type: ignore[arg-type]
    return instances.problem(of=grouped(), on=on, seq=seq, batch=8, limit_bytes=1 << 40)


def evaluated(of: PlanningProblem, degrees: Degrees, recompute: Recompute = Recompute.NONE) -> Evaluation:
    strategy = Strategy(degrees=degrees, stages=even_stages(of.model.layers, degrees.stages, recompute))
    assert broken_rules(of, strategy) == []
    return CostModel(of).evaluate(strategy)


def shared(cp: int, exchange: CpExchange = CpExchange.RING, **kwargs: object) -> Degrees:
    """Degrees that share out each of 8 sequences over `cp` of 8 devices."""
    dp = 8 // cp
    sharded = (
        {"dp_shard": dp, "zero": Zero.OPTIMIZER} if kwargs.pop("sharded", False) else {"dp_replicate": dp}
    )
    return Degrees(cp=cp, cp_exchange=exchange, num_micro_batches=cp, **sharded, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_one_rank_exchanges_nothing_whatever_the_way(exchange: CpExchange) -> None:
    plain, same = evaluated(problem(), shared(1)), evaluated(problem(), shared(1, exchange))
    assert plain.estimate == same.estimate
    assert same.estimate.breakdown.cp_comm_s == 0.0


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_flops_over_ranks_add_up_and_attention_is_balanced(cp: int) -> None:
    """cp ranks with 1/cp of the tokens each: attention takes 1/cp of the whole, products no less."""
    layers = LayerModel(problem(), time_constants_of(None, problem().engine_settings))
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=1, sequence_parallel=False, micro_batch=1, seq=SEQ, precision=Precision.BF16
    )
    split = dataclasses.replace(shape, cp=cp)
    assert split.tokens * cp == shape.tokens
    for whole_s, part_s in zip(layers.core_s(shape), layers.core_s(split), strict=True):
        assert part_s == pytest.approx(whole_s / cp)
    assert layers.cost(split).forward_s >= layers.cost(shape).forward_s / cp * (1 - 1e-9)


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_activations_are_shared_out_and_weights_are_not(exchange: CpExchange) -> None:
    one, four = (evaluated(problem(), shared(cp, exchange)).stages[0].memory for cp in (1, 4))
    # Where heads were traded for, every block keeps attention's result a second time.
    again = 4 * 2 * SEQ / 4 * 512 if exchange is CpExchange.ALL_TO_ALL else 0.0
    # The chunked loss leaves gradients of the head's whole weights from the forward pass on.
    head = 2 * 1024 * 512
    shared_out = (one.activations_bytes - head) / 4
    assert four.activations_bytes == pytest.approx(shared_out + head + again, rel=1e-6)
    assert four.weights_bytes == one.weights_bytes
    # Of one micro-batch gradients come as activations go, so that not all of them are there at the peak.
    two = evaluated(problem(), shared(2, exchange)).stages[0].memory
    assert four.grads_bytes == two.grads_bytes >= one.grads_bytes


def test_state_is_shared_out_over_context_ranks_too() -> None:
    """ZeRO shards over dp x cp: the fewer sequences at once, the same shards (Megatron-LM, torchtitan)."""
    memory = [evaluated(problem(), shared(cp, sharded=True)).stages[0].memory for cp in (1, 2, 8)]
    assert len({each.optimizer_bytes for each in memory}) == 1


def test_gradients_are_reduced_over_context_ranks() -> None:
    """Eight ranks hold the same weights, by dp or by cp: the same reduction."""
    by_dp = evaluated(problem(), shared(1)).replay.reduce_s
    by_cp = evaluated(problem(), shared(8)).replay.reduce_s
    assert max(by_cp) > 0
    shape_dp, shape_cp = (CostModel(problem()).layout(shared(cp)) for cp in (1, 8))
    assert shape_cp.reduces == shape_dp.reduces and max(by_dp) > 0


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_slower_links_are_never_cheaper_and_nothing_is_free(exchange: CpExchange) -> None:
    rates = [1e9, 1e10, 1e11, 1e12]
    seconds = [
        evaluated(problem(link_bytes_per_s=rate), shared(4, exchange)).estimate.breakdown.cp_comm_s
        for rate in rates
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert all(value > 0 for value in seconds), "even what is hidden slows attention"


def test_an_exchange_over_nodes_takes_the_slower_link() -> None:
    inside = evaluated(problem(8), shared(8, CpExchange.GATHER)).estimate.breakdown.cp_comm_s
    of = problem(4, nodes=2, inter_bytes_per_s=1e9)
    across = evaluated(of, shared(8, CpExchange.GATHER)).estimate.breakdown.cp_comm_s
    assert across > inside


def test_a_ring_by_hand() -> None:
    """c - 1 hops behind attention of 1/c each; back twice the bytes and one more hop home."""
    of = problem(link_bytes_per_s=1e9)
    model = CostModel(of)
    shape = model.layout(shared(4))
    own = shape.shape_of(LayerKind.BLOCK, Recompute.NONE, next(iter(shape.classes)))
    tokens, kv = SEQ / 4, 2 * 4 * 32 * 2
    hop_s, double_s = (shape.messages.cp_seconds(Op.P2P, n * tokens * kv) for n in (1, 2))
    ahead_s, back_s = model.layers.core_s(own)
    corrected_s = 10 * tokens * 512 / shape.layer_model.rates.memory_bytes_per_s  # type: ignore[union-attr]
    forward, backward = shape.passes(own.block, Recompute.NONE)
    usual = overlap_of(None)
    assert forward.cp_s == pytest.approx(3 * (usual.shown_s(hop_s, ahead_s / 4) + corrected_s))
    assert backward.cp_s == pytest.approx(3 * usual.shown_s(double_s, back_s / 4) + hop_s)


def test_recomputing_a_block_exchanges_once_more() -> None:
    shape = CostModel(problem(link_bytes_per_s=1e9)).layout(shared(4))
    key = next(iter(shape.classes))
    plain, full = (shape.passes(key, option)[1].cp_s for option in (Recompute.NONE, Recompute.FULL))
    assert full == pytest.approx(plain + shape.passes(key, Recompute.NONE)[0].cp_s)


def test_groups_of_heads_send_less_and_few_heads_are_copied() -> None:
    shape = LayerShape(
        kind=LayerKind.BLOCK,
        tp=2,
        sequence_parallel=False,
        micro_batch=1,
        seq=SEQ,
        precision=Precision.BF16,
        cp=4,
    )
    many, few = (Attention(heads=16, kv_heads=kv, head_dim=32) for kv in (16, 1))
    assert widths_of(many, shape).kv == 2 * 2 * 16 * 32 / 2
    assert widths_of(few, shape).kv == 2 * 2 * 32, "each tensor-parallel rank needs the one head"
    assert copies_of_heads(many, shape) == 1
    assert copies_of_heads(few, shape) == 4, "one for each of cp ranks, which trade among themselves"
    odd = Attention(heads=24, kv_heads=12, head_dim=32)
    assert copies_of_heads(odd, shape) == 2, "six heads of a rank over four: twelve, three each"


def test_windows_are_gathered_instead_of_going_round() -> None:
    window = Attention(heads=4, kv_heads=4, head_dim=8, span=AttentionSpan(reach=Reach.WINDOW, size=64))
    assert exchange_of(window, CpExchange.RING) is CpExchange.GATHER
    assert exchange_of(window, CpExchange.ALL_TO_ALL) is CpExchange.ALL_TO_ALL
    assert exchange_of(Attention(heads=4, kv_heads=4, head_dim=8), CpExchange.RING) is CpExchange.RING


def test_gathering_needs_more_memory_for_a_moment_than_a_ring() -> None:
    ring, gather = (
        evaluated(problem(), shared(8, exchange)).stages[0].memory.transient_bytes
        for exchange in (CpExchange.RING, CpExchange.GATHER)
    )
    assert gather > ring


@pytest.mark.parametrize(
    ("change", "rule", "legal"),
    [
        ({"seq": 4098}, "cp_divides_sequence", "1, 3"),
        ({"exchange": CpExchange.ALL_TO_ALL, "heads": 6}, "cp_divides_heads", "cp of 1, 2, 3, 6"),
    ],
)
def test_rules_say_the_numbers_and_what_is_legal(change: dict[str, object], rule: str, legal: str) -> None:
    heads = int(change.get("heads", 16))  # type: ignore[call-overload]
    of = dataclasses.replace(
        problem(seq=int(change.get("seq", SEQ))),  # type: ignore[call-overload]
        model=grouped(heads=heads, kv_heads=heads) if heads != 16 else grouped(),
    )
    degrees = shared(4, change.get("exchange", CpExchange.RING))  # type: ignore[arg-type]
    found = {
        rejected.rule: rejected
        for rejected in broken_rules(of, Strategy(degrees=degrees, stages=even_stages(4, 1)))
    }
    assert rule in found
    assert found[rule].legal.startswith(legal)
    assert "cp=4" in found[rule].detail and found[rule].fix == "--fix cp="


def test_a_recurrent_state_is_not_passed_along_the_sequence() -> None:
    state = StateSpace(state_heads=8, head_dim=16, state=16, groups=4, kernel=4, chunk=32)
    block = Block(hidden=64, norm=instances.Norm.RMSNORM, mixer=state, mlp=None, norms=1)
    of = dataclasses.replace(problem(), model=instances.model(blocks=[block] * 4))
    broken = broken_rules(of, Strategy(degrees=shared(2), stages=even_stages(4, 1)))
    assert [each.rule for each in broken] == ["cp_needs_attention"]
    assert "StateSpace" in broken[0].detail


def test_constants_of_the_exchange_move_it() -> None:
    """What a fit would move: the scale of messages, and what each hop takes besides."""
    of, degrees = problem(link_bytes_per_s=1e9), shared(4)
    base = time_constants_of(None, of.engine_settings)
    for name, value in (("cp_scale", 2.0), ("cp_step_s", 1e-3)):
        moved = dataclasses.replace(base, **{name: value})
        shapes = [CostModel(of, LayerModel(of, constants)).layout(degrees) for constants in (base, moved)]
        plain, more = (shape.passes(next(iter(shape.classes)), Recompute.NONE) for shape in shapes)
        assert name in TIME_SPECS
        assert all(b.cp_s > a.cp_s for a, b in zip(plain, more, strict=True))


def test_memory_and_time_over_a_grid_of_all_axes() -> None:
    """Causes add up and no share is negative, whatever is combined with cp."""
    of = problem(8)
    tried = 0
    for tp, pp, exchange, recompute in itertools.product((1, 2), (1, 2), CpExchange, Recompute):
        degrees = Degrees(
            tp=tp, pp=pp, cp=2, dp_replicate=8 // (2 * tp * pp), cp_exchange=exchange,
            num_micro_batches=8 * tp * pp * 2 // 8, sequence_parallel=tp > 1,
        )  # fmt: skip
        estimate = evaluated(of, degrees, recompute).estimate
        assert estimate.breakdown.total_s == pytest.approx(estimate.step_time_s, rel=1e-9)
        assert min(dataclasses.astuple(estimate.breakdown)) >= 0
        tried += 1
    assert tried == 36

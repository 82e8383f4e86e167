"""What engines do in their own ways between products: sends of stages, reductions, sums, waiting hosts."""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.communication.collectives import Group
from planner.cost.compute.analytic import analytic_cost
from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.sharded_layers import accumulate_s
from planner.cost.stage.stage import LayoutModel
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import NATIVE, Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, Op
from planner.strategy.strategy import Degrees, Schedule, Zero
from tests.planner import instances

CLUSTER = parse_cluster("4x8:a100-sxm-80gb@hdr200x8", "test")
MEGATRON = EngineSettings(engine=Engine.MEGATRON)
SCALING = EngineSettings(engine=Engine.DEEPSPEED, framework="AA-Scaling (Aleph Alpha)")


def problem(settings: EngineSettings, precision: Precision = Precision.BF16) -> PlanningProblem:
    of = instances.model(layers=8, hidden=4096, heads=32, vocab=32_000)
    found = instances.problem(of=of, on=CLUSTER, seq=2048, batch=64, precision=precision)
    return dataclasses.replace(found, engine_settings=settings)


def degrees(**changes: object) -> Degrees:
    usual = Degrees(
        tp=4,
        pp=2,
        dp_replicate=1,
        dp_shard=4,
        zero=Zero.OPTIMIZER,
        micro_batch=2,
        num_micro_batches=8,
        sequence_parallel=False,
        schedule=Schedule.ONE_F_ONE_B,
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def shape(
    settings: EngineSettings, of: Degrees | None = None, precision: Precision = Precision.BF16
) -> LayoutModel:
    return CostModel(problem(settings, precision)).layout(of or degrees())


def test_ranks_that_hold_a_result_whole_send_shares_of_it_where_the_engine_does() -> None:
    messages = shape(MEGATRON).messages
    whole = messages.message_bytes()
    group = Group(ranks=2, groups=4, spans_nodes=True, stride=16)
    gather_s = messages.seconds(Op.ALL_GATHER, whole, messages.tp_group())
    assert messages.p2p_s() == pytest.approx(messages.seconds(Op.P2P, whole / 4, group) + gather_s)
    assert shape(NATIVE).messages.p2p_s() == pytest.approx(messages.seconds(Op.P2P, whole, group))
    shared = degrees(sequence_parallel=True)
    assert shape(MEGATRON, shared).messages.p2p_s() == shape(NATIVE, shared).messages.p2p_s()
    alone = degrees(tp=1, dp_shard=16)
    assert shape(MEGATRON, alone).messages.p2p_s() == shape(NATIVE, alone).messages.p2p_s()


def test_a_whole_reduction_sums_every_gradient_in_fp32() -> None:
    own = shape(SCALING)
    unit = next(iter(own.block_units.values()))
    messages = own.messages
    whole_s = messages.seconds(Op.ALL_REDUCE, 4 * unit.trained, messages.shard_group())
    assert own.reduces[unit].dp_s == pytest.approx(whole_s)
    usual = shape(EngineSettings(engine=Engine.DEEPSPEED))
    scatter_s = messages.seconds(Op.REDUCE_SCATTER, 2 * unit.trained, messages.shard_group())
    assert usual.reduces[unit].dp_s == pytest.approx(scatter_s)


@pytest.mark.parametrize(
    ("settings", "precision", "moved"),
    [
        (dataclasses.replace(MEGATRON, attention=AttentionKernel.FUSED), Precision.FP16, 10),
        (EngineSettings(engine=Engine.DEEPSPEED), Precision.BF16, 6),
        (NATIVE, Precision.BF16, 12),
        (MEGATRON, Precision.BF16, 0),
    ],
)
def test_a_gradient_is_added_to_that_of_earlier_micro_batches(
    settings: EngineSettings, precision: Precision, moved: int
) -> None:
    own = shape(settings, precision=precision)
    rates = own.layer_model.rates
    assert rates is not None
    assert accumulate_s(own.messages, rates) == pytest.approx(moved / rates.memory_bytes_per_s)
    once, often = (shape(settings, degrees(num_micro_batches=n), precision) for n in (1, 8))
    key, unit = next(iter(own.block_units.items()))
    more_s = often.passes(key, Recompute.NONE)[1].host_s - once.passes(key, Recompute.NONE)[1].host_s
    assert more_s == pytest.approx(7 / 8 * moved * unit.trained / rates.memory_bytes_per_s)


def block_s(host_s: float, tp_scale: float, option: Recompute) -> tuple[float, float]:
    """Forward and backward of a block where launching and messages take so long."""
    own = problem(MEGATRON)
    constants = dataclasses.replace(
        time_constants_of(None, MEGATRON), host_block_forward_s=host_s, tp_scale=tp_scale
    )
    layers = LayerModel(own, constants)
    passes = CostModel(own, layers).layout(degrees()).passes(layers.keys[0], option)
    return passes[0].total_s, passes[1].total_s


@pytest.mark.parametrize("option", Recompute)
def test_messages_go_out_while_the_device_waits_for_its_host(option: Recompute) -> None:
    quick = [block_s(1e-9, scale, option) for scale in (1.0, 2.0)]
    assert all(b > a for a, b in zip(*quick, strict=True)), "the device is busy: messages show"
    slow = [block_s(1.0, scale, option) for scale in (1.0, 2.0)]
    assert slow[0] == pytest.approx(slow[1]), "the host takes longer than all of it"
    ends = [block_s(host_s, 1.0, option) for host_s in (1e-9, 1e-3, 1e-2, 1e-1)]
    for direction in (0, 1):
        seconds = [end[direction] for end in ends]
        assert seconds == sorted(seconds)


def test_a_processor_that_launches_and_computes_by_turns_is_never_idle() -> None:
    own = shape(NATIVE, degrees(tp=1, dp_shard=16))
    rates = own.layer_model.rates
    assert rates is not None
    slow = dataclasses.replace(
        rates, constants=dataclasses.replace(rates.constants, host_block_forward_s=1.0)
    )
    asked = own.shape_of(LayerKind.BLOCK, block=own.layer_model.keys[0])
    waiting, by_turns = (
        analytic_cost(own.problem.model, asked, each)
        for each in (slow, dataclasses.replace(slow, serial=True))
    )
    assert 0 < waiting.forward_idle_s < waiting.forward_s and waiting.backward_idle_s > 0
    assert (by_turns.forward_idle_s, by_turns.backward_idle_s) == (0.0, 0.0)


def test_gradients_that_are_summed_beside_themselves_are_reduced_whole() -> None:
    """DeepSpeed's BF16_Optimizer: set to zero, added to, added to fp32; fp16 has none of it."""
    beside = EngineSettings(
        engine=Engine.MEGATRON, framework="Megatron-DeepSpeed", attention=AttentionKernel.FUSED
    )
    own = shape(beside)
    rates = own.layer_model.rates
    assert rates is not None
    assert accumulate_s(own.messages, rates) == pytest.approx(18 / rates.memory_bytes_per_s)
    unit = next(iter(own.block_units.values()))
    whole_s = own.messages.seconds(Op.ALL_REDUCE, 4 * unit.trained, own.messages.shard_group())
    assert own.reduces[unit].dp_s == pytest.approx(whole_s)
    half = shape(beside, precision=Precision.FP16)
    scatter_s = half.messages.seconds(Op.REDUCE_SCATTER, 2 * unit.trained, half.messages.shard_group())
    assert half.reduces[unit].dp_s == pytest.approx(scatter_s)


@pytest.mark.parametrize(("settings", "share"), [(MEGATRON, 0.5), (NATIVE, 1.0)])
def test_what_ranks_gather_for_products_in_fp8_is_cast_before_it_is_sent(
    settings: EngineSettings, share: float
) -> None:
    def messages(precision: Precision) -> dict[Op, float]:
        own = shape(settings, degrees(sequence_parallel=True), precision).messages
        return {
            op: own.over_tp(op, operands=op is Op.ALL_GATHER) for op in (Op.ALL_GATHER, Op.REDUCE_SCATTER)
        }

    fp8, bf16 = messages(Precision.FP8), messages(Precision.BF16)
    of = shape(settings, degrees(sequence_parallel=True), Precision.FP8).messages
    alone = of.seconds(Op.ALL_GATHER, share * of.hidden_bytes(), of.tp_group())
    assert fp8[Op.ALL_GATHER] == pytest.approx(of.constants.tp_scale * alone)
    assert fp8[Op.REDUCE_SCATTER] == bf16[Op.REDUCE_SCATTER]
    whole = of.seconds(Op.ALL_GATHER, of.hidden_bytes(), of.tp_group())
    assert bf16[Op.ALL_GATHER] == pytest.approx(of.constants.tp_scale * whole)

"""Products of a block: which are one, what stays in bf16, what casts to fp8 take, what experts take."""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.compute.analytic import DeviceRates, analytic_cost, device_rates
from planner.cost.compute.gemm import FP8_SHARE, GemmModel
from planner.cost.compute.products import cast_s, matrices_s, product_s
from planner.cost.constants import time_constants_of
from planner.cost.layer import LayerShape
from planner.hardware.catalog import load_device
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import Block
from planner.model.workload import Precision
from planner.profile.profile import LayerKind
from tests.planner import instances

SHAPE = LayerShape(
    kind=LayerKind.BLOCK,
    tp=1,
    sequence_parallel=False,
    micro_batch=1,
    seq=4096,
    precision=Precision.BF16,
)


def problem(precision: Precision, settings: EngineSettings | None = None) -> PlanningProblem:
    on = instances.cluster(of=load_device("h100-sxm-80gb").device())
    made = instances.problem(
        of=instances.model(hidden=4096, heads=32, vocab=65536), on=on, precision=precision
    )
    return dataclasses.replace(made, engine_settings=settings or EngineSettings(engine=Engine.MEGATRON))


def rates(precision: Precision, settings: EngineSettings | None = None, **constants: float) -> DeviceRates:
    of = problem(precision, settings)
    found = device_rates(of, dataclasses.replace(time_constants_of(None, of.engine_settings), **constants))
    assert found is not None
    return found


def block() -> Block:
    return instances.dense_block(4096, 32)


@pytest.mark.parametrize(("m", "n", "k"), [(4096, 4096, 4096), (16384, 14336, 4096), (512, 1024, 8192)])
def test_fp8_reaches_bf16_s_share_of_a_higher_peak(m: int, n: int, k: int) -> None:
    device = load_device("h100-sxm-80gb").device()
    slow, fast = (
        GemmModel(device, precision).rate_flops(m, n, k) for precision in (Precision.BF16, Precision.FP8)
    )
    assert slow is not None and fast is not None
    peaks = (device.peak_fp8_flops or 0) / (device.peak_bf16_flops or 1)
    assert fast[0] == pytest.approx(slow[0] * FP8_SHARE * peaks)


def test_attention_and_head_stay_in_bf16() -> None:
    own, other = rates(Precision.FP8), rates(Precision.BF16)
    assert own.attention_flops == other.attention_flops
    assert product_s(4096, 65536, 4096, own, precise=True) == product_s(4096, 65536, 4096, other)
    head = dataclasses.replace(SHAPE, kind=LayerKind.HEAD)
    costs = [
        analytic_cost(
            problem(precision).model, dataclasses.replace(head, precision=precision), rates(precision)
        )
        for precision in (Precision.FP8, Precision.BF16)
    ]
    assert costs[0].forward_s == costs[1].forward_s


def test_casts_move_four_bytes_a_value_of_each_operand() -> None:
    """Forward: inputs of qkv, out, fused up and gate, down. Backward: their results' gradients."""
    own = rates(Precision.FP8)
    shape = dataclasses.replace(SHAPE, precision=Precision.FP8)
    forward_s, backward_s = cast_s(block(), shape, own)
    inputs = 4096 + 4096 + 4096 + 3 * 4096
    outputs = 3 * 4096 + 4096 + 2 * 3 * 4096 + 4096
    assert forward_s == pytest.approx(4 * 4096 * inputs / own.memory_bytes_per_s)
    assert backward_s == pytest.approx(4 * 4096 * outputs / own.memory_bytes_per_s)
    assert cast_s(block(), SHAPE, rates(Precision.BF16)) == (0.0, 0.0)


def test_products_of_one_input_are_one_where_the_engine_fuses_them() -> None:
    fused, apart = rates(Precision.BF16), rates(Precision.BF16, EngineSettings(engine=Engine.TORCHTITAN))
    few = dataclasses.replace(block(), mixer=instances.Attention(heads=32, kv_heads=2, head_dim=128))
    assert matrices_s(few, SHAPE, fused) < matrices_s(few, SHAPE, apart), "256 columns alone are slow"
    by_hand = [
        (4096, 4096 + 512, 4096),
        (4096, 4096, 4096),
        (4096, 2 * 3 * 4096, 4096),
        (4096, 4096, 3 * 4096),
    ]
    assert matrices_s(few, SHAPE, fused) == pytest.approx(sum(product_s(*each, fused) for each in by_hand))


def mixture(**changes: object) -> Block:
    expert = Mlp(width=1024, gated=True, activation=Activation.SILU)
    experts = dataclasses.replace(Experts(count=32, topk=4, expert=expert), **changes)  # type: ignore[arg-type]
    return dataclasses.replace(block(), mlp=experts)


def forward_s(of: Block, shape: LayerShape, own: DeviceRates) -> float:
    model = instances.model(hidden=4096, heads=32, blocks=[of] * 2)
    return analytic_cost(model, shape, own).forward_s


def test_each_expert_of_a_device_takes_its_own_time_and_graphs_spare_most_of_it() -> None:
    plain = rates(Precision.BF16, expert_s=1e-3, host_block_forward_s=1e-9)
    none = rates(Precision.BF16, expert_s=1e-9, host_block_forward_s=1e-9)
    for ep in (1, 4, 32):
        shape = dataclasses.replace(SHAPE, ep=ep)
        more_s = forward_s(mixture(), shape, plain) - forward_s(mixture(), shape, none)
        assert more_s == pytest.approx(32 / ep * 1e-3, rel=1e-3)
    graphed = rates(
        Precision.BF16,
        EngineSettings(engine=Engine.MEGATRON, graphed=True),
        expert_s=1e-3,
        graphed_share=0.25,
    )
    spared_s = forward_s(mixture(), SHAPE, plain) - forward_s(mixture(), SHAPE, graphed)
    assert spared_s == pytest.approx(0.75 * 32e-3, rel=1e-2)


def test_an_activation_that_nothing_fuses_moves_more() -> None:
    """Experts with biases, unless a kernel of their own holds products and activation."""
    biased = mixture(expert=Mlp(width=1024, gated=True, activation=Activation.SILU, bias=True))
    own = rates(Precision.BF16)
    fused = rates(Precision.BF16, EngineSettings(engine=Engine.MEGATRON, fused_experts=True))
    assert forward_s(biased, SHAPE, own) > forward_s(biased, SHAPE, fused) * 1.1
    assert forward_s(mixture(), SHAPE, own) == forward_s(mixture(), SHAPE, fused)


def test_a_scan_has_a_rate_of_its_own() -> None:
    state = instances.StateSpace(state_heads=64, head_dim=64, state=128, groups=8, kernel=4, chunk=128)
    of = dataclasses.replace(block(), mixer=state)
    slow, fast = (rates(Precision.BF16, scan_share=share) for share in (0.05, 0.5))
    assert forward_s(of, SHAPE, slow) > forward_s(of, SHAPE, fast)
    assert forward_s(block(), SHAPE, slow) == forward_s(block(), SHAPE, fast)


def test_the_rate_of_fp8_has_a_constant_of_its_own() -> None:
    shape = dataclasses.replace(SHAPE, precision=Precision.FP8)
    slow, fast = (rates(Precision.FP8, fp8_scale=scale) for scale in (1.0, 1.25))
    assert matrices_s(block(), shape, slow) == pytest.approx(1.25 * matrices_s(block(), shape, fast))
    bf16 = rates(Precision.BF16, fp8_scale=1.25)
    assert matrices_s(block(), SHAPE, bf16) == matrices_s(block(), SHAPE, rates(Precision.BF16))

"""Layers by the operators that a profile timed alone: against sums by hand, laws, and what has priority."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from planner.advice.what_if import faster_devices
from planner.cost.compute.analytic import DeviceRates, analytic_cost, device_rates
from planner.cost.compute.measured_operators import MeasuredRates, at_usual_speed, measured_rates
from planner.cost.compute.products import matrices_s, product_s
from planner.cost.constants import problem_time_constants
from planner.cost.evaluate import CostModel
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.offload import COPIED_BYTES
from planner.foundation.decode import decode, decode_json, to_json
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import Constant, LayerKind, LayerSample, OperatorKind, Profile, shape_key
from planner.strategy.strategy import Degrees
from tests.planner import instances, sweeps

HIDDEN, HEADS, VOCAB, SEQ = 1024, 8, 8192, 512
GEMM = OperatorKind.GEMM
MODEL = instances.model(hidden=HIDDEN, heads=HEADS, vocab=VOCAB)
SHAPE = LayerShape(
    kind=LayerKind.BLOCK,
    tp=1,
    sequence_parallel=False,
    micro_batch=2,
    seq=SEQ,
    precision=Precision.BF16,
    rotary=True,
)


def problem(
    profile: Profile | None, settings: EngineSettings | None = None, **changes: object
) -> PlanningProblem:
    made = instances.problem(of=MODEL, seq=SEQ)
    return dataclasses.replace(made, profile=profile, engine_settings=settings or EngineSettings(), **changes)  # type: ignore[arg-type]


def rates(profile: Profile | None, settings: EngineSettings | None = None) -> DeviceRates:
    of = problem(profile, settings)
    found = device_rates(of, problem_time_constants(of))
    assert found is not None
    return found


def cost(profile: Profile | None, shape: LayerShape = SHAPE, of: ModelSpec = MODEL) -> LayerCost:
    return analytic_cost(of, shape, rates(profile))


SWEPT = sweeps.profile(tuple(sweeps.samples()))


def took(kind: OperatorKind, *dims: float, back: bool = False) -> float:
    return sweeps.seconds(kind, dims)[back]


def test_a_block_is_the_sum_of_its_operators() -> None:
    """Four projections, three of the MLP, attention, two norms, two additions, rotary, one activation."""
    tokens, width = 2 * SEQ, 3 * HIDDEN
    products = [
        *[(tokens, HIDDEN, HIDDEN)] * 4,
        *[(tokens, width, HIDDEN)] * 2,
        (tokens, HIDDEN, width),
    ]
    beside = [
        (OperatorKind.ATTENTION, (2 * HEADS, SEQ, HIDDEN // HEADS)),
        *[(OperatorKind.NORM, (tokens, HIDDEN))] * 2,
        *[(OperatorKind.ROTARY, (tokens, HIDDEN))] * 2,
        (OperatorKind.ACTIVATION, (tokens * width,)),
    ]
    each = [(OperatorKind.GEMM, dims) for dims in products] + beside
    added = took(OperatorKind.ADD, tokens * HIDDEN)
    found = cost(SWEPT)
    assert found.origin == "fitted"
    assert found.forward_s == pytest.approx(sum(took(*a, *b) for *a, b in each) + 2 * added, rel=0.02)
    # Two gradients of the residual stream are added, and three of what is read by several products.
    back = sum(took(*a, *b, back=True) for *a, b in each) + 5 * added
    assert found.backward_s == pytest.approx(back, rel=0.02)


def test_ends_are_their_operators() -> None:
    tokens = 2 * SEQ
    head = cost(SWEPT, dataclasses.replace(SHAPE, kind=LayerKind.HEAD))
    by_hand = took(OperatorKind.CROSS_ENTROPY, tokens, VOCAB, HIDDEN) + took(
        OperatorKind.NORM, tokens, HIDDEN
    )
    assert head.forward_s == pytest.approx(by_hand, rel=0.02)
    embedding = cost(SWEPT, dataclasses.replace(SHAPE, kind=LayerKind.EMBEDDING))
    by_hand = took(OperatorKind.EMBEDDING, tokens, VOCAB, HIDDEN)
    assert embedding.forward_s == pytest.approx(by_hand, rel=0.05)


def test_experts_are_one_grouped_product_each_way() -> None:
    expert = Mlp(width=512, gated=True, activation=Activation.SILU)
    block = dataclasses.replace(
        instances.dense_block(HIDDEN, HEADS), mlp=Experts(count=16, topk=4, expert=expert)
    )
    of = instances.model(hidden=HIDDEN, blocks=[block] * 2)
    whole, shared = (cost(SWEPT, dataclasses.replace(SHAPE, ep=ep), of).forward_s for ep in (1, 4))
    tokens, rows = 2 * SEQ, 2 * SEQ * 4 / 16
    up, down = (took(OperatorKind.GROUPED, 16, rows, *dims) for dims in ((512, HIDDEN), (HIDDEN, 512)))
    router = took(OperatorKind.GEMM, tokens, 16, HIDDEN) + took(OperatorKind.ROUTING, tokens, 16, 4, HIDDEN)
    experts = 2 * up + down + router + took(OperatorKind.ACTIVATION, 16 * rows * 512)
    width = 3 * HIDDEN
    dense = 3 * took(OperatorKind.GEMM, tokens, width, HIDDEN) + took(OperatorKind.ACTIVATION, tokens * width)
    assert whole == pytest.approx(cost(SWEPT).forward_s - dense + experts, rel=0.03)
    assert shared > whole, "as many rows, but the slowest rank has more than its share"


def test_an_old_profile_loads_and_prices_as_before() -> None:
    old = sweeps.profile()
    data = json.loads(to_json(old))
    assert data.pop("rates") == []
    assert decode(Profile, data, source="test") == old
    assert measured_rates(old, Precision.BF16) is None
    assert rates(old).origin == rates(None).origin and rates(old).sampled is None
    by_host = sweeps.NO_HOST.value
    constants = dataclasses.replace(rates(None).constants, host_block_forward_s=by_host)
    assert cost(old) == analytic_cost(MODEL, SHAPE, dataclasses.replace(rates(None), constants=constants))
    assert decode_json(Profile, to_json(SWEPT), source="test") == SWEPT


def test_layers_that_were_measured_keep_priority() -> None:
    sample = LayerSample(
        kind=LayerKind.BLOCK,
        shape_key=shape_key(MODEL, LayerKind.BLOCK),
        precision=Precision.BF16,
        recompute=Recompute.NONE,
        tp=1,
        sequence_parallel=False,
        micro_batch=2,
        seq=SEQ,
        forward_s=0.5,
        backward_s=1.0,
        saved_bytes=1,
        forward_transient_bytes=1,
        backward_transient_bytes=1,
        spread=0.0,
        samples=3,
    )
    of = problem(sweeps.profile(SWEPT.rates, [sample]))
    model = LayerModel(of, problem_time_constants(of))
    assert model.cost(SHAPE).forward_s == 0.5
    # A length that was not measured scales as the operators say.
    longer = dataclasses.replace(SHAPE, seq=2 * SEQ, micro_batch=1)
    ratio = cost(SWEPT, longer).forward_s / cost(SWEPT).forward_s
    assert model.cost(longer).forward_s == pytest.approx(0.5 * ratio)


def test_other_engines_take_the_products_alone() -> None:
    other = rates(SWEPT, EngineSettings(engine=Engine.MEGATRON))
    assert other.pieces(SHAPE) is None
    assert product_s(2048, 2048, 2048, other) == pytest.approx(
        took(OperatorKind.GEMM, 2048, 2048, 2048), rel=0.05
    )
    assert matrices_s(MODEL.segments[0].block, SHAPE, other) > 0  # type: ignore[arg-type]


def test_rates_of_another_precision_say_nothing() -> None:
    assert measured_rates(SWEPT, Precision.FP32) is None
    swept = tuple(
        dataclasses.replace(s, precision=Precision.FP8) for s in SWEPT.rates if s.kind is OperatorKind.GEMM
    )
    both = measured_rates(sweeps.profile((*SWEPT.rates, *swept)), Precision.FP8)
    assert both is not None and both.has(OperatorKind.GEMM, OperatorKind.NORM)


def test_noise_leaves_constants_of_the_device() -> None:
    noisy = MeasuredRates(list(sweeps.samples(noise=0.05)), Precision.BF16)
    surface = noisy.surface(OperatorKind.GEMM)
    assert surface is not None
    assert surface.coefficients[-1] == pytest.approx(2 / sweeps.FLOPS, rel=0.05)
    assert surface.held_out_error < 0.06


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_more_tokens_and_fewer_shards_never_take_less(noise: float) -> None:
    swept, draw = sweeps.profile(tuple(sweeps.samples(noise=noise))), random.Random(1)
    for _ in range(40):
        kind = draw.choice(list(LayerKind))
        shape = dataclasses.replace(
            SHAPE, kind=kind, micro_batch=draw.uniform(0.2, 40), tp=draw.choice([2, 4, 8])
        )
        base = cost(swept, shape)
        more = cost(swept, dataclasses.replace(shape, micro_batch=shape.micro_batch * draw.uniform(1, 3)))
        longer = cost(swept, dataclasses.replace(shape, seq=SEQ * draw.choice([2, 4])))
        fewer = cost(swept, dataclasses.replace(shape, tp=shape.tp // 2))
        for name in ("forward_s", "backward_s"):
            assert getattr(more, name) >= getattr(base, name) * (1 - 1e-9)
            assert getattr(longer, name) >= getattr(base, name) * (1 - 1e-9)
            if kind is not LayerKind.EMBEDDING and shape.tp > 2:
                assert getattr(fewer, name) >= getattr(base, name) * (1 - 1e-9)


def test_a_device_twice_as_slow_takes_twice_as_long() -> None:
    slower = sweeps.profile(tuple(sweeps.samples(slower=2.0)))
    fast, slow = cost(SWEPT), cost(slower)
    assert slow.forward_s == pytest.approx(2 * fast.forward_s, rel=1e-6)
    assert slow.backward_s == pytest.approx(2 * fast.backward_s, rel=1e-6)


def test_a_faster_device_has_faster_operators() -> None:
    of = faster_devices(problem(SWEPT), 2.0)
    found = device_rates(of, problem_time_constants(of))
    assert analytic_cost(MODEL, SHAPE, found).forward_s == pytest.approx(cost(SWEPT).forward_s / 2, rel=1e-6)


def test_samples_are_compared_at_one_speed() -> None:
    """A sample beside which the reference took twice as long counts half its time."""
    one, two, three = (
        dataclasses.replace(SWEPT.rates[0], reference_s=reference_s) for reference_s in (1e-3, 2e-3, 1e-3)
    )
    usual = at_usual_speed([one, two, three])
    assert [s.forward_s / one.forward_s for s in usual] == pytest.approx([1.0, 0.5, 1.0])
    assert [s.forward_s / one.forward_s for s in at_usual_speed([one], 3e-3)] == pytest.approx([3.0])


def test_the_update_and_copies_are_those_of_the_sweep() -> None:
    of = problem(SWEPT)
    shape = CostModel(of).layout(Degrees())
    params = sum(shape.block_units[key].params for key in shape.classes)
    units = [(shape.block_units[key], 1) for key in shape.classes]
    # Three values moved of each parameter, for clipping and for the update.
    assert shape.optimizer_s(units) == pytest.approx(
        2 * 3 * sweeps.SIZE * params / sweeps.BYTES_PER_S, rel=0.1
    )
    sampled = measured_rates(SWEPT, Precision.BF16)
    assert sampled is not None
    assert sampled.copies_bytes_per_s(COPIED_BYTES) == pytest.approx(sweeps.BYTES_PER_S / 20, rel=0.05)


def test_rates_of_large_products_and_copies_follow_where_no_constant_says_them() -> None:
    found, constant = rates(SWEPT), 1e15
    large = max(2 * s.dims[0] * s.dims[1] * s.dims[2] / s.forward_s for s in SWEPT.rates if s.kind is GEMM)
    assert found.flops == pytest.approx(large)
    assert found.memory_bytes_per_s == pytest.approx(2 * 2**28 / took(OperatorKind.COPY, 2**28))
    said = Constant(name="gemm_flops", value=constant, origin="test")
    assert rates(sweeps.profile(SWEPT.rates, constants=[said])).flops == constant


def test_activations_and_norms_that_were_not_swept_take_the_nearest() -> None:
    sampled = MeasuredRates(SWEPT.rates, Precision.BF16)
    for variant in ("relu2", "gelu_tanh", "silu"):
        alike = sampled.forward_s(OperatorKind.ACTIVATION, 2**20, variant=variant)
        assert alike == sampled.forward_s(OperatorKind.ACTIVATION, 2**20, variant="gelu")
    assert sampled.surface(OperatorKind.OPTIMIZER, "muon") is None

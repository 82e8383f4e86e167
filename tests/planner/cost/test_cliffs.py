"""No cliffs: neighbouring inputs give neighbouring figures, at the knots of tables and profiles too."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import pytest

from planner.cost.communication.collectives import CommModel, Group
from planner.cost.compute.gemm import GemmModel
from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.layer import LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.hardware import measured_tables as measured
from planner.hardware.catalog import load_device, load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import CommSample, LayerKind, LayerSample, Op
from planner.strategy.estimate import Estimate
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

CLIFF = 1.15
"""The most that a figure may jump between neighbours, besides what the input itself grew by."""
FIGURES = ("forward_s", "backward_s", "saved_bytes", "forward_transient_bytes", "backward_transient_bytes")


def geometric(low: float, high: float, factor: float) -> list[float]:
    """Sizes from low to high, each `factor` times the one before."""
    return [low * factor**k for k in range(math.ceil(math.log(high / low) / math.log(factor)) + 1)]


def assert_smooth(figure: Callable[[float], float], inputs: Iterable[float], *, rises: bool = True) -> None:
    """The figure over rising inputs: it never falls (where it `rises`) and has no cliff."""
    for (a, before), (b, after) in itertools.pairwise((x, figure(x)) for x in inputs):
        grown = (b / a) ** 2  # attention grows with the square of a sequence
        assert after <= before * grown * CLIFF + 1e-12, (a, before, b, after)
        assert after >= before * ((1 - 1e-9) if rises else 1 / CLIFF), (a, before, b, after)


CLUSTERS = (
    "4x8:h100-sxm-80gb@ndr400x8", "4x8:a100-sxm-80gb@hdr200x8", "4x8:b200-sxm@ndr400x8",
    "4x8:mi300x@eth100x1", "4x4:l40s@roce200x8", "4x8:gaudi3@ndr400x8",
)  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_messages(cluster: str) -> None:
    """Of every size from 1 B to 64 GiB in steps of 3 %, over every kind of group, at knots and beyond."""
    comms = CommModel(instances.problem(on=parse_cluster(cluster, "test")))
    groups = [Group(ranks=n, groups=1, spans_nodes=False) for n in (2, 3, 4, 8)]
    groups += [
        Group(ranks=n, groups=1, spans_nodes=True, nodes=k) for n, k in ((2, 2), (4, 4), (6, 3), (32, 4))
    ]
    for op, group in itertools.product(Op, groups):
        assert_smooth(
            lambda size, o=op, g=group: comms.cost(o, size, g).seconds, geometric(1.0, 2.0**36, 1.03)
        )  # type: ignore[misc]


@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_messages_along_a_profiles_curve(spread: float) -> None:
    """Noise of 40 % between neighbouring samples, from below the first to beyond the last."""
    sizes = [2**k for k in range(10, 29, 2)]
    seconds = [1e-5 + size / 1e10 * (1.4 if index % 2 else 1.0) for index, size in enumerate(sizes)]
    seconds[4], seconds[5] = seconds[5], seconds[4]  # a larger message that was faster
    samples = tuple(
        CommSample(op=op, ranks=4, groups=1, bytes=size, seconds=s, spread=spread, samples=5)
        for op in Op
        for size, s in zip(sizes, seconds, strict=True)
    )
    problem = dataclasses.replace(instances.problem(), profile=instances.profile(comms=samples))
    group = Group(ranks=4, groups=1, spans_nodes=False)
    for op in Op:
        assert_smooth(
            lambda size, o=op: CommModel(problem).cost(o, size, group).seconds, geometric(1.0, 2.0**34, 1.05)
        )  # type: ignore[misc]


@pytest.mark.parametrize("name", [table.products[0] for table in measured.tables().values()] + ["mi300x"])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_products(name: str, precision: Precision) -> None:
    """Each dimension from 1 to 100,000 in steps of 2 %: time never falls and has no cliff."""
    model = GemmModel(load_device(name).device(), precision)
    if model.peak_flops is None:
        return

    def seconds(m: float, n: float, k: float) -> float:
        rate = model.rate_flops(m, n, k)
        assert rate is not None
        return m * n * k / rate[0]

    for a, b in itertools.product((1, 100, 128, 500, 1449, 4096, 20_000), (64, 725, 4096, 16_384)):
        sizes = geometric(1.0, 1e5, 1.02)
        assert_smooth(lambda m, n=a, k=b: seconds(m, n, k), sizes)  # type: ignore[misc]
        assert_smooth(lambda n, m=a, k=b: seconds(m, n, k), sizes)  # type: ignore[misc]
        assert_smooth(lambda k, m=a, n=b: seconds(m, n, k), sizes)  # type: ignore[misc]


def sample(
    kind: LayerKind, key: str, recompute: Recompute, tp: int, micro_batch: int, seq: int
) -> LayerSample:
    """A layer on a device with a high host floor and a rate unlike the analytic model's, which drifts."""
    tokens = micro_batch * seq
    again = 0.6 if recompute is Recompute.FULL else 0.0
    return LayerSample(
        kind=kind,
        shape_key=key,
        precision=Precision.FP32,
        recompute=recompute,
        tp=tp,
        sequence_parallel=False,
        micro_batch=micro_batch,
        seq=seq,
        forward_s=2e-3 + 3e-6 * tokens**1.1 / tp,
        backward_s=(2 + again) * (2e-3 + 3e-6 * tokens**1.1 / tp),
        saved_bytes=round((1 - again) * 3000 * tokens) + 999,
        forward_transient_bytes=500 * tokens,
        backward_transient_bytes=1500 * tokens,
        spread=0.02,
        samples=5,
        reference_s=1e-3,
    )


def profiled(lengths: tuple[int, ...]) -> LayerModel:
    """Layers of a small model, measured at these sequence lengths, micro-batches 1, 4 and 16, tp 1 and 2."""
    problem = instances.problem(precision=Precision.FP32)
    block, ends = problem.model.segments[0].block.shape_key, f"h{problem.model.hidden}-v{problem.model.vocab}"
    keys = {LayerKind.BLOCK: block, LayerKind.HEAD: ends, LayerKind.EMBEDDING: ends}
    samples = tuple(
        sample(kind, key, recompute, tp, micro_batch, seq)
        for (kind, key), recompute, tp, micro_batch, seq in itertools.product(
            keys.items(), (Recompute.NONE, Recompute.FULL), (1, 2), (1, 4, 16), lengths
        )
    )
    problem = dataclasses.replace(problem, profile=instances.profile(layers=samples))
    return LayerModel(problem, time_constants_of(problem.profile, problem.engine_settings))


@pytest.mark.parametrize("lengths", [(256,), (128, 1024), (64, 256, 300, 2048)])
def test_layers_between_what_a_profile_measured(lengths: tuple[int, ...]) -> None:
    """Sequence by sequence below, at, between and beyond the measured lengths, at other widths too."""
    layers = profiled(lengths)
    edges = [length + more for length in lengths for more in (-1, 0, 1)]
    inputs = sorted({*edges, *(int(x) for x in geometric(20, 5000, 1.06))})
    for kind, recompute, tp, micro_batch in itertools.product(
        LayerKind, (Recompute.NONE, Recompute.FULL, Recompute.SELECTIVE), (1, 2, 4), (1, 3, 4, 20)
    ):
        shape = LayerShape(
            kind=kind,
            tp=tp,
            sequence_parallel=False,
            micro_batch=micro_batch,
            seq=1,
            precision=Precision.FP32,
            recompute=recompute,
        )
        for name in FIGURES:
            assert_smooth(
                lambda seq, s=shape, n=name: float(  # type: ignore[misc]
                    getattr(layers.cost(dataclasses.replace(s, seq=int(seq))), n)
                ),
                inputs,
            )


def test_a_measured_length_is_what_was_measured() -> None:
    """At a sample, the sample or the line through its neighbours; at the next length, nearly that."""
    layers = profiled((128, 1024))
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=2, sequence_parallel=False, micro_batch=4, seq=1024, precision=Precision.FP32
    )
    known = sample(LayerKind.BLOCK, "", Recompute.NONE, 2, 4, 1024)
    near = dataclasses.replace(shape, seq=1025)
    for name in FIGURES:
        here = getattr(layers.cost(shape), name)
        assert here == pytest.approx(getattr(known, name), rel=0.06)
        assert getattr(layers.cost(near), name) == pytest.approx(here, rel=0.002)


def shaped(hidden: int, ffn: int, vocab: int) -> ModelSpec:
    """A llama of eight layers whose widths are no round numbers."""
    mixer = Attention(heads=8, kv_heads=8, head_dim=hidden // 8)
    block = Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=mixer,
        mlp=Mlp(width=ffn, gated=True, activation=Activation.SILU),
    )
    return instances.model(hidden=hidden, vocab=vocab, blocks=[block] * 8)


LAYOUTS = (
    Degrees(dp_shard=16, zero=Zero.PARAMETERS, micro_batch=1, num_micro_batches=2),
    Degrees(tp=4, pp=2, dp_replicate=2, micro_batch=1, num_micro_batches=8, sequence_parallel=True),
    Degrees(tp=2, pp=4, dp_shard=2, zero=Zero.OPTIMIZER, micro_batch=2, num_micro_batches=8),
    Degrees(tp=8, dp_shard=2, zero=Zero.GRADIENTS, micro_batch=1, num_micro_batches=4),
)


def whole(cluster: str, model: ModelSpec, seq: int, degrees: Degrees, recompute: Recompute) -> Estimate:
    on = parse_cluster(cluster, "test")
    batch = degrees.dp * degrees.micro_batch * degrees.num_micro_batches
    problem = PlanningProblem(
        model=model,
        workload=Workload(seq=seq, batch=batch, precision=Precision.BF16),
        cluster=on,
        profile=None,
        memory_limit_bytes=on.groups[0].device.usable_memory_bytes,
    )
    stages = even_stages(model.layers, degrees.stages, recompute)
    return CostModel(problem).evaluate(Strategy(degrees=degrees, stages=stages)).estimate


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: degrees.label())
@pytest.mark.parametrize("cluster", ["2x8:h100-sxm-80gb@ndr400x8", "2x8:mi300x@eth100x1"])
def test_whole_estimates(cluster: str, degrees: Degrees) -> None:
    """Step time and memory over sequence length, model width, MLP width, vocabulary: neighbours, and far."""
    llama = load_model("llama-3-8b")
    axes: list[tuple[Callable[[int], tuple[ModelSpec, int]], float, float, int]] = [
        (lambda seq: (llama, seq), 64, 60_000, 8),
        (lambda hidden: (shaped(hidden, 4096, 32_000), 2048), 256, 16_000, 64),
        (lambda ffn: (shaped(2048, ffn, 32_000), 2048), 256, 60_000, 64),
        (lambda vocab: (shaped(2048, 4096, vocab), 2048), 256, 300_000, 64),
    ]
    for at, low, high, multiple in axes:
        inputs = sorted({int(x) // multiple * multiple for x in geometric(low, high, 1.2)})
        inputs = sorted({x + more for x in inputs for more in (0, multiple)})
        recompute = Recompute.FULL if degrees.pp > 1 else Recompute.NONE
        found = {x: whole(cluster, *at(x), degrees, recompute) for x in inputs}
        for name in ("step_time_s", "peak_memory_bytes"):
            assert_smooth(lambda x, n=name, f=found: float(getattr(f[int(x)], n)), inputs)  # type: ignore[misc]


def test_a_cliff_is_seen() -> None:
    """The check itself: a step of 20 % and a fall both fail it."""
    for wrong in (lambda x: 1.0 if x < 10 else 1.4, lambda x: 1.0 if x < 10 else 0.99):
        with pytest.raises(AssertionError):
            assert_smooth(wrong, geometric(1, 100, 1.02))

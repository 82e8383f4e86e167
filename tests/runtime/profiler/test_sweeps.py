"""Sweeps of operators on this CPU: every kind runs both ways, cases lie within limits, families predict."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

torch = pytest.importorskip("torch")

from planner.cost.compute.measured_operators import TERMS, Surface, measured_rates
from planner.foundation.decode import decode
from planner.hardware.catalog import load_model
from planner.model.workload import Precision
from planner.profile.profile import OperatorKind, OperatorSample, Profile
from runtime.model.fp8 import LEAST_CAPABILITY
from runtime.profiler.device import OF_CUDA
from runtime.profiler.host import CONSTANTS, CommunicatorFamily, HostFamily, measure_host
from runtime.profiler.operators import Bench, Operator, RateFamily, measure_sweeps, rate_families
from runtime.profiler.profile_cases import Adaptive
from runtime.profiler.profiler import take_profile
from runtime.profiler.scope import Sweeps
from runtime.profiler.sweeps import (
    FEW_SHARES,
    LIMITS,
    SORTS,
    SWEEPS,
    RateCase,
    Sweep,
    build_piece,
    cases_of,
    work_of,
)
from runtime.profiler.timing import Effort
from tests.plans import local_cluster, tiny_llama
from tests.runtime.profiler.test_profiler import Silence, scope

ONCE = Effort(warmup=1, least=2, most=2, budget_s=0.0)
CPU = torch.device("cpu")
FP32 = Precision.FP32
SMALL: dict[OperatorKind, tuple[int, ...]] = {
    OperatorKind.GEMM: (8, 12, 16),
    OperatorKind.GROUPED: (3, 8, 16, 16),
    OperatorKind.ROUTING: (16, 4, 2, 8),
    OperatorKind.ATTENTION: (2, 16, 8),
    OperatorKind.ADD: (64,),
    OperatorKind.ACTIVATION: (64,),
    OperatorKind.NORM: (8, 16),
    OperatorKind.ROTARY: (8, 16),
    OperatorKind.CROSS_ENTROPY: (8, 32, 16),
    OperatorKind.EMBEDDING: (8, 32, 16),
    OperatorKind.OPTIMIZER: (2, 16),
    OperatorKind.COPY: (256,),
}
"""Of each kind that a CPU has."""

VARIANTS = {
    OperatorKind.ACTIVATION: ("silu-gated", "gelu"),
    OperatorKind.NORM: ("rmsnorm", "layernorm"),
    OperatorKind.OPTIMIZER: ("adamw", "clip"),
}


def small_cases() -> list[RateCase]:
    return [
        RateCase(kind=kind, dims=dims, precision=FP32, variant=variant)
        for kind, dims in SMALL.items()
        for variant in VARIANTS.get(kind, ("",))
    ]


def test_every_kind_of_a_cpu_is_swept_and_has_a_form() -> None:
    assert {sweep.kind for sweep in SWEEPS["cpu"]} == set(SMALL)
    assert {sweep.kind for sweep in SWEEPS["cuda"]} == set(OperatorKind)
    assert sorted(kind for kinds in SORTS.values() for kind in kinds) == sorted(OperatorKind)
    for sweep in (*SWEEPS["cpu"], *SWEEPS["cuda"]):
        assert all(len(exponents) == len(sweep.axes) for exponents in TERMS[sweep.kind])


@pytest.mark.parametrize("case", small_cases(), ids=RateCase.label)
def test_a_piece_runs_both_ways_and_leaves_nothing(case: RateCase) -> None:
    """Inputs get gradients that are let go, weights add to those that exist."""
    bench = Bench(build_piece(case, CPU), CPU)
    bench.prepare()
    bench.forward()
    if bench.piece.turned:
        assert len(bench.outputs) == bench.calls
        bench.backward()
    assert not bench.outputs
    assert all(x.grad is None for inputs in bench.inputs for x in inputs)


def test_small_samples_in_a_process_of_their_own() -> None:
    cases = small_cases()
    found = [decode(OperatorSample, each, source="test") for each in measure_sweeps(cases, "cpu", ONCE)]
    assert [(s.kind, s.dims, s.variant) for s in found] == [(c.kind, c.dims, c.variant) for c in cases]
    one_way = (OperatorKind.ADD, OperatorKind.OPTIMIZER, OperatorKind.COPY)
    for sample in found:
        assert sample.forward_s > 0 and sample.reference_s
        assert (sample.backward_s is None) == (sample.kind in one_way)


def test_a_case_without_memory_is_skipped_and_the_next_is_measured() -> None:
    add = RateCase(kind=OperatorKind.ADD, dims=(64,), precision=FP32)
    huge = RateCase(kind=OperatorKind.ADD, dims=(1 << 50,), precision=FP32)
    first, second = measure_sweeps([huge, add], "cpu", ONCE)
    assert "not enough memory" in first["skipped"] and str(1 << 50) in first["skipped"]
    assert second["dims"] == [64]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("few", [False, True])
def test_cases_are_within_limits_apart_and_as_many_as_wanted(device: str, few: bool) -> None:
    limits = LIMITS[device].times(FEW_SHARES[device] if few else 1.0)
    for sweep in SWEEPS[device]:
        for variant in sweep.variants:
            cases = cases_of(sweep, variant, FP32, limits, sweep.few)
            assert len({case.label() for case in cases}) == len(cases) == sweep.few
            for case in cases:
                flops, values = work_of(case.kind, case.dims)
                assert flops <= limits.flops and values <= limits.values
                assert all(a <= size <= b for size, (a, b) in zip(case.dims, sweep.axes, strict=True))


def test_the_first_cases_span_what_the_others_lie_between() -> None:
    sweep = next(sweep for sweep in SWEEPS["cpu"] if sweep.kind is OperatorKind.NORM)
    cases = cases_of(sweep, "rmsnorm", FP32, LIMITS["cpu"], 12)

    def least_apart(count: int) -> float:
        places = [tuple(math.log2(size) for size in case.dims) for case in cases[:count]]
        return min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i])

    apart = [least_apart(count) for count in range(2, 13)]
    assert apart == sorted(apart, reverse=True)


def family(few: bool = False) -> RateFamily:
    sweep = Sweep(kind=OperatorKind.ADD, axes=((2**8, 2**14),), count=8, few=4)
    return RateFamily("sums", [Operator(sweep=sweep, variant="", precision=FP32)], "cpu", ONCE, few=few)


def made_up(case: RateCase) -> OperatorSample:
    seconds = 1e-6 + 1e-10 * case.dims[0]
    return OperatorSample(
        kind=case.kind, dims=case.dims, precision=FP32, forward_s=seconds, spread=0.01, samples=3
    )


def test_a_family_is_surer_of_what_it_measured() -> None:
    of = family()
    assert isinstance(of, Adaptive)
    assert len(of.cases()) == 8 and list(of.seeds()) == list(of.cases())[:4]
    assert of.held_out_error([]) is None
    assert of.uncertainty(of.cases()[0], []) == math.inf
    samples = [made_up(case) for case in of.seeds()]
    error = of.held_out_error(samples)
    assert error is not None and error < 0.05
    taken, left = of.cases()[1], of.cases()[-1]
    assert of.uncertainty(taken, samples) <= of.uncertainty(left, samples)
    more = [*samples, made_up(left)]
    assert of.uncertainty(left, more) <= of.uncertainty(left, samples)


def test_few_cases_are_smaller_and_none_are_none() -> None:
    assert len(family(few=True).cases()) == 4
    assert rate_families("cpu", FP32, ONCE, Sweeps.NONE) == []
    names = [family.name for family in rate_families("cpu", FP32, ONCE, Sweeps.FEW)]
    assert len(set(names)) == len(names) == len(SORTS)


@pytest.fixture
def two_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        Sweep(kind=OperatorKind.GEMM, axes=((16, 64), (16, 64), (16, 64)), count=8, few=8),
        Sweep(kind=OperatorKind.ADD, axes=((2**8, 2**12),), count=4, few=4),
    )
    monkeypatch.setitem(SWEEPS, "cpu", small)


@pytest.mark.usefixtures("two_sweeps")
def test_a_profile_holds_its_sweeps() -> None:
    import dataclasses

    wanted = dataclasses.replace(scope((1,)), sweeps=Sweeps.FEW, sweep_effort=ONCE, micro_batches=(1,))
    profile: Profile = take_profile([tiny_llama()], local_cluster(1), FP32, wanted, Silence())
    assert {sample.kind for sample in profile.rates} == {OperatorKind.GEMM, OperatorKind.ADD}
    assert len(profile.rates) == 12 and all(sample.taken for sample in profile.rates)
    sampled = measured_rates(profile, FP32)
    assert sampled is not None
    small, large = (sampled.forward_s(OperatorKind.GEMM, n, n, n) for n in (16.0, 4096.0))
    assert 0 < small < large


CUDA_SMALL = SMALL | {
    OperatorKind.GEMM: (64, 64, 64),
    OperatorKind.GROUPED: (4, 32, 64, 64),
    OperatorKind.ATTENTION: (2, 128, 64),
    OperatorKind.TO_DEVICE: (4096,),
    OperatorKind.TO_HOST: (4096,),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_every_kind_is_swept_on_an_accelerator() -> None:
    host = dict.fromkeys((OperatorKind.TO_DEVICE, OperatorKind.TO_HOST), ("pinned", "pageable"))
    cases = [
        RateCase(kind=kind, dims=dims, precision=Precision.BF16, variant=variant)
        for kind, dims in CUDA_SMALL.items()
        for variant in (VARIANTS | host).get(kind, ("",))
    ]
    if torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
        cases.append(RateCase(kind=OperatorKind.GEMM, dims=(64, 64, 64), precision=Precision.FP8))
    found = [decode(OperatorSample, each, source="test") for each in measure_sweeps(cases, "cuda", ONCE)]
    assert len(found) == len(cases)
    assert all(sample.forward_s > 0 and sample.reference_s is None for sample in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_overlap_and_the_allocator_on_an_accelerator() -> None:
    messages = list(measure_host(OF_CUDA, "cuda", Precision.BF16, ONCE))
    values = {each["name"]: each["value"] for message in messages for each in message["constants"]}
    assert values["overlap_slowdown"] >= 0 and values["overlap_message_slowdown"] >= 0
    assert 1.0 <= values["allocator_slack"] < 3.0


def test_a_cpu_has_neither() -> None:
    groups = [case.group for case in HostFamily("cpu", FP32, ONCE).cases()]
    assert not set(groups) & set(OF_CUDA) and set(groups) | set(OF_CUDA) == set(CONSTANTS)
    assert list(CommunicatorFamily(4, on_cuda=False).cases()) == []
    assert list(CommunicatorFamily(1, on_cuda=True).cases()) == []
    assert len(CommunicatorFamily(4, on_cuda=True).cases()) == 1


def tiled_s(m: float, n: float, k: float) -> float:
    """A product on a device that is made up after an H100: tiles of 128 x 256, 132 of them at once."""
    waves = math.ceil(math.ceil(m / 128) * math.ceil(n / 256) / 132)
    computed_s = waves * 2 * 128 * 256 * (k + 64) / (800e12 / 132)
    return 4e-6 + max(computed_s, 2 * (m * n + n * k + m * k) / 2.8e12)


def test_cases_of_a_gpu_tell_of_shards_of_real_models() -> None:
    """Products of blocks of 0.1 to 405 billion parameters, in up to eight shards."""
    sweep = next(sweep for sweep in SWEEPS["cuda"] if sweep.kind is OperatorKind.GEMM)
    cases = cases_of(sweep, "", Precision.BF16, LIMITS["cuda"], sweep.count)
    noise = random.Random(0)
    seconds = [tiled_s(*case.dims) * math.exp(noise.gauss(0, 0.02)) for case in cases]
    surface = Surface([case.dims for case in cases], seconds, TERMS[OperatorKind.GEMM])
    products, blocks = [], []
    for name, tp in itertools.product(("gpt2", "llama-3.2-1b", "llama-3-70b", "llama-3.1-405b"), (1, 2, 8)):
        block = load_model(name).segments[0].block
        each = [(4096.0, *reversed(matrix.shard(tp))) for matrix in block.matrices()]  # type: ignore[union-attr]
        found, true = [surface.seconds(*dims) for dims in each], [tiled_s(*dims) for dims in each]
        products += [abs(a / b - 1) for a, b in zip(found, true, strict=True)]
        blocks.append(abs(sum(found) / sum(true) - 1))
    assert statistics.median(products) < 0.06 and statistics.median(blocks) < 0.04
    assert max(blocks) < 0.2
    assert sum(seconds) < 2.0, "a run of all of them is quick"

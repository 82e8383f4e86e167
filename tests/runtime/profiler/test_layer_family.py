"""Samples of layers predict each other: which is measured next, and when they are enough.

The device is made up: what a layer takes is what the analytic model says, times a factor that depends on
tokens, width and exchange and that the samples must tell.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("torch")

from planner.cost.stage.layer_samples import Run
from planner.hardware.cluster_text import parse_cluster
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, LayerSample, shape_key
from runtime.profiler.layer_family import LayerFamily, separation
from runtime.profiler.layers import LayerCase, corners, layer_cases
from runtime.profiler.profile_cases import Adaptive, Reading
from runtime.profiler.profiler import families_of
from runtime.profiler.scheduler import Scheduler
from runtime.profiler.scope import Scope, default_scope
from tests.plans import local_cluster, tiny_llama, tiny_mixtral

TARGET = 0.05


class MadeUp(LayerFamily):
    """Layers of a device that is slower than the analytic model, in ways of its own."""

    def __init__(self, model: ModelSpec, scope: Scope, noise: float = 0.0) -> None:
        super().__init__(model, Precision.FP32, "cpu", local_cluster(4).groups[0].device, scope)
        self.noise = noise
        self.taken: list[LayerCase] = []

    def measure(self, cases: Sequence[LayerCase]) -> Iterator[Reading]:
        for case in cases:
            self.taken.append(case)
            yield Reading(samples=(self.sample(case),))

    def sample(self, case: LayerCase) -> LayerSample:
        run = Run(compiled=case.compiled, apart=False, balanced=True)
        cost = self.prediction._layers.analytic(self.prediction.shape(case), run)
        tokens = case.micro_batch * case.seq
        slower = (1 + 20 / math.sqrt(tokens)) * case.tp**0.3 * case.cp**0.2
        slower *= 1.3 if case.recompute is Recompute.SELECTIVE else 1.0
        slower *= 1 + random.Random(case.label()).uniform(-self.noise, self.noise)
        return LayerSample(
            kind=case.kind,
            shape_key=self.prediction.key(case),
            precision=Precision.FP32,
            recompute=case.recompute,
            tp=case.tp,
            sequence_parallel=case.sequence_parallel,
            micro_batch=case.micro_batch,
            seq=case.seq,
            forward_s=slower * cost.forward_s,
            backward_s=slower * cost.backward_s,
            saved_bytes=round(cost.saved_bytes),
            forward_transient_bytes=round(cost.forward_transient_bytes),
            backward_transient_bytes=round(cost.backward_transient_bytes),
            spread=self.noise,
            samples=9,
            cp=case.cp,
            cp_exchange=case.cp_exchange if case.cp > 1 else None,
            ep=case.ep,
            etp=case.etp,
            compiled=case.compiled,
        )


class Nobody:
    def settled(self, family: str, case: str, reading: Reading) -> None: ...

    def ahead(self, cases: int, left_s: float | None) -> None: ...


def scope(**changes: Any) -> Scope:
    usual = default_scope(8, (256, 1024, 4096), quick=False, micro_batches=(1, 2, 4, 8))
    return dataclasses.replace(usual, widths=(1, 2, 4), cps=(1, 2), **changes)


def true_error(family: MadeUp, samples: Sequence[LayerSample]) -> float:
    """The mean over every case that was not taken, weighed by what its class takes of a pass."""
    left = [family.sample(case) for case in family.cases() if case not in family.taken]
    weights = family.weights(samples)
    errors = []
    for sample in left:
        cost = family.prediction.cost(family.prediction.case_of(sample), samples)
        assert cost is not None
        errors.append((abs(cost.forward_s / sample.forward_s - 1), weights[sample.kind, sample.shape_key]))
    return sum(error * weight for error, weight in errors) / sum(weight for _, weight in errors)


@pytest.mark.parametrize(
    "model", [tiny_llama(hidden=512, vocab=1024), tiny_mixtral(hidden=256)], ids=lambda m: m.name
)
def test_fewer_cases_than_there_are_tell_of_all(model: ModelSpec) -> None:
    family = MadeUp(model, scope(eps=(1, 2)))
    assert isinstance(family, Adaptive)
    scheduler = Scheduler([family], TARGET, 60.0, Nobody())
    assert scheduler.run()
    (course,) = scheduler.courses
    samples = [sample for sample in course.samples if isinstance(sample, LayerSample)]
    claimed = family.held_out_error(samples)
    assert len(family.taken) < 0.5 * len(family.cases())
    assert claimed is not None and claimed <= TARGET
    assert true_error(family, samples) <= 1.6 * TARGET


def test_what_noise_explains_asks_for_no_more_samples() -> None:
    """Where samples differ by their own spread only, the doubts are no larger than without it."""
    quiet, noisy = (MadeUp(tiny_llama(hidden=512), scope(), noise=noise) for noise in (0.0, 0.03))
    cases = quiet.cases()
    known, asked = cases[::3], cases[1]
    doubts = [family.uncertainty(asked, [family.sample(case) for case in known]) for family in (quiet, noisy)]
    assert doubts[1] == pytest.approx(doubts[0], abs=0.02)


def test_nothing_is_predicted_from_nothing_or_from_other_classes() -> None:
    family = MadeUp(tiny_llama(hidden=512), scope())
    block = next(case for case in family.cases() if case.kind is LayerKind.BLOCK)
    head = [family.sample(case) for case in family.cases() if case.kind is LayerKind.HEAD]
    assert family.uncertainty(block, []) == family.uncertainty(block, head) == math.inf
    assert family.prediction.cost(block, head) is None
    assert family.held_out_error(head[:1]) is None


def test_doubt_grows_with_distance() -> None:
    family = MadeUp(tiny_llama(hidden=512), scope())
    plain = [
        case
        for case in family.cases()
        if (case.kind, case.recompute, case.tp, case.cp) == (LayerKind.BLOCK, Recompute.NONE, 1, 1)
    ]
    samples = [family.sample(case) for case in plain if case.micro_batch in (1, 8)]
    near = next(case for case in plain if case.micro_batch == 4)
    far = dataclasses.replace(near, tp=2)
    farther = dataclasses.replace(near, tp=4, cp=2, recompute=Recompute.FULL)
    known = family.prediction.case_of(samples[0])
    doubts = [family.uncertainty(case, samples) for case in (known, near, far, farther)]
    assert doubts == sorted(doubts) and doubts[0] == 0.0 < doubts[1]


def test_separation_is_a_distance() -> None:
    cases = layer_cases(tiny_mixtral(), [128, 512], [1, 2], [1, 4], [1, 2], [1, 2], [False, True])
    drawn = random.Random(3)
    for _ in range(500):
        a, b, c = drawn.sample(cases, 3)
        assert separation(a, b) == pytest.approx(separation(b, a))
        assert (separation(a, b) == 0) == (dataclasses.replace(a, kind=b.kind, block=b.block) == b)
        assert (
            separation(a, c) <= separation(a, b) + separation(b, c) + 2.0
        )  # exchanges count from none as less


def test_corners_hold_every_way_to_run_a_layer() -> None:
    cases = layer_cases(tiny_mixtral(), [128, 1024], [1, 2, 4], [1, 2, 4, 8], [1, 2], [1, 4], [False, True])
    found = corners(cases)
    assert len(found) == len(set(found)) < len(cases) / 7
    for kind in LayerKind:
        tokens = [case.micro_batch * case.seq for case in cases if case.kind is kind]
        own = [case.micro_batch * case.seq for case in found if case.kind is kind]
        assert (min(own), max(own)) == (min(tokens), max(tokens))
    blocks = [case for case in found if case.kind is LayerKind.BLOCK]
    for name in ("recompute", "sequence_parallel", "cp", "cp_exchange", "ep", "etp", "compiled"):
        every = {getattr(case, name) for case in cases if case.kind is LayerKind.BLOCK}
        assert {getattr(case, name) for case in blocks} == every, name
    assert max(case.tp for case in blocks) == 4


def test_every_case_has_the_sample_that_is_its_own() -> None:
    model = tiny_mixtral(hidden=256)
    family = MadeUp(model, scope(eps=(1, 2), compiled=(False, True)))
    first = shape_key(model, LayerKind.BLOCK)
    for case in family.cases():
        back = family.prediction.case_of(family.sample(case))
        assert dataclasses.replace(back, block="" if back.block == first else back.block) == case


def test_a_device_that_multiplies_fp8_is_measured_in_it() -> None:
    """Where kernels have the sizes, and never experts."""
    narrow = dataclasses.replace(tiny_llama(hidden=40), name="narrow")
    models = [tiny_llama(hidden=64), narrow, tiny_mixtral(hidden=64)]
    found = {}
    for device in ("1x1:h100-sxm-80gb", "1x1:a100-sxm-80gb"):
        families = families_of(models, parse_cluster(device), Precision.BF16, scope())
        found[device] = {f.name: len(f.cases()) for f in families if isinstance(f, LayerFamily)}
    names = [f"layers of {name}" for name in ("tiny-llama", "narrow", "tiny-mixtral")]
    assert list(found["1x1:a100-sxm-80gb"]) == names
    assert list(found["1x1:h100-sxm-80gb"]) == [*names, "layers of tiny-llama in fp8"]
    assert found["1x1:h100-sxm-80gb"]["layers of tiny-llama in fp8"] < found["1x1:h100-sxm-80gb"][names[0]]

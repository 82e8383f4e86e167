"""The layers of a model, as a family of the profiler.

How well samples of layers predict each other, by the cost model that plans are made with.

Each sample is predicted from the others of its layer class; `off` is how far the prediction was, |log| of
predicted over measured, forward or backward, whichever is more. The same at a distance of one doubling (of
tokens, of ranks, or from one recompute, exchange or compiler to another) is its unrest, without what its own
spread explains. A case that is not measured may be off by the unrest around it times its distance from the
nearest sample: where samples told little of each other, and far from all of them, the next is worth most.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from planner.cost.constants import time_constants_of
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.layer_samples import SampleTable, at_usual_speed, distance, form_of
from planner.hardware.cluster import Device
from planner.job.engine_settings import EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import LayerKind, LayerSample, shape_key
from planner.strategy.engines.native import not_executed_workload, products_not_executed
from runtime.profiler.layers import LayerCase, corners, layer_cases, measure_layers
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.scope import Scope
from runtime.profiler.timed_plans import bench_plan

NOMINAL_FLOPS, NOMINAL_BYTES_PER_S = 8e10, 1e10
"""Rates of a CPU core where the device's are unknown. Only their ratio counts, since predictions are scaled
by samples: 81 GFLOP/s of products of 1024^3 in fp32 and about 10 GB/s of copies on an AMD EPYC."""

MEDIAN_ERROR = 0.93
"""Standard error of a median over its samples' interquartile range, times the root of their number: for a
normal distribution sqrt(pi / 2) / 1.349."""

USUAL_UNREST = 0.1
"""Unrest where nothing is known: it weighs as much as one sample at the very place. Doubling ranks or tokens
of a demo model's layers on a CPU moves measured over analytic by 5 to 20 %."""

LEAST = 3
"""Samples from which a mean error speaks."""


class LayerPrediction:
    """Predicts cases of one model from samples on one device."""

    def __init__(self, model: ModelSpec, precision: Precision, device: Device) -> None:
        self.model, self.precision = model, precision
        problem = _problem(model, precision, device)
        self._layers = LayerModel(problem, time_constants_of(None, problem.engine_settings))

    def cost(self, case: LayerCase, samples: Sequence[LayerSample]) -> LayerCost | None:
        """What the samples tell of a case; None where none is of its class."""
        table = SampleTable(samples, self.precision, self._layers.analytic, curved=True)
        return table.cost(self.key(case), self.shape(case), compiled=case.compiled)

    def key(self, case: LayerCase) -> str:
        """The class of a case as samples name it."""
        return case.block or shape_key(self.model, case.kind)

    def shape(self, case: LayerCase) -> LayerShape:
        """What a case asks of the cost model."""
        return LayerShape(
            kind=case.kind,
            tp=case.tp,
            sequence_parallel=case.sequence_parallel,
            micro_batch=case.micro_batch,
            seq=case.seq,
            precision=self.precision,
            recompute=case.recompute,
            block=case.block,
            rotary=self.model.rotary,
            cp=case.cp,
            cp_exchange=case.cp_exchange,
            ep=case.ep,
            etp=case.etp,
        )

    def case_of(self, sample: LayerSample) -> LayerCase:
        """The case of a sample."""
        plain = LayerCase(
            kind=sample.kind,
            recompute=sample.recompute,
            tp=sample.tp,
            sequence_parallel=sample.sequence_parallel,
            micro_batch=sample.micro_batch,
            seq=sample.seq,
            block=sample.shape_key if sample.kind is LayerKind.BLOCK else "",
            cp=sample.cp,
            ep=sample.ep,
            etp=sample.etp,
            compiled=sample.compiled,
        )
        exchange = sample.cp_exchange
        return plain if exchange is None else dataclasses.replace(plain, cp_exchange=exchange)


def _problem(model: ModelSpec, precision: Precision, device: Device) -> PlanningProblem:
    """A problem on the device, with nominal rates where its own are unknown, and evenly busy experts."""
    if device.peak_flops(precision) is None or device.memory_bandwidth_bytes_per_s is None:
        device = dataclasses.replace(
            device,
            peak_fp32_flops=NOMINAL_FLOPS,
            peak_bf16_flops=NOMINAL_FLOPS,
            peak_fp16_flops=NOMINAL_FLOPS,
            memory_bandwidth_bytes_per_s=NOMINAL_BYTES_PER_S,
        )
    layout = LayerCase(
        kind=LayerKind.BLOCK, recompute=Recompute.NONE, tp=1, sequence_parallel=False, micro_batch=1, seq=1
    )
    problem = bench_plan(model, layout.degrees(), 1, precision).problem
    groups = tuple(dataclasses.replace(group, device=device) for group in problem.cluster.groups)
    cluster = dataclasses.replace(problem.cluster, groups=groups)
    return dataclasses.replace(problem, cluster=cluster, engine_settings=EngineSettings(balanced=True))


@dataclasses.dataclass(frozen=True)
class Held:
    """One sample as the others predict it: relative error of its times, and unrest (see above)."""

    case: LayerCase
    error: float
    unrest: float
    between: bool
    """Whether samples of its class have no more and no fewer tokens: else it only is extrapolated to."""


class HeldOut:
    """The samples of one layer class, each predicted from the others."""

    def __init__(self, prediction: LayerPrediction, samples: Sequence[LayerSample]) -> None:
        even = at_usual_speed(samples)
        cases = [prediction.case_of(sample) for sample in even]
        self.cases = cases
        self.held = [
            _held(prediction, cases, even, index) for index in range(len(even) if len(even) > 1 else 0)
        ]

    def uncertainty(self, case: LayerCase) -> float:
        """How far a prediction of the case may be off; `inf` from fewer than two samples."""
        if not self.held:
            return math.inf
        away = min(separation(case, known) for known in self.cases)
        weights = [1 / (1 + separation(case, held.case)) ** 2 for held in self.held]
        unrest = sum(w * held.unrest for w, held in zip(weights, self.held, strict=True)) + USUAL_UNREST
        return away * unrest / (sum(weights) + 1.0)


def _held(
    prediction: LayerPrediction, cases: Sequence[LayerCase], samples: Sequence[LayerSample], index: int
) -> Held:
    case, sample = cases[index], samples[index]
    others, beside = [*samples[:index], *samples[index + 1 :]], [*cases[:index], *cases[index + 1 :]]
    cost = prediction.cost(case, others)
    assert cost is not None, "all are of one class"
    ratios = (cost.forward_s / sample.forward_s, cost.backward_s / sample.backward_s)
    off = max(abs(math.log(ratio)) for ratio in ratios)
    noise = MEDIAN_ERROR * sample.spread / math.sqrt(sample.samples)
    away = min(separation(case, other) for other in beside)
    tokens = [other.micro_batch * other.seq for other in beside]
    own = case.micro_batch * case.seq
    return Held(
        case=case,
        error=statistics.fmean(abs(ratio - 1) for ratio in ratios),
        unrest=math.sqrt(max(off**2 - noise**2, 0.0)) / max(away, 1.0),
        between=min(tokens) <= own <= max(tokens),
    )


def separation(a: LayerCase, b: LayerCase) -> float:
    """Doublings of tokens, lengths and ranks between two cases of a class, each other difference as one."""
    forms = form_of(a, compiled=a.compiled), form_of(b, compiled=b.compiled)
    compiled, recompute, ranks, _ = distance(*forms)
    lengths, tokens = math.log2(a.seq / b.seq), math.log2(a.micro_batch * a.seq / b.micro_batch / b.seq)
    return float(compiled) + float(recompute) + ranks + abs(lengths) / 2 + abs(tokens)


def mean_error(held: Sequence[tuple[Held, float]]) -> float | None:
    """The mean error, by these weights, over samples that others lie around; None from fewer than LEAST."""
    counted = [(each.error, weight) for each, weight in held if each.between]
    if len(counted) < LEAST:
        return None
    return sum(error * weight for error, weight in counted) / sum(weight for _, weight in counted)


class LayerFamily:
    """Each layer class by sequence length, micro-batch, ways to shard and recompute; adaptive."""

    def __init__(
        self, model: ModelSpec, precision: Precision, device_type: str, device: Device, scope: Scope
    ) -> None:
        self.model, self.precision, self.device_type, self.scope = model, precision, device_type, scope
        self.prediction = LayerPrediction(model, precision, device)
        self._counts: dict[str, int] = {}
        for segment in model.segments:
            key = segment.block.shape_key
            self._counts[key] = self._counts.get(key, 0) + segment.count
        self._held: dict[tuple[LayerKind, str], tuple[int, HeldOut]] = {}

    @property
    def name(self) -> str:
        return f"layers of {self.model.name}" + (" in fp8" if self.precision is Precision.FP8 else "")

    def cases(self) -> Sequence[LayerCase]:
        scope = self.scope
        cases = layer_cases(
            self.model,
            scope.seqs,
            scope.widths,
            scope.micro_batches,
            scope.cps,
            scope.eps,
            scope.compiled,
        )
        return [case for case in cases if not self._not_executed(case)]

    def _not_executed(self, case: LayerCase) -> list[str]:
        """What of a case no kernel computes: products in fp8 of other than multiples, experts in it."""
        degrees = case.degrees()
        workload = Workload(seq=case.seq, batch=degrees.batch, precision=self.precision)
        return not_executed_workload(self.model, workload) + products_not_executed(
            self.model, workload, degrees
        )

    def together(self, case: LayerCase) -> Hashable:
        return case.compiled  # the compiler leaves its mark on a process

    def measure(self, cases: Sequence[LayerCase]) -> Iterator[Reading]:
        effort = self.scope.layer_effort
        messages = measure_layers(cases, self.model, self.precision, self.device_type, effort)
        return readings(LayerSample, messages)

    def seeds(self) -> Sequence[LayerCase]:
        return corners(self.cases())

    def uncertainty(self, case: LayerCase, samples: Sequence[Any]) -> float:
        """Of a pass through the model: a layer that takes little of it may be known less well."""
        known = self.prediction.key(case)
        doubt = self._held_out(case.kind, known, samples).uncertainty(case)
        return doubt if doubt == math.inf else doubt * self.weights(samples)[case.kind, known]

    def held_out_error(self, samples: Sequence[Any]) -> float | None:
        weights = self.weights(samples)
        return mean_error(
            [
                (held, weight)
                for each, weight in weights.items()
                for held in self._held_out(*each, samples).held
            ]
        )

    def weights(self, samples: Sequence[LayerSample]) -> dict[tuple[LayerKind, str], float]:
        """What the layers of each class take of a pass through the model, over those of the class that take
        most: their number times the median of seconds a token."""
        per_token: dict[tuple[LayerKind, str], list[float]] = {}
        for sample in samples:
            passes_s = sample.forward_s + sample.backward_s
            tokens = sample.micro_batch * sample.seq / sample.cp
            per_token.setdefault((sample.kind, sample.shape_key), []).append(passes_s / tokens)
        taken = {key: self._counts.get(key[1], 1) * statistics.median(s) for key, s in per_token.items()}
        return {key: seconds / max(taken.values()) for key, seconds in taken.items()}

    def _held_out(self, kind: LayerKind, key: str, samples: Sequence[LayerSample]) -> HeldOut:
        """The samples of a class; samples only ever come to those that were there."""
        own = [sample for sample in samples if (sample.kind, sample.shape_key) == (kind, key)]
        count, held = self._held.get((kind, key), (-1, None))
        if held is None or count != len(own):
            held = HeldOut(self.prediction, own)
            self._held[kind, key] = len(own), held
        return held

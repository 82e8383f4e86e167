"""The layers of a model, as a family of the profiler."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from planner.hardware.cluster import Device
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.profile.profile import LayerKind, LayerSample
from planner.strategy.engines.runtime_support import not_executed_workload, products_not_executed
from runtime.profiler.layer_grid import corners, layer_cases
from runtime.profiler.layer_prediction import HeldOut, LayerPrediction, mean_error
from runtime.profiler.measure_layers import LayerCase, measure_layers
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.scope import Scope


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

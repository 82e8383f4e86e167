"""The layers of a model, as a family of the profiler."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from planner.model import ModelSpec
from planner.profile import LayerSample
from planner.workload import Precision
from runtime.families import Reading, readings
from runtime.layer_grid import layer_cases
from runtime.measure_layers import LayerCase, measure_layers
from runtime.scope import Scope


@dataclass(frozen=True)
class LayerFamily:
    """Each layer class by sequence length, micro-batch, ways to shard and recompute."""

    model: ModelSpec
    precision: Precision
    device_type: str
    scope: Scope

    @property
    def name(self) -> str:
        return f"layers of {self.model.name}"

    def cases(self) -> Sequence[LayerCase]:
        scope = self.scope
        return layer_cases(
            self.model,
            scope.seqs,
            scope.widths,
            scope.micro_batches,
            scope.cps,
            scope.eps,
            scope.compiled,
        )

    def together(self, case: LayerCase) -> Hashable:
        return case.compiled  # the compiler leaves its mark on a process

    def measure(self, cases: Sequence[LayerCase]) -> Iterator[Reading]:
        effort = self.scope.layer_effort
        messages = measure_layers(cases, self.model, self.precision, self.device_type, effort)
        return readings(LayerSample, messages)

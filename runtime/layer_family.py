"""The layers of a model at one sequence length, as a family of the profiler."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from planner.model import ModelSpec
from planner.profile import LayerSample
from planner.workload import Precision
from runtime.families import Reading, readings
from runtime.measure_layers import LayerCase, layer_cases, measure_layers
from runtime.scope import Scope


@dataclass(frozen=True)
class LayerFamily:
    """Each layer class by micro-batch, shard width and recompute."""

    model: ModelSpec
    seq: int
    precision: Precision
    device_type: str
    scope: Scope

    @property
    def name(self) -> str:
        return f"layers of {self.model.name} at {self.seq} tokens"

    def cases(self) -> Sequence[LayerCase]:
        return layer_cases(self.model, self.seq, self.scope.widths, self.scope.micro_batches)

    def together(self, case: LayerCase) -> Hashable:
        return case.tp, case.sequence_parallel

    def measure(self, cases: Sequence[LayerCase]) -> Iterator[Reading]:
        effort = self.scope.layer_effort
        messages = measure_layers(cases, self.model, self.seq, self.precision, self.device_type, effort)
        return readings(LayerSample, messages)

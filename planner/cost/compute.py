"""Time and activation bytes of one layer on one device, from samples or from first principles.

Where the profile measured the very layer, width and micro-batch, that is the answer. Between and beyond
micro-batches it is interpolated on the line through the nearest two samples. For widths or sequence lengths
that were not measured, the analytic time is scaled by the ratio measured / analytic at as many tokens of the
nearest width, and of the sequence lengths to either side ("fitted"). Without samples the analytic time stands
alone ("datasheet").
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from planner.cost import constants
from planner.cost.activations import engine_bytes
from planner.cost.analytic import analytic_cost, core_s, device_rates
from planner.cost.context import with_context_buffers
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.memory_constants import memory_constants
from planner.cost.physics import Physics
from planner.cost.seconds import smaller
from planner.cost.wrapped import Units, units_of
from planner.kept import AttentionKernel
from planner.problem import PlanningProblem
from planner.profile import LayerSample, shape_key
from planner.strategy import Degrees, Recompute

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]

STRAIGHT = 0.25
ORIGINS = ("measured", "interpolated", "fitted", "datasheet")


class LayerModel:
    """Layer costs of one planning problem, remembered by shape.

    `classes` are the model's layer classes by key, `keys` the class of each layer.
    """

    def __init__(self, problem: PlanningProblem, physics: Physics) -> None:
        self.problem, self.physics = problem, physics
        self.samples = at_usual_speed(problem.profile.layers) if problem.profile else []
        self.rates = device_rates(problem, physics)
        self.memory = memory_constants(problem)
        model = problem.model
        self.classes, self.params_total = model.classes(), model.params_total
        self.attention = model.attention
        self.params_routed = model.params_routed
        self.stream_width = model.stream_width
        each = [(segment.block.shape_key, segment.count) for segment in model.segments]
        self.keys = tuple(key for key, count in each for _ in range(count))
        self._before = {key: [0, *accumulate(k == key for k in self.keys)] for key in self.classes}
        self._known: dict[LayerShape, LayerCost] = {}
        self._units: dict[tuple[int, int, int | None], Units] = {}

    def count(self, key: str, first: int, end: int) -> int:
        """Blocks of a class among the layers [first, end)."""
        return self._before[key][end] - self._before[key][first]

    def counts(self, key: str, firsts: Ints, ends: Ints) -> Ints:
        """The same of many ranges of layers at once."""
        import numpy as np

        before = np.asarray(self._before[key])
        counted: Ints = before[ends] - before[firsts]
        return counted

    def units(self, degrees: Degrees) -> Units:
        """What data parallelism wraps of the model."""
        key = degrees.tp, degrees.ep, degrees.etp
        if key not in self._units:
            self._units[key] = units_of(self.problem, self.classes, degrees)
        return self._units[key]

    def kernel(self, degrees: Degrees) -> AttentionKernel:
        """The attention kernel that runs: a fused softmax does not take every shape."""
        kernel = self.problem.stack.attention
        if kernel is not AttentionKernel.FUSED or self.attention is None:
            return kernel
        pairs = degrees.micro_batch * self.attention.heads // degrees.tp
        taken = (
            pairs % constants.FUSED_SOFTMAX_BATCHES == 0
            and self.problem.workload.seq <= constants.FUSED_SOFTMAX_KEYS
        )
        return kernel if taken else AttentionKernel.EAGER

    def cost(self, shape: LayerShape) -> LayerCost:
        """The cost of a layer of the problem's model."""
        if shape not in self._known:
            self._known[shape] = self._with_frozen(self._cost(shape), shape)
        return self._known[shape]

    def _with_frozen(self, cost: LayerCost, shape: LayerShape) -> LayerCost:
        """The cost with the times of adapters beside frozen weights, where the workload trains only those.

        Samples are of full training: they are scaled by what the analytic times say of the difference.
        """
        adapters, model = self.problem.workload.adapters, self.problem.model
        if adapters is None or self.rates is None:
            return cost
        frozen = analytic_cost(model, shape, self.rates, adapters)
        if not self.samples:
            return dataclasses.replace(cost, forward_s=frozen.forward_s, backward_s=frozen.backward_s)
        whole = analytic_cost(model, shape, self.rates)
        scaled = {
            name: getattr(cost, name) * getattr(frozen, name) / getattr(whole, name)
            for name in ("forward_s", "backward_s")
            if getattr(whole, name) > 0
        }
        return dataclasses.replace(cost, **scaled, origin="fitted")

    def lowest_spares_s(self, shape: LayerShape) -> float:
        """Seconds by which the first block's backward is shorter, nothing below it being trained."""
        adapters, model = self.problem.workload.adapters, self.problem.model
        if adapters is None or self.rates is None:
            return 0.0
        each = [analytic_cost(model, shape, self.rates, adapters, lowest=end) for end in (False, True)]
        return each[0].backward_s - each[1].backward_s

    def core_s(self, shape: LayerShape) -> tuple[float, float]:
        """Forward and backward between a block's projections; (0, 0) where the device's rates are unknown."""
        return core_s(self.problem.model, shape, self.rates) if self.rates else (0.0, 0.0)

    def deferrable_s(self, shape: LayerShape) -> float:
        """Seconds of a block's weight gradients that can wait for W: as its forward takes, at most half
        of its backward.

        Attention's part of the forward, which has no weights, is in it: a share that follows the sequence or
        the device's rates would let a pass take longer where its work or its time falls.
        """
        if self.problem.workload.adapters is not None:
            return 0.0
        cost = self.cost(shape)
        return smaller(cost.forward_s, cost.backward_s / 2)

    def _cost(self, shape: LayerShape) -> LayerCost:
        key = shape.block or shape_key(self.problem.model, shape.kind)
        like = [
            s
            for s in self.samples
            if s.kind is shape.kind and s.precision is shape.precision and s.shape_key == key
        ]
        if not like:
            analytic = analytic_cost(self.problem.model, shape, self.rates)
            analytic = with_context_buffers(analytic, self.problem.model, shape)
            return engine_bytes(analytic, self.problem.model, shape, self.problem.stack, self.memory)
        width = min(map(_width, like), key=lambda width: _distance(width, shape))
        near = sorted((s for s in like if _width(s) == width), key=lambda s: s.micro_batch)
        lengths = sorted({s.seq for s in near})
        if width == _width(shape) and shape.seq in lengths and not shape.spreads:
            return _along_micro_batches([s for s in near if s.seq == shape.seq], shape)
        carried = {
            seq: self._carried([s for s in near if s.seq == seq], shape)
            for seq in _around(lengths, shape.seq)
        }
        return _between_lengths(carried, shape.seq)

    def _carried(self, samples: list[LayerSample], shape: LayerShape) -> LayerCost:
        """What was measured at another width or sequence length, as much of it as of the analytic cost.

        Compared at as many tokens, so that sequences of nearly the measured length cost nearly the same.
        """
        like = dataclasses.replace(
            shape,
            tp=samples[0].tp,
            sequence_parallel=samples[0].sequence_parallel,
            recompute=samples[0].recompute,
            seq=samples[0].seq,
            micro_batch=shape.tokens / samples[0].seq,
            cp=1,
            ep=1,
            etp=None,
        )
        measured = _along_micro_batches(samples, like)
        analytic, reference = (analytic_cost(self.problem.model, s, self.rates) for s in (shape, like))
        analytic = with_context_buffers(analytic, self.problem.model, shape)
        return _scaled(analytic, measured, reference)


def at_usual_speed(samples: Sequence[LayerSample]) -> list[LayerSample]:
    """The samples as if the machine had kept its median speed, by the reference timed beside each."""
    references = [s.reference_s for s in samples if s.reference_s]
    if not references:
        return list(samples)
    usual_s = statistics.median(references)
    return [
        s
        if not s.reference_s
        else dataclasses.replace(
            s,
            forward_s=s.forward_s * usual_s / s.reference_s,
            backward_s=s.backward_s * usual_s / s.reference_s,
        )
        for s in samples
    ]


Width = tuple[Recompute, int, bool]
"""Recomputation, tensor-parallel ranks, sequence parallelism."""


def _width(of: LayerSample | LayerShape) -> Width:
    return of.recompute, of.tp, of.sequence_parallel


def _distance(width: Width, shape: LayerShape) -> tuple[bool, float, Width]:
    recompute, tp, sequence_parallel = width
    away = abs(math.log2(tp / shape.tp)) + (sequence_parallel != shape.sequence_parallel)
    return recompute is not shape.recompute, away, width


def _around(lengths: Sequence[int], seq: int) -> set[int]:
    """The nearest of some lengths to either side."""
    below, above = [n for n in lengths if n <= seq], [n for n in lengths if n >= seq]
    return {*below[-1:], *above[:1]}


_FIGURES = ("forward_s", "backward_s", "saved_bytes", "forward_transient_bytes", "backward_transient_bytes")


def _along_micro_batches(samples: list[LayerSample], shape: LayerShape) -> LayerCost:
    """Linear in the micro-batch between the two samples around it, or the two nearest outside.

    Three or more samples whose times lie on one line within STRAIGHT are noise around it: then the line
    is the answer for times, at measured micro-batches too.
    """
    cost = _between(samples, shape)
    lines = {name: _line(samples, name) for name in ("forward_s", "backward_s")}
    if any(line is None for line in lines.values()):
        return cost
    times = {name: line[0] + line[1] * shape.micro_batch for name, line in lines.items() if line}
    return dataclasses.replace(cost, forward_s=times["forward_s"], backward_s=times["backward_s"])


def _line(samples: list[LayerSample], name: str) -> tuple[float, float] | None:
    """Offset and slope of a figure over the micro-batch, by least squared relative error."""
    if len(samples) < 3:
        return None
    u = [1 / getattr(s, name) for s in samples]
    v = [s.micro_batch / getattr(s, name) for s in samples]
    uu, uv, vv = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    offset, slope = (sum(u) * vv - sum(v) * uv) / determinant, (sum(v) * uu - sum(u) * uv) / determinant
    worst = max(abs(offset * a + slope * b - 1) for a, b in zip(u, v, strict=True))
    smallest = offset + slope * min(s.micro_batch for s in samples)
    return (offset, slope) if worst <= STRAIGHT and slope > 0 and smallest > 0 else None


def _between(samples: list[LayerSample], shape: LayerShape) -> LayerCost:
    exact = [s for s in samples if s.micro_batch == shape.micro_batch]
    if exact:
        return LayerCost(**{name: getattr(exact[0], name) for name in _FIGURES}, origin="measured")
    if len(samples) == 1:
        factor = shape.micro_batch / samples[0].micro_batch
        figures = {name: getattr(samples[0], name) * factor for name in _FIGURES}
        return LayerCost(**figures, origin="interpolated")
    above = next((i for i, s in enumerate(samples) if s.micro_batch > shape.micro_batch), len(samples))
    high = min(max(above, 1), len(samples) - 1)
    a, b = samples[high - 1], samples[high]
    share = (shape.micro_batch - a.micro_batch) / (b.micro_batch - a.micro_batch)
    floor = shape.micro_batch / b.micro_batch * 0.5
    figures = {
        name: max(getattr(a, name) + share * (getattr(b, name) - getattr(a, name)), getattr(b, name) * floor)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="interpolated")


def _scaled(analytic: LayerCost, measured: LayerCost, reference: LayerCost) -> LayerCost:
    """The analytic figures times measured over reference; the measured where the reference is nothing."""
    figures = {
        name: getattr(measured, name) * getattr(analytic, name) / getattr(reference, name)
        if getattr(reference, name) > 0
        else getattr(measured, name)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="fitted")


def _between_lengths(costs: dict[int, LayerCost], seq: int) -> LayerCost:
    """The mean of what two sequence lengths tell, by the place of the logarithm between theirs."""
    first, last = min(costs), max(costs)
    if first == last:
        return costs[first]
    share = math.log(seq / first) / math.log(last / first)
    figures = {
        name: (1 - share) * getattr(costs[first], name) + share * getattr(costs[last], name)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="fitted")

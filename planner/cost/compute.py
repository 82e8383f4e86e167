"""Time and activation bytes of one layer on one device, from samples or from first principles.

Where the profile measured the very layer, width and micro-batch, that is the answer. Between and beyond
micro-batches it is interpolated on the line through the nearest two samples. For widths, sequence lengths
or shapes that were not measured, the analytic time is scaled by the ratio measured / analytic of the
nearest sample ("fitted"). Without samples the analytic time stands alone ("datasheet").
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from planner.codec import noun
from planner.cost import constants
from planner.errors import InputError, Problem
from planner.model import Block, ModelSpec
from planner.problem import PlanningProblem
from planner.profile import LayerKind, LayerSample, shape_key
from planner.strategy import Recompute
from planner.workload import Precision

STRAIGHT = 0.25
ORIGINS = ("measured", "interpolated", "fitted", "datasheet")


@noun
class LayerShape:
    """Which layer, on how many tokens, in how many shards."""

    kind: LayerKind
    tp: int
    sequence_parallel: bool
    micro_batch: int
    seq: int
    precision: Precision
    recompute: Recompute = Recompute.NONE

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq


@noun
class LayerCost:
    """Seconds and bytes of one layer for one micro-batch on one device, communication not included.

    `saved_bytes` stays from forward to backward and includes the layer's input, not its output.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    origin: str


class LayerModel:
    """Layer costs of one planning problem, remembered by shape."""

    def __init__(self, problem: PlanningProblem) -> None:
        self.problem = problem
        self.samples = at_usual_speed(problem.profile.layers) if problem.profile else []
        self.rates = device_rates(problem)
        self._known: dict[LayerShape, LayerCost] = {}

    def cost(self, shape: LayerShape) -> LayerCost:
        """The cost of a layer of the problem's model."""
        if shape not in self._known:
            self._known[shape] = self._cost(shape)
        return self._known[shape]

    def _cost(self, shape: LayerShape) -> LayerCost:
        key = shape_key(self.problem.model, shape.kind)
        like = [s for s in self.samples if s.kind is shape.kind and s.precision is shape.precision]
        same = [s for s in like if s.shape_key == key and _same_width(s, shape) and s.seq == shape.seq]
        if same:
            return _along_micro_batches(sorted(same, key=lambda s: s.micro_batch), shape)
        analytic = analytic_cost(self.problem.model, shape, self.rates)
        near = min((s for s in like if s.shape_key == key), key=lambda s: _distance(s, shape), default=None)
        if near is None:
            return analytic
        reference = analytic_cost(self.problem.model, _shape_of(near), self.rates)
        return _scaled(analytic, near, reference)


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


def _same_width(sample: LayerSample, shape: LayerShape) -> bool:
    return (sample.tp, sample.sequence_parallel, sample.recompute) == (
        shape.tp,
        shape.sequence_parallel,
        shape.recompute,
    )


def _shape_of(sample: LayerSample) -> LayerShape:
    return LayerShape(
        kind=sample.kind,
        tp=sample.tp,
        sequence_parallel=sample.sequence_parallel,
        micro_batch=sample.micro_batch,
        seq=sample.seq,
        precision=sample.precision,
        recompute=sample.recompute,
    )


def _distance(sample: LayerSample, shape: LayerShape) -> tuple[bool, float, float]:
    return (
        sample.recompute is not shape.recompute,
        abs(math.log2(sample.tp / shape.tp)) + (sample.sequence_parallel != shape.sequence_parallel),
        abs(math.log2(sample.micro_batch * sample.seq / shape.tokens)),
    )


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


def _scaled(analytic: LayerCost, sample: LayerSample, reference: LayerCost) -> LayerCost:
    figures = {
        name: getattr(analytic, name) * getattr(sample, name) / getattr(reference, name)
        if getattr(reference, name) > 0
        else getattr(analytic, name)
        for name in _FIGURES
    }
    return LayerCost(**figures, origin="fitted")


@noun
class DeviceRates:
    """What the analytic model needs of a device: product rate, bandwidth, host floor of a block."""

    flops: float
    memory_bytes_per_s: float
    host_block_s: float
    host_tp_s: float


def device_rates(problem: PlanningProblem) -> DeviceRates | None:
    """Rates of the cluster's device from the profile or the datasheet; None where neither knows them."""
    device = problem.cluster.groups[0].device
    peak = device.peak_flops(problem.workload.precision)
    flops = peak * constants.GEMM_EFFICIENCY if peak else None
    bandwidth = device.memory_bandwidth_bytes_per_s
    memory = bandwidth * constants.MEMORY_EFFICIENCY if bandwidth else None
    host, host_tp = constants.HOST_BLOCK_FORWARD_S, constants.HOST_TP_FORWARD_S
    if problem.profile:
        flops = problem.profile.constant("gemm_flops") or flops
        memory = problem.profile.constant("memory_bytes_per_s") or memory
        host = problem.profile.constant("host_block_forward_s") or host
        host_tp = problem.profile.constant("host_tp_forward_s") or host_tp
    if flops is None or memory is None:
        return None
    return DeviceRates(flops=flops, memory_bytes_per_s=memory, host_block_s=host, host_tp_s=host_tp)


def analytic_cost(model: ModelSpec, shape: LayerShape, rates: DeviceRates | None) -> LayerCost:
    """Products at their rate, element-wise work at memory bandwidth, not faster than the host launches."""
    if rates is None:
        raise InputError(
            Problem(
                where="--profile",
                fault=f"holds no sample for the {shape.kind} of {model.name}, and the device's peak is "
                "unknown.",
                fix=f"measure it: plan profile --model {model.name} --cluster local -o profile.json, "
                "then pass --profile profile.json",
            )
        )
    match shape.kind:
        case LayerKind.BLOCK:
            return _block_cost(model.segments[0].block, shape, rates)
        case LayerKind.HEAD:
            return _head_cost(model, shape, rates)
        case LayerKind.EMBEDDING:
            return _embedding_cost(model, shape, rates)


def _product_s(m: float, n: float, k: float, rates: DeviceRates) -> float:
    """Seconds of an (m, k) x (k, n) product: 2 m n k over the rate, small dimensions padded."""
    half = constants.GEMM_HALF_DIM
    return 2.0 * m * n * k * (1 + half / n) * (1 + half / k) / rates.flops


def _block_cost(block: Block, shape: LayerShape, rates: DeviceRates) -> LayerCost:
    tokens, tp, size = shape.tokens, shape.tp, shape.precision.compute_bytes
    query, kv, width = block.attention.query_width / tp, block.attention.kv_width / tp, block.mlp.width / tp
    hidden = block.hidden
    products_s = (
        _product_s(tokens, query + 2 * kv, hidden, rates)
        + _product_s(tokens, hidden, query, rates)
        + _product_s(tokens, block.mlp.up_projections * width, hidden, rates)
        + _product_s(tokens, hidden, width, rates)
    )
    attention_s = block.attention_flops_forward(tokens, shape.seq) / tp / (0.6 * rates.flops)
    stream = hidden / (tp if shape.sequence_parallel else 1)
    # Reads and writes of norms and residual additions, rotary or bias, activation and product.
    elementwise_bytes = size * tokens * (10 * stream + 4 * (query + kv) + 5 * width)
    elementwise_s = elementwise_bytes / rates.memory_bytes_per_s
    host_s = rates.host_block_s + (rates.host_tp_s if tp > 1 else 0.0)
    forward_s = max(products_s + attention_s + elementwise_s, host_s)
    backward_s = max(2 * products_s + 2.5 * attention_s + 2 * elementwise_s, 2 * host_s)
    again_s = {
        Recompute.NONE: 0.0,
        Recompute.SELECTIVE: max(elementwise_s, 0.5 * host_s),
        Recompute.FULL: forward_s,
    }
    saved = _block_saved_bytes(block, shape)
    working = size * tokens * (2 * stream + 3 * width)
    full_again = _block_saved_bytes(block, _without_recompute(shape))
    return LayerCost(
        forward_s=forward_s,
        backward_s=backward_s + again_s[shape.recompute],
        saved_bytes=saved,
        forward_transient_bytes=working if shape.recompute is Recompute.NONE else full_again,
        backward_transient_bytes=working + (full_again - saved),
        origin="datasheet",
    )


def _without_recompute(shape: LayerShape) -> LayerShape:
    return dataclasses.replace(shape, recompute=Recompute.NONE)


def _block_saved_bytes(block: Block, shape: LayerShape) -> float:
    """Bytes kept by a block between forward and backward.

    None: input and output of both norms on the residual stream (4 h), q, k, v and the attention's result
    (2 q + 2 kv), its log-sum-exp, and the MLP's gate, up, activation and product (4 f; 2 f ungated).
    Selective: input, matrix products and attention's results. Full: the input.
    """
    tokens, tp, size = shape.tokens, shape.tp, shape.precision.compute_bytes
    a, width = block.attention, block.mlp.width / tp
    stream = block.hidden / (tp if shape.sequence_parallel else 1)
    attention = (2 * a.query_width + 2 * a.kv_width) / tp
    statistics = 4.0 * tokens * (a.heads / tp + 2)
    match shape.recompute:
        case Recompute.FULL:
            return size * tokens * stream
        case Recompute.SELECTIVE:
            return size * tokens * (3 * stream + attention + block.mlp.up_projections * width) + statistics
        case Recompute.NONE:
            mlp = 2 * block.mlp.up_projections * width
            return size * tokens * (4 * stream + attention + mlp) + statistics


def _head_cost(model: ModelSpec, shape: LayerShape, rates: DeviceRates) -> LayerCost:
    """Final norm, projection, and cross-entropy in fp32 over the whole logits of this shard."""
    tokens, vocab, size = shape.tokens, model.vocab / shape.tp, shape.precision.compute_bytes
    product_s = _product_s(tokens, vocab, model.hidden, rates)
    logits_s = 4.0 * tokens * vocab * 4 / rates.memory_bytes_per_s
    stream = model.hidden / (shape.tp if shape.sequence_parallel else 1)
    logits_bytes = tokens * vocab * (4.0 + (size if size < 4 else 0))
    return LayerCost(
        forward_s=product_s + logits_s,
        backward_s=2 * product_s + logits_s,
        saved_bytes=size * tokens * 2 * stream + logits_bytes,
        forward_transient_bytes=4.0 * tokens * vocab,
        backward_transient_bytes=tokens * vocab * (4.0 + size),
        origin="datasheet",
    )


def _embedding_cost(model: ModelSpec, shape: LayerShape, rates: DeviceRates) -> LayerCost:
    """A gather, and in the backward pass a scatter into a gradient of the table's size."""
    moved = shape.precision.compute_bytes * shape.tokens * model.hidden
    table = 4.0 * model.vocab * model.hidden / shape.tp
    return LayerCost(
        forward_s=2 * moved / rates.memory_bytes_per_s,
        backward_s=(2 * moved + table) / rates.memory_bytes_per_s,
        saved_bytes=8.0 * shape.tokens,
        forward_transient_bytes=float(moved),
        backward_transient_bytes=0.0,
        origin="datasheet",
    )

"""Time and bytes of one layer on one device from first principles: products, bandwidth, host floor.

A layer's products run at a rate, its element-wise work at memory bandwidth, and neither faster than the
host launches kernels. Backward is twice the products (2.5 times attention, whose scores are recomputed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from planner.cost.compute import fixed
from planner.cost.compute.attention_core import attention_core_s
from planner.cost.compute.elementwise_time import between_products, widest_values
from planner.cost.compute.gemm import GemmModel
from planner.cost.compute.launches import launches
from planner.cost.compute.measured_operators import MeasuredRates, measured_rates
from planner.cost.compute.operator_time import BothWays, Pieces
from planner.cost.compute.products import cast_s, matrices_s, product_s, products_of
from planner.cost.compute.recompute_time import selected_s, spared_s
from planner.cost.compute.weight_gradients import Trained, beside_frozen, without_lowest
from planner.cost.constants import TimeConstants, fitted_to_runs
from planner.cost.layer import NOTHING, LayerCost, LayerShape, block_saved_bytes
from planner.foundation.arrays import larger
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.catalog import architecture_of
from planner.job.engine_settings import Engine, EngineSettings, Selective
from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Experts
from planner.model.spec import Block, Layer, ModelSpec
from planner.model.sublayer import Recompute
from planner.model.traced_layer import TracedLayer
from planner.model.workload import Adapters, Precision
from planner.profile.profile import LayerKind

T = TypeVar("T")


@frozen
class DeviceRates:
    """What the analytic model needs of a device: product rate, bandwidth, host floor of a block.

    `flops` is what large products reach, `unaligned_flops` batched ones that miss the matrix units.
    `by_shape` is the rate of products by their shape; None where a profile measured the rate of large ones.
    `precise` is that of products that stay in bf16 under fp8.
    `fused` says that products with one input are one product. `imbalance` is that of experts.
    `sampled` are times of operators from a profile's sweeps, `sampled_precise` those of what stays in bf16
    under fp8. `selective` is what selective recomputation runs again, `stops_early` as the stack does. `own`
    says that the runtime whose operators they are runs them; `serial` that the device is a CPU, which
    launches and computes by turns.
    """

    flops: float
    by_shape: GemmModel | None
    memory_bytes_per_s: float
    attention_flops: float
    unaligned_flops: float
    constants: TimeConstants
    precise: GemmModel | None = None
    compiled: bool = False
    compiled_experts: bool = False
    graphed: bool = False
    fused_experts: bool = False
    fused: bool = False
    fp8: bool = False
    imbalance: float = 1.0
    origin: str = "datasheet"
    sampled: MeasuredRates | None = None
    sampled_precise: MeasuredRates | None = None
    selective: Selective = Selective.ELEMENTWISE
    stops_early: bool = False
    own: bool = False
    serial: bool = False

    def compiles(self, block: Block) -> bool:
        """Whether a block is compiled."""
        return self.compiled and (self.compiled_experts or not isinstance(block.mlp, Experts))

    def pieces(self, shape: LayerShape) -> Pieces | None:
        """The parts of a layer by their operators; None where these were not sampled, or are another's."""
        if self.sampled is None or not self.own:
            return None
        return Pieces(shape, self.sampled, self.imbalance)


def device_rates(problem: PlanningProblem, constants: TimeConstants) -> DeviceRates | None:
    """Rates of the cluster's device from the profile or the datasheet; None where neither knows them."""
    device = problem.device
    peak = device.peak_flops(problem.workload.precision)
    flops = peak * fixed.GEMM_EFFICIENCY if peak else None
    bandwidth = device.memory_bandwidth_bytes_per_s
    memory = bandwidth * fixed.MEMORY_EFFICIENCY if bandwidth else None
    precision = problem.workload.precision
    sampled = measured_rates(problem.profile, precision)
    measured = problem.profile.constant("gemm_flops") if problem.profile else None
    measured = measured or (sampled.product_flops() if sampled else None)
    if problem.profile:
        flops = measured or flops
        memory = problem.profile.constant("memory_bytes_per_s") or memory
    if sampled:
        memory = sampled.memory_bytes_per_s() or memory
    if flops is None or memory is None:
        return None
    precise = Precision.BF16 if precision is Precision.FP8 else precision
    between = precision if problem.engine_settings.fp8_attention else precise
    whole = device.peak_flops(between) or peak
    own = problem.engine_settings.own and sampled is not None
    if measured or whole is None:
        whole = flops / fixed.GEMM_EFFICIENCY
    return DeviceRates(
        flops=flops,
        by_shape=None if measured else GemmModel(device, precision),
        precise=None if measured else GemmModel(device, precise),
        memory_bytes_per_s=memory,
        attention_flops=constants.attention_share
        * whole
        * _flash_carried(problem.engine_settings, device.name),
        unaligned_flops=min(flops, fixed.GEMM_EFFICIENCY * (device.peak_fp32_flops or peak or flops)),
        constants=constants,
        compiled=problem.engine_settings.compiled,
        compiled_experts=problem.engine_settings.compiles_experts,
        graphed=problem.engine_settings.graphed,
        fused_experts=problem.engine_settings.fused_experts,
        fused=problem.engine_settings.engine is Engine.MEGATRON,
        fp8=precision is Precision.FP8,
        imbalance=1.0 if problem.engine_settings.balanced else constants.expert_imbalance,
        origin="fitted"
        if own or fitted_to_runs(problem.profile, problem.engine_settings, device.name)
        else "datasheet",
        sampled=sampled,
        sampled_precise=measured_rates(problem.profile, precise),
        selective=problem.engine_settings.recomputes,
        stops_early=problem.engine_settings.stops_early,
        own=own,
        serial=own and device.name == "cpu",
    )


def _flash_carried(settings: EngineSettings, device: str) -> float:
    """What a flash kernel keeps of its share of the peak on devices newer than it was written for."""
    newer = architecture_of(device).startswith(fixed.AFTER_AMPERE)
    return fixed.AMPERE_FLASH_KEEPS if settings.ampere_flash and newer else 1.0


def analytic_cost(
    model: ModelSpec,
    shape: LayerShape,
    rates: DeviceRates | None,
    adapters: Adapters | None = None,
    *,
    lowest: bool = False,
    known: Known | None = None,
) -> LayerCost:
    """Products at their rate, element-wise work at memory bandwidth, not faster than the host launches.

    With `adapters`, all else is frozen; `lowest` is the first block, whose input needs no gradient then.
    `known` remembers what several shapes have in common, under the same rates.
    """
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
            remembered = {} if known is None or rates.sampled is not None else known
            return _layer_cost(_class_of(model, shape), shape, rates, adapters, lowest, remembered)
        case LayerKind.HEAD:
            return _head_cost(model, shape, rates, frozen=adapters is not None)
        case LayerKind.EMBEDDING:
            return _embedding_cost(model, shape, rates, frozen=adapters is not None)


def _class_of(model: ModelSpec, shape: LayerShape) -> Layer:
    """The layer that is asked for, as the ranks of tensor parallelism hold it together."""
    layer = model.classes()[shape.block] if shape.block else model.segments[0].block
    return layer.with_kv_copies(shape.tp) if isinstance(layer, Block) else layer


def core_s(model: ModelSpec, shape: LayerShape, rates: DeviceRates) -> tuple[float, float]:
    """Seconds between a block's projections, forward and backward: what a ring hides its hops behind."""
    block = _class_of(model, shape)
    return attention_core_s(block, shape, rates) if isinstance(block, Block) else (0.0, 0.0)


def _layer_cost(
    layer: Layer,
    shape: LayerShape,
    rates: DeviceRates,
    adapters: Adapters | None,
    lowest: bool,
    known: Known,
) -> LayerCost:
    if isinstance(layer, TracedLayer):
        return _traced_cost(layer, shape, rates)  # adapters are placed by a block's matrices alone
    alike = _remembered(known, _key(shape), lambda: _alike(layer, shape, rates))
    more = _trained(layer, shape, rates, adapters, lowest, alike.products_s)
    return _block_cost(layer, shape, rates, more, alike, known)


def _trained(
    block: Block,
    shape: LayerShape,
    rates: DeviceRates,
    adapters: Adapters | None,
    lowest: bool,
    forward_s: float,
) -> Trained:
    """What training adds: the gradients of all weights, or adapters beside frozen ones."""
    if adapters is None:
        return Trained(backward_products_s=_weight_gradients_s(block, shape, rates, forward_s))

    def thin_s(m: float, n: float, k: float) -> float:
        return product_s(m, n, k, rates, precise=True)

    def whole_s(m: float, n: float, k: float) -> float:
        return product_s(m, n, k, rates)

    thin = beside_frozen(block, shape, adapters, thin_s)
    return without_lowest(thin, block, shape, whole_s) if lowest else thin


def _weight_gradients_s(block: Block, shape: LayerShape, rates: DeviceRates, forward_s: float) -> float:
    """Seconds of the backward products beyond those of a forward pass: another one, unless measured."""
    pieces = rates.pieces(shape)
    return pieces.products(products_of(block, rates)).backward_s - forward_s if pieces else forward_s


class Alike(NamedTuple):
    """Figures of a block that neither recomputation nor sequence parallelism nor the exchange
    changes."""

    products_s: float
    attention_s: tuple[float, float]
    casts_s: tuple[float, float]
    host_s: float
    layer_s: float
    widest_values: float


Known = dict[tuple[object, ...], Any]
"""Figures of a model's blocks under one device's rates, by all that they depend on."""


def _remembered(known: Known, key: tuple[object, ...], figure: Callable[[], T]) -> T:
    if key not in known:
        known[key] = figure()
    return cast(T, known[key])


def _key(shape: LayerShape) -> tuple[object, ...]:
    """What those of a block of one model depend on; ranks of tensor parallelism hold it together."""
    return (
        (shape.block, shape.tokens, shape.seq, shape.tp, shape.ep, shape.etp),
        (shape.precision, shape.kernel, shape.rotary),
    )


def _alike(block: Block, shape: LayerShape, rates: DeviceRates) -> Alike:
    layer_s = rates.constants.layer_s * launches(block, shape)
    if isinstance(block.mlp, Experts) and rates.pieces(shape) is None:
        own_s = rates.constants.expert_s * block.mlp.count / shape.ep
        layer_s += own_s * (rates.constants.graphed_share if rates.graphed else 1.0)
    return Alike(
        products_s=matrices_s(block, shape, rates),
        attention_s=attention_core_s(block, shape, rates),
        casts_s=cast_s(block, shape, rates),
        host_s=_host_s(block, shape, rates),
        layer_s=layer_s,
        widest_values=widest_values(block, shape),
    )


def _block_cost(
    block: Block, shape: LayerShape, rates: DeviceRates, more: Trained, alike: Alike, known: Known
) -> LayerCost:
    tokens, tp, size = shape.tokens, shape.tp, shape.precision.compute_bytes
    products_s, host_s, layer_s = alike.products_s, alike.host_s, alike.layer_s
    attention_s, attention_backward_s = alike.attention_s
    stream = block.hidden / (tp if shape.sequence_parallel else 1)
    key = (*_key(shape), stream)
    between = _remembered(known, key, lambda: between_products(block, shape, stream, rates))
    beside_s = size * tokens * rates.constants.elementwise_scale / rates.memory_bytes_per_s
    casts_s, casts_backward_s = alike.casts_s
    if rates.compiles(block):
        between = between.times(rates.constants.compiled_elementwise_share)
        beside_s *= rates.constants.compiled_elementwise_share
    again_host_s = fixed.RECOMPUTE_HOST * host_s
    beside_forward_s = casts_s + more.forward_products_s + more.forward_values * beside_s
    beside_backward_s = casts_backward_s + more.backward_values * beside_s
    busy_s = layer_s + products_s + attention_s + between.forward_s + beside_forward_s
    forward_s = _launched_s(busy_s, host_s * (1 + more.forward_launches), rates)
    turned_s = products_s + more.backward_products_s + attention_backward_s
    busy_backward_s = 2 * layer_s + rates.constants.backward_scale * turned_s
    busy_backward_s += between.backward_s + beside_backward_s
    backward_s = _launched_s(busy_backward_s, host_s * (2 + more.backward_launches), rates)
    again_busy_s, again_s = 0.0, 0.0
    if shape.recompute is Recompute.FULL:
        again_busy_s = busy_s - spared_s(block, shape, rates)
        again_s = _launched_s(again_busy_s, again_host_s, rates)
    elif shape.recompute is Recompute.SELECTIVE:
        again_busy_s, whole = selected_s(block, shape, stream, rates, between.forward_s, attention_s)
        again_s = larger(again_busy_s, again_host_s if whole else 0.5 * host_s)
    idle = not rates.serial  # where host and device are one, neither waits
    working = size * tokens * (2 * stream + alike.widest_values / tp)
    full_again = saved = block_saved_bytes(block, shape, Recompute.NONE)
    if shape.recompute is not Recompute.NONE:
        saved = block_saved_bytes(block, shape, shape.recompute)
    return LayerCost(
        forward_s=forward_s,
        backward_s=backward_s + again_s,
        saved_bytes=saved,
        forward_transient_bytes=working if shape.recompute is Recompute.NONE else full_again,
        backward_transient_bytes=working + (full_again - saved),
        origin=rates.origin,
        forward_idle_s=idle * (forward_s - busy_s),
        backward_idle_s=idle * (backward_s - busy_backward_s + again_s - again_busy_s),
    )


def _launched_s(busy_s: float, host_s: float, rates: DeviceRates) -> float:
    """Seconds of a pass whose device is busy so long, and its host: by turns where they are one."""
    return busy_s + host_s if rates.serial else larger(busy_s, host_s)


def _host_s(block: Block, shape: LayerShape, rates: DeviceRates) -> float:
    """Least seconds in which the host launches a block's forward, by the operators that it has."""
    constants = rates.constants
    # Times of operators on a CPU have their launches in them.
    eager_s = 0.0 if rates.serial else constants.host_block_forward_s * launches(block, shape)
    if shape.tp > 1:
        modules = len(block.matrices()) + block.norms
        eager_s += constants.host_tp_forward_s * modules / fixed.SHARDED_MODULES
    if rates.graphed:
        return eager_s * constants.graphed_share
    return eager_s * (constants.compiled_host_share if rates.compiles(block) else 1.0)


def _traced_cost(layer: TracedLayer, shape: LayerShape, rates: DeviceRates) -> LayerCost:
    """Products at their rate and the rest at memory bandwidth, for `micro_batch` samples.

    What selective recomputation would keep is not traced: it is costed like none.
    """
    samples, size = shape.tokens / layer.tokens, shape.precision.compute_bytes
    products_s = sum(
        product.count * product_s(samples * product.m, product.n, product.k, rates)
        for product in layer.products
    )
    products_s += samples * layer.core_flops / rates.attention_flops
    moved_s = samples * size * layer.moved_values / rates.memory_bytes_per_s
    host_s = rates.constants.host_block_forward_s * layer.operators / fixed.BLOCK_LAUNCHES
    forward_s = larger(products_s + moved_s, host_s)
    whole = samples * size * layer.saved_values
    full = shape.recompute is Recompute.FULL
    saved = samples * size * layer.input_values if full else whole
    return LayerCost(
        forward_s=forward_s,
        backward_s=larger(2 * (products_s + moved_s), 2 * host_s) + (forward_s if full else 0.0),
        saved_bytes=saved,
        forward_transient_bytes=samples * size * layer.message_values + (whole if full else 0.0),
        backward_transient_bytes=samples * size * layer.message_values + whole - saved,
        origin=rates.origin,
    )


def _head_cost(model: ModelSpec, shape: LayerShape, rates: DeviceRates, *, frozen: bool) -> LayerCost:
    """Final norm, projection, and cross-entropy in fp32 over the whole logits of this shard."""
    if model.vocab == 0:
        return NOTHING
    tokens, vocab, size = shape.tokens, model.vocab_shard(shape.tp), shape.precision.compute_bytes
    measured = None if frozen else _measured_head(model, shape, rates)
    projection_s = product_s(tokens, vocab, model.token_width, rates, precise=True)
    logits_s = rates.constants.head_scale * 4.0 * tokens * vocab * 4 / rates.memory_bytes_per_s
    stream = model.hidden / (shape.tp if shape.sequence_parallel else 1)
    logits_bytes = tokens * vocab * (4.0 + (size if size < 4 else 0))
    turned_s = (1 if frozen else 2) * projection_s + logits_s
    slower = rates.constants.unaligned_head_scale if vocab % fixed.ALIGNED_VALUES else 1.0
    return LayerCost(
        forward_s=measured.forward_s if measured else slower * (projection_s + logits_s),
        backward_s=measured.backward_s if measured else slower * turned_s,
        saved_bytes=size * tokens * 2 * stream + logits_bytes,
        forward_transient_bytes=4.0 * tokens * vocab,
        backward_transient_bytes=tokens * vocab * (4.0 + size),
        origin=rates.origin,
    )


def _measured_head(model: ModelSpec, shape: LayerShape, rates: DeviceRates) -> BothWays | None:
    """The head by its operators."""
    pieces = rates.pieces(shape)
    if pieces is None:
        return None
    return pieces.head(model.vocab_shard(shape.tp), model.token_width, model.norm, model.hidden)


def _embedding_cost(model: ModelSpec, shape: LayerShape, rates: DeviceRates, *, frozen: bool) -> LayerCost:
    """A gather, and in the backward pass a scatter into a gradient of the table's size."""
    if model.vocab == 0:
        return NOTHING
    moved = shape.precision.compute_bytes * shape.tokens * model.hidden
    table = 4.0 * model.vocab_shard(shape.tp) * model.hidden
    pieces = rates.pieces(shape)
    measured = pieces.embedding(model.vocab_shard(shape.tp), model.token_width) if pieces else None
    spread_s = measured.backward_s if measured else (2 * moved + table) / rates.memory_bytes_per_s
    return LayerCost(
        forward_s=measured.forward_s if measured else 2 * moved / rates.memory_bytes_per_s,
        backward_s=0.0 if frozen else spread_s,
        saved_bytes=8.0 * shape.tokens,
        forward_transient_bytes=float(moved),
        backward_transient_bytes=0.0,
        origin=rates.origin,
    )

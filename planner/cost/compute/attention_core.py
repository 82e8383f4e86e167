"""Seconds of what lies between attention's projections, or within a recurrent mixer, by the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.cost.compute import fixed
from planner.cost.layer import LayerShape
from planner.model.attention import Attention, LatentAttention
from planner.model.spec import Block
from planner.model.sublayer import AttentionKernel

if TYPE_CHECKING:
    from planner.cost.compute.analytic import DeviceRates


def attention_core_s(block: Block, shape: LayerShape, rates: DeviceRates) -> tuple[float, float]:
    """Seconds between the projections, forward and backward.

    A flash kernel skips what is masked, in blocks of FLASH_BLOCK keys, and computes scores again going back:
    2.5 times. So does a recurrent mixer's scan, at a rate of its own. The others compute the whole square as
    batched products, twice going back, and read and write every probability.
    """
    pieces = rates.pieces(shape)
    measured = pieces.attention(block) if pieces else None
    if measured is not None:
        return measured.forward_s, measured.backward_s
    flops = block.attention_flops_forward(shape.tokens, shape.seq) / shape.tp
    attentions = [mixer for mixer in block.mixers if isinstance(mixer, (Attention, LatentAttention))]
    if not attentions:
        slower = rates.constants.attention_share / rates.constants.scan_share
        return flops / rates.attention_flops * slower, 2.5 * flops / rates.attention_flops * slower
    if shape.kernel is AttentionKernel.FLASH:
        half = fixed.FLASH_BLOCK / 2  # of the block on the diagonal is masked, and computed all the same
        masked = sum(m.core_flops(shape.seq) * half / m.span.mean_keys(shape.seq) for m in attentions)
        forward_s = (flops + masked * shape.tokens / shape.tp) / rates.attention_flops
        return forward_s, 2.5 * forward_s
    pairs = shape.seq * shape.tokens / shape.tp / rates.constants.gemm_scale
    products_s = pairs * sum(
        mixer.core_flops(shape.seq) / mixer.span.mean_keys(shape.seq) / _core_flops_per_s(mixer, shape, rates)
        for mixer in attentions
    )
    heads = sum(mixer.heads for mixer in attentions) / shape.tp
    pass_s = shape.precision.compute_bytes * heads * shape.seq * shape.tokens / rates.memory_bytes_per_s
    passes_s = rates.constants.probability_passes * pass_s
    if shape.kernel is AttentionKernel.EAGER:
        passes_s *= fixed.EAGER_PASSES
    return products_s + passes_s, 2 * (products_s + passes_s)


def _core_flops_per_s(mixer: Attention | LatentAttention, shape: LayerShape, rates: DeviceRates) -> float:
    """The rate of attention's batched products: heads whose rows are no multiple of 16 bytes miss the matrix
    units. GPTs of BLOOM's team with 150 or 108 values a head took 1.3 times as long as with 144 or 216."""
    width = mixer.head_dim if isinstance(mixer, Attention) else mixer.value_dim
    aligned = width * shape.precision.compute_bytes % fixed.ALIGNED_BYTES == 0
    return rates.flops if aligned else rates.unaligned_flops

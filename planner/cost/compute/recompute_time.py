"""Seconds of what selective recomputation runs again going back: each engine's own kind
(planner.job.engine_settings)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.cost.compute.elementwise_time import between_products
from planner.cost.compute.products import cast_s, matrices_s, product_s
from planner.cost.layer import LayerShape
from planner.foundation.frozen import replaced
from planner.job.engine_settings import Selective
from planner.model.attention import Attention
from planner.model.feed_forward import Mlp
from planner.model.spec import Block
from planner.model.sublayer import WeightMatrix
from planner.model.workload import Precision

if TYPE_CHECKING:
    from planner.cost.compute.analytic import DeviceRates


def selected_s(
    block: Block, shape: LayerShape, stream: float, rates: DeviceRates, between_s: float, core_s: float
) -> tuple[float, bool]:
    """Seconds on the device, and whether the host goes through the whole block again.

    `between_s` are those of the element-wise work, `core_s` of what lies between attention's projections.
    """
    match rates.selective:
        case Selective.ATTENTION:
            return core_s, False
        case Selective.MLP if block.mlp is not None:
            return _mlp_s(block, shape, stream, rates), False
        case Selective.EVERY_SECOND if keeps_every_second(block):
            return between_s + _not_kept_s(block, shape, rates), True
    return between_s, False


def _mlp_s(block: Block, shape: LayerShape, stream: float, rates: DeviceRates) -> float:
    """The MLP with its norm, without its last product where recomputation stops when all is there again."""
    alone = replaced(block, mixer=None, cross=None, norms=1)
    share = rates.constants.compiled_elementwise_share if rates.compiles(block) else 1.0
    beside_s = share * between_products(alone, shape, stream, rates).forward_s
    again_s = matrices_s(alone, shape, rates) + cast_s(alone, shape, rates)[0] + beside_s
    return again_s - spared_s(block, shape, rates)


def spared_s(block: Block, shape: LayerShape, rates: DeviceRates) -> float:
    """Seconds of an MLP's last product, which nothing going back needs but a norm of its result: it does not
    run again where recomputation stops when all is there."""
    if not (rates.stops_early and isinstance(block.mlp, Mlp)) or block.norms > block.sublayers:
        return 0.0
    last, pieces = block.matrices()[-1], rates.pieces(shape)
    return pieces.products((last,)).forward_s if pieces else _product_s(last, shape, rates)


def keeps_every_second(block: Block) -> bool:
    """Whether a block is of attention and one MLP, whose products torchtitan counts."""
    return isinstance(block.mlp, Mlp) and all(isinstance(mixer, Attention) for mixer in block.mixers)


def _not_kept_s(block: Block, shape: LayerShape, rates: DeviceRates) -> float:
    """Products that run again: the second, fourth and so on; in fp8 all but the last, with their casts.

    Products in fp8 are not among the operators whose results are kept (torchtitan's _save_list has mm, and
    the maxima that scales are made of), and nothing going back needs the last one's.
    """
    products, casts_s = block.matrices()[1::2], 0.0
    if shape.precision is Precision.FP8:
        products, casts_s = block.matrices()[:-1], cast_s(block, shape, rates)[0]
    return casts_s + sum(_product_s(matrix, shape, rates) for matrix in products)


def _product_s(matrix: WeightMatrix, shape: LayerShape, rates: DeviceRates) -> float:
    inputs, outputs = matrix.shard(shape.tp)
    return product_s(shape.tokens, outputs, inputs, rates)

"""What one traced operator costs: its matrix products, the FLOPs of fused attention, the bytes it moves.

FLOPs are those of torch.utils.flop_counter, whose registry has a formula an operator. Causal attention
counts the keys that a query meets, half of them, as everywhere in the planner.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter

from planner.foundation.errors import InputError, Problem
from planner.model.traced_layer import MatrixProduct

aten = torch.ops.aten


class Work(NamedTuple):
    """Matrix products that a device runs as such, and other FLOPs."""

    products: tuple[MatrixProduct, ...]
    core_flops: float


NO_WORK = Work((), 0.0)

CONVOLUTIONS = (
    aten.convolution,
    aten._convolution,
    aten.cudnn_convolution,
    aten._slow_conv2d_forward,
    aten.convolution_overrideable,
)

TORCH_NAMESPACES = ("aten", "prims", "prim")
"""Operators of these without a formula only move bytes; of others nothing is known."""

CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
"""Fused attention on a CPU, which torch's registry has no formula for."""


def work_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work:
    """Products and other FLOPs of an operator call; nothing for operators that only move bytes."""
    packet = func.overloadpacket
    if packet in (aten.mm, aten.addmm):
        a, b = args[-2:]
        return _products(a.shape[0], b.shape[1], a.shape[1])
    if packet in (aten.bmm, aten.baddbmm):
        a, b = args[-2:]
        return _products(a.shape[1], b.shape[2], a.shape[2], a.shape[0])
    if packet == aten._grouped_mm:
        return _grouped(args[0], args[1], out)
    if packet in CONVOLUTIONS:
        return _convolution(packet, args, kwargs, out)
    if packet == CPU_ATTENTION:
        return Work((), _attention_flops(*args[:3]) * _share_met(func, args, kwargs))
    formula = flop_counter.flop_registry.get(packet)
    if formula is None:
        if func.namespace not in TORCH_NAMESPACES:
            raise _unknown(packet)
        return NO_WORK
    return Work((), float(formula(*args, **kwargs, out_val=out)) * _share_met(func, args, kwargs))


def _unknown(packet: Any) -> InputError:
    return InputError(
        Problem(
            where=str(packet),
            fault="is no operator of torch's own, and no formula says how many FLOPs it takes.",
            fix="register one before tracing: torch.utils.flop_counter.register_flop_formula",
        )
    )


def _attention_flops(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Scores and values with every key: 2 (d_qk + d_v) a query, key and head."""
    return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _products(m: int, n: int, k: int, count: int = 1) -> Work:
    return Work((MatrixProduct(m=float(m), n=float(n), k=float(k), count=count),), 0.0)


def _grouped(a: Tensor, b: Tensor, out: Tensor) -> Work:
    """Products of groups, of which one dimension is shared out by offsets: evenly, as none are known."""
    groups = max(t.shape[0] for t in (a, b, out) if t.dim() == 3)
    m, n, k = float(a.shape[-2]), float(b.shape[-1]), float(a.shape[-1])
    match a.dim(), b.dim():
        case 2, 3:
            m /= groups
        case 3, 2:
            n /= groups
        case 2, 2:
            k /= groups
    return Work((MatrixProduct(m=m, n=n, k=k, count=groups),), 0.0)


def of_a_sample(product: MatrixProduct, batch: int, *, weights: bool) -> MatrixProduct:
    """A product of a batch for one sample: fewer rows where the other side is weights, else fewer products.

    Its FLOPs are those of the batch, divided.
    """
    if not weights and product.count % batch == 0:
        return dataclasses.replace(product, count=product.count // batch)
    return dataclasses.replace(product, m=product.m / batch)


def _convolution(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work:
    """A convolution as a product: places x outputs of a group x inputs of a group by kernel.

    A depthwise one is no product of matrices: it is bound by memory, and its FLOPs are counted apart.
    """
    formula = flop_counter.flop_registry.get(packet, flop_counter.flop_registry[aten.convolution])
    flops = float(formula(*args, **kwargs, out_val=out))
    x, weight = args[0], args[1]
    transposed = bool(args[6]) if len(args) > 6 else False
    groups = int(args[8]) if len(args) > 8 else 1
    if groups > 1 and groups == x.shape[1]:
        return Work((), flops)
    places = (x if transposed else out).numel() / (x if transposed else out).shape[1]
    n, k = weight.shape[0] / groups, math.prod(weight.shape[1:])
    if transposed:  # [inputs, outputs of a group, kernel]: the roles are exchanged
        n, k = math.prod(weight.shape[1:]), weight.shape[0] / groups
    product = MatrixProduct(m=places, n=float(n), k=float(k), count=groups)
    return Work((product,), 0.0) if math.isclose(product.flops, flops, rel_tol=0.01) else Work((), flops)


def _share_met(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The share of keys that queries meet: 1, or with a causal mask the mean (keys + 1) / 2 of them."""
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return 1.0
    place = names.index("is_causal")
    causal = args[place] if place < len(args) else kwargs.get("is_causal", False)
    queries, keys = args[0].shape[-2], args[1].shape[-2]
    if not causal or keys == 1:
        return 1.0
    # Row q of a causal mask that starts at the first key meets min(q, keys) keys.
    met = sum(min(row, keys) for row in range(1, queries + 1))
    return float(met / queries / keys)


def values_of(tensor: Tensor, compute: torch.dtype) -> float:
    """Size of a tensor in values of the compute precision; of integers and flags, their bytes by two."""
    return in_values(tensor.numel() * tensor.element_size(), tensor.dtype, compute)


def in_values(size_bytes: int, dtype: torch.dtype, compute: torch.dtype) -> float:
    """Bytes of a dtype as values of the compute precision.

    A workload's 16-bit precision shrinks float values; indices and masks keep their bytes, so they are
    counted as 16-bit values.
    """
    floating = dtype.is_floating_point or dtype.is_complex
    return size_bytes / (compute.itemsize if floating else 2)

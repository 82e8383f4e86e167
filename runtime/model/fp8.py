"""Products of a block's projections in fp8: their operands are scaled and cast on the way in.

For y = x W^T, with q(t) = cast(t s) and s = max / amax(t), a scale for a whole tensor (Micikevicius et al.,
"FP8 formats for deep learning", arXiv 2209.05433; the tensorwise dynamic recipe of Transformer Engine and
torchao):

    y  = q4(x) q4(W)^T / (s_x s_W)          q4: e4m3, up to 448, 3 bits of mantissa
    dx = q5(dy) q4(W) / (s_dy s_W)          q5: e5m2, up to 57,344, 2 bits, for the wider range of gradients
    dW = q5(dy)^T q4(x) / (s_dy s_x)

Everything else, and what is kept between the passes, is in bf16; products accumulate in fp32. Attention's own
products, embedding, head and experts stay in bf16. On tensor-parallel ranks each shard has its own scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from planner.foundation.errors import InputError, Problem
from planner.model.workload import Precision
from runtime.model.held_weights import split_dim
from runtime.model.transformer import Block

MULTIPLE = 16
"""Both dimensions of an operand must be multiples of it, but the first of the left one (cuBLASLt)."""
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
LEAST_CAPABILITY = (8, 9)
"""NVIDIA's Ada and Hopper multiply fp8; earlier devices do not."""


def apply_fp8(part: nn.Module, precision: Precision) -> None:
    """Has the projections of a block multiply in fp8. The block is split over tensor-parallel ranks."""
    if precision is not Precision.FP8 or not isinstance(part, Block):
        return
    for module in (*part.attention.children(), *part.mlp.children()):
        if isinstance(module, nn.Linear):
            module.__class__ = Fp8Linear


class Fp8Linear(nn.Linear):
    """A projection whose three products are in fp8."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if not isinstance(x, DTensor):
            return _with_bias(scaled_product(x, weight), self.bias)
        assert isinstance(weight, DTensor)
        split = split_dim(weight.placements[0])
        # Where a rank has some outputs, its gradient of the inputs is a part of a sum.
        local = x.to_local(grad_placements=[Partial()] if split == 0 else None)
        result = {0: Shard(x.dim() - 1), 1: Partial(), None: Replicate()}[split]
        y = scaled_product(local, weight.to_local())
        return _with_bias(DTensor.from_local(y, x.device_mesh, [result], run_check=False), self.bias)


def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x [..., in] and W [out, in], in the precision of x."""
    y: Tensor = _ScaledProduct.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _ScaledProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(*cast(x, FORWARD), *cast(weight, FORWARD), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy, scale = cast(grads[0], BACKWARD)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy, scale, *_transposed(*cast(weight, FORWARD)), x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _multiply(*_transposed(dy, scale), *_transposed(*cast(x, FORWARD)), x.dtype)
        return dx, dw


def cast(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor in fp8, and what its values must be multiplied by to be the tensor's again, in fp32."""
    largest = torch.finfo(dtype).max
    scale = (tensor.detach().abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


def _transposed(tensor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.t().contiguous(), scale


def _multiply(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T for row-major operands [m, k] and [n, k], which is how the tensor cores want them."""
    product: Tensor = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
    return product


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def check_fp8(device: torch.device) -> None:
    """Raises InputError where this device cannot multiply fp8."""
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found >= LEAST_CAPABILITY:
            return
        name = torch.cuda.get_device_name(device)
        fault = f"is fp8, and {name} has compute capability {found[0]}.{found[1]}."
    else:
        operand = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(FORWARD)
        one = torch.ones((), device=device)
        try:
            _multiply(operand, one, operand, one, torch.bfloat16)
            return
        except RuntimeError as error:  # a build or device without these products says so only when asked
            fault = f"is fp8, and this device does not multiply it ({str(error).splitlines()[0]})."
    raise InputError(
        Problem(
            where="workload.precision",
            fault=fault,
            legal="bf16, fp16, fp32; fp8 from compute capability 8.9 on",
            fix="solve again with --precision bf16",
        )
    )

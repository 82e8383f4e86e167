"""What an accelerator's fused kernels keep and allocate, for tensors of shapes alone on a CPU.

A CPU build of torch has other kernels: its RMSNorm is written in tensor operations, which keep the input in
fp32, and its attention repeats keys and values for the heads that share them. Inside `accelerator_kernels`
the two allocate what CUDA's do: results, fp32 sums for the backward pass, and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def accelerator_kernels() -> Iterator[None]:
    """Inside, torch's functions are an accelerator's in what they allocate. Results have no values."""
    norm, attention = functional.rms_norm, functional.scaled_dot_product_attention

    def fused_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        if attn_mask is not None or query.dtype not in (torch.bfloat16, torch.float16):
            return attention(query, key, value, attn_mask, *rest, **more)
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        found: Tensor = flash(query, key, value, 0.0, more.get("is_causal", False), scale=more.get("scale"))[
            0
        ]
        return found

    functional.rms_norm = _fused_norm
    functional.scaled_dot_product_attention = fused_attention
    try:
        yield
    finally:
        functional.rms_norm, functional.scaled_dot_product_attention = norm, attention


def _fused_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    out: Tensor = _FusedNorm.apply(input, weight)  # type: ignore[no-untyped-call]
    return out


class _FusedNorm(torch.autograd.Function):
    """Keeps its input, its weight and one fp32 number for each row (torch.ops.aten._fused_rms_norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)

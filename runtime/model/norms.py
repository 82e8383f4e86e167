"""Norms of a block and of queries and keys. Shapes: B micro-batch, S sequence, W the normed width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.model.spec import Norm


class UnitOffsetRMSNorm(nn.RMSNorm):
    """Root-mean-square norm times 1 + weight, in fp32 (Gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps
        ).type_as(x)


class UnitOffsetLayerNorm(nn.LayerNorm):
    """Layer norm times 1 + weight (Nemotron, arXiv 2402.16819)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class WidthNorm(nn.Module):
    """Root-mean-square norm over the width of all heads, x / sqrt(mean(x^2) + eps) * weight.

    Written out, so that it stays exact where the width is a DTensor that tensor parallelism shards.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_bsw: Tensor) -> Tensor:
        x = x_bsw.float()
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x_bsw) * self.weight


def make_norm(kind: Norm, width: int, eps: float, *, unit_offset: bool = False) -> nn.Module:
    """The norm of a block or of the head."""
    match kind:
        case Norm.RMSNORM:
            return UnitOffsetRMSNorm(width, eps=eps) if unit_offset else nn.RMSNorm(width, eps=eps)
        case Norm.LAYERNORM:
            return UnitOffsetLayerNorm(width, eps=eps) if unit_offset else nn.LayerNorm(width, eps=eps)
        case Norm.LAYERNORM_WITHOUT_BIAS:
            return nn.LayerNorm(width, eps=eps, bias=False)
        case Norm.LAYERNORM_WITHOUT_PARAMETERS:
            return nn.LayerNorm(width, eps=eps, elementwise_affine=False)

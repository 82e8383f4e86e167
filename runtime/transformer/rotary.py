"""Rotary position embedding. Shapes: B micro-batch, S sequence, N heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position tables cos and sin [S, D/2] in fp32 (Su et al. 2021, arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, seq: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self.seq, self.head_dim, self.theta = seq, head_dim, theta
        self.register_buffer("cos", torch.empty(seq, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(seq, head_dim // 2), persistent=False)

    def fill(self) -> None:
        """Writes the tables: angle[s, i] = s * theta^(-2i/D)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.outer(torch.arange(self.seq, dtype=torch.float64), self.theta**-exponents)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def hold(self, positions: Tensor) -> None:
        """Keeps the rows of these positions alone, in their order."""
        self.cos, self.sin = (table[positions.to(table.device)] for table in (self.cos, self.sin))


def rotate(x_bsnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with each pair (i, i + D/2) of a head turned by its position's angle; fp32 inside."""
    seq = x_bsnd.shape[1]
    c, s = cos[:seq, None, :], sin[:seq, None, :]
    low, high = x_bsnd.float().chunk(2, dim=-1)
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1).type_as(x_bsnd)

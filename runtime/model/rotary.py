"""Rotary position embedding. Shapes: B micro-batch, S sequence, N heads, D head_dim, R <= D turned dims."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from planner.model.arithmetic import RopeKind, RopeScaling


class Rotary(nn.Module):
    """Rotary position tables cos and sin [S, R/2] in fp32 (Su et al. 2021, arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, seq: int, dims: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.seq, self.dims, self.theta, self.scaling = seq, dims, theta, scaling
        self.register_buffer("cos", torch.empty(seq, dims // 2), persistent=False)
        self.register_buffer("sin", torch.empty(seq, dims // 2), persistent=False)

    def fill(self) -> None:
        """Writes the tables: angle[s, i] = s * theta^(-2i/R), stretched where the model says so."""
        frequencies = self.theta ** -(torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims)
        if self.scaling is not None:
            frequencies = stretched(frequencies, self.theta, self.seq, self.scaling)
        angles = torch.outer(torch.arange(self.seq, dtype=torch.float64), frequencies)
        amplitude = self.scaling.amplitude if self.scaling is not None else 1.0
        self.cos.copy_(angles.cos() * amplitude)
        self.sin.copy_(angles.sin() * amplitude)

    def hold(self, positions: Tensor) -> None:
        """Keeps the rows of these positions alone, in their order."""
        self.cos, self.sin = (table[positions.to(table.device)] for table in (self.cos, self.sin))


def stretched(frequencies: Tensor, theta: float, seq: int, scaling: RopeScaling) -> Tensor:
    """Frequencies [R/2] for longer sequences than the first training had
    (`planner.model.arithmetic.RopeKind`)."""
    match scaling.kind:
        case RopeKind.LINEAR:
            return frequencies / scaling.factor
        case RopeKind.LLAMA3:
            return _blended(frequencies, _llama3_kept(frequencies, scaling), scaling.factor)
        case RopeKind.YARN:
            return _blended(frequencies, _yarn_kept(frequencies, theta, scaling), scaling.factor)
        case RopeKind.LONGROPE:
            divisors = scaling.long if seq > scaling.original_positions else scaling.short
            return frequencies / torch.tensor(divisors, dtype=frequencies.dtype)


def _blended(frequencies: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Each frequency: its share `kept` as it is, the rest divided by the factor."""
    return frequencies * kept + frequencies / factor * (1 - kept)


def _llama3_kept(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """1 where a position turns often over the original length, 0 where seldom, linear in turns between."""
    turns = frequencies * scaling.original_positions / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """1 for dims of at least beta_fast turns over the original length, 0 below beta_slow, linear between."""
    half = len(frequencies)

    def dim_of(turns: float) -> float:
        return half * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    place = torch.arange(half, dtype=frequencies.dtype)
    return 1 - ((place - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x_bsnd: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """`x` with the first R dims of each head turned by their position's angles, in fp32; the rest as it is.

    Pairs are (i, i + R/2), or neighbours (2i, 2i + 1) where interleaved.
    """
    seq, dims = x_bsnd.shape[1], 2 * cos.shape[-1]
    c, s = cos[:seq, None, :], sin[:seq, None, :]
    turning, rest = x_bsnd[..., :dims].float(), x_bsnd[..., dims:]
    if interleaved:
        low, high = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((low * c - high * s, high * c + low * s), dim=-1).flatten(-2)
    else:
        low, high = turning.chunk(2, dim=-1)
        turned = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
    turned = turned.type_as(x_bsnd)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

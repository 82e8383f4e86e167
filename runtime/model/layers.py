"""Rotary position embedding. Shapes: B micro-batch, S sequence, N heads, D head_dim, R <= D turned dims.

Norms of a block and of queries and keys. Shapes: B micro-batch, S sequence, W the normed width.

The feed-forward layer. Shapes: B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.model import feed_forward
from planner.model.arithmetic import RopeKind, RopeScaling
from planner.model.feed_forward import Activation
from planner.model.spec import Norm


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


class Mlp(nn.Module):
    """The feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, hidden: int, spec: feed_forward.Mlp) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate = nn.Linear(hidden, spec.width, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.down = nn.Linear(spec.width, hidden, bias=spec.bias)

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.gate is None:
            inner = activate(self.up(x_bsh), self.activation)
        else:
            inner = activate(self.gate(x_bsh), self.activation) * self.up(x_bsh)
        out: Tensor = self.down(inner)
        return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The non-linearity of an MLP."""
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
        case Activation.RELU2:
            return functional.relu(x).square()

"""One layer of the model: attention and feed-forward around the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from planner import model as spec_types
from planner.execution import plain_parts
from planner.feed_forward import Mlp as MlpSpec
from planner.model import Norm
from runtime.transformer.attention import Attention
from runtime.transformer.experts import MixtureOfExperts
from runtime.transformer.mlp import Mlp


def norm(kind: Norm, width: int, eps: float) -> nn.Module:
    return nn.RMSNorm(width, eps=eps) if kind is Norm.RMSNORM else nn.LayerNorm(width, eps=eps)


class Block(nn.Module):
    """One pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: spec_types.Layer, norm_eps: float) -> None:
        super().__init__()
        block, attention, mlp = plain_parts(spec)
        self.attention_norm = norm(block.norm, block.hidden, norm_eps)
        self.attention = Attention(block.hidden, attention)
        self.mlp_norm = norm(block.norm, block.hidden, norm_eps)
        self.mlp: Mlp | MixtureOfExperts = (
            Mlp(block.hidden, mlp) if isinstance(mlp, MlpSpec) else MixtureOfExperts(block.hidden, mlp)
        )

    def forward(self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        middle: Tensor = x_bsh + self.attention(self.attention_norm(x_bsh), cos, sin)
        out: Tensor = middle + self.mlp(self.mlp_norm(middle))
        return out

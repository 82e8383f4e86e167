"""One layer of the model: attention and feed-forward around the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from planner import model as spec_types
from planner.arithmetic import Arithmetic
from planner.attention import LatentAttention as LatentSpec
from planner.execution import plain_parts
from planner.feed_forward import Mlp as MlpSpec
from runtime.transformer.attention import Attention
from runtime.transformer.experts import MixtureOfExperts
from runtime.transformer.latent import LatentAttention
from runtime.transformer.mlp import Mlp
from runtime.transformer.norms import make_norm


class Block(nn.Module):
    """One transformer block, x + attention(norm(x)), then x + mlp(norm(x)), with these variations:

    post_norm       x + norm(attention(x)), then x + norm(mlp(x))
    four norms      x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))
    parallel        x + attention(norm(x)) + mlp(norm(x)), by one norm or two
    residual_scale  what is added is multiplied by it
    """

    def __init__(self, spec: spec_types.Layer, arithmetic: Arithmetic, norm_eps: float) -> None:
        super().__init__()
        block, mixer, mlp = plain_parts(spec)
        self.parallel, self.residual_scale = block.parallel, arithmetic.residual_scale
        before = not arithmetic.post_norm or block.norms == 4
        after = arithmetic.post_norm or block.norms == 4

        def norm(held: bool) -> nn.Module:
            if not held:
                return nn.Identity()
            return make_norm(block.norm, block.hidden, norm_eps, unit_offset=arithmetic.unit_offset)

        self.attention_norm = norm(before)
        self.attention: nn.Module = (
            LatentAttention(block.hidden, mixer, arithmetic, norm_eps)
            if isinstance(mixer, LatentSpec)
            else Attention(block.hidden, mixer, arithmetic, norm_eps)
        )
        self.attention_out_norm = norm(after)
        self.mlp_norm = norm(before) if block.norms > 1 else None
        self.mlp: Mlp | MixtureOfExperts = (
            Mlp(block.hidden, mlp) if isinstance(mlp, MlpSpec) else MixtureOfExperts(block.hidden, mlp)
        )
        self.mlp_out_norm = norm(after)

    def forward(self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        normed = self.attention_norm(x_bsh)
        mixed = self.attention_out_norm(self.attention(normed, cos, sin))
        middle = x_bsh + self._scaled(mixed)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(x_bsh if self.parallel else middle)
        fed = self.mlp_out_norm(self.mlp(normed))
        out: Tensor = middle + self._scaled(fed)
        return out

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

"""One layer of the model: attention and feed-forward around the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from planner.model import spec as spec_types
from planner.model.arithmetic import Arithmetic
from planner.model.attention import LatentAttention as LatentSpec
from planner.model.feed_forward import Mlp as MlpSpec
from planner.strategy.engines.runtime_support import plain_parts
from runtime.model.attention import Attention
from runtime.model.experts import MixtureOfExperts
from runtime.model.latent import LatentAttention
from runtime.model.mlp import Mlp
from runtime.model.norms import make_norm


class Block(nn.Module):
    """One transformer block, x + attention(norm(x)), then x + mlp(norm(x)), with these variations:

    post_norm       x + norm(attention(x)), then x + norm(mlp(x))
    four norms      x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))
    parallel        x + (attention(norm(x)) + mlp(norm(x))), by one norm or two
    residual_scale  what is added is multiplied by it

    `begins` [B, S] says where the document of each token begins, where attention stays within documents.

    `enter` and `leave` are put around the sublayers of a parallel block by tensor parallelism, whose ranks
    then sum both results at once.
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
        self.enter: Callable[[Tensor], Tensor] = _unchanged
        self.leave: Callable[[Tensor], Tensor] = _unchanged

    @property
    def joins(self) -> bool:
        """Whether both sublayers' results are summed before anything else is done with them."""
        plain = isinstance(self.attention_out_norm, nn.Identity) and isinstance(self.mlp, Mlp)
        return self.parallel and plain

    def forward(
        self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None = None
    ) -> Tensor:
        normed = self.attention_norm(x_bsh)
        if self.parallel:
            return x_bsh + self._side_by_side(x_bsh, normed, cos, sin, begins)
        mixed = self.attention_out_norm(self.attention(normed, cos, sin, begins=begins))
        middle = x_bsh + self._scaled(mixed)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(middle)
        fed = self.mlp_out_norm(self.mlp(normed))
        out: Tensor = middle + self._scaled(fed)
        return out

    def _side_by_side(
        self, x_bsh: Tensor, normed: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None
    ) -> Tensor:
        """What both sublayers of a parallel block add."""
        read = self.enter(normed)
        other = read if self.mlp_norm is None else self.enter(self.mlp_norm(x_bsh))
        mixed = self.attention_out_norm(self.attention(read, cos, sin, begins=begins))
        fed = self.mlp_out_norm(self.mlp(other))
        return self.leave(self._scaled(mixed) + self._scaled(fed))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


def _unchanged(x: Tensor) -> Tensor:
    return x

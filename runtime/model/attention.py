"""Causal self-attention. Shapes: B micro-batch, S sequence, H hidden, N heads, D head_dim, W = N D."""

from __future__ import annotations

from torch import Tensor, nn

from planner.model import attention as attention_types
from planner.model.arithmetic import Arithmetic
from planner.model.attention import QkNorm
from runtime.model.attention_core import Core
from runtime.model.norms import UnitOffsetRMSNorm, WidthNorm
from runtime.model.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention; key and value heads may be fewer than query heads (GQA).

    Queries and keys may be normed, over all heads (before they are cut into heads) or each head by itself.
    `core` gives every query what the values hold for it. Context parallelism puts another in its place,
    which meets the keys and values of other ranks. `begins` keeps it within documents.
    """

    def __init__(
        self, hidden: int, spec: attention_types.Attention, arithmetic: Arithmetic, norm_eps: float
    ) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = spec.head_dim, spec.kv_heads
        self.interleaved = arithmetic.rope_interleaved
        self.wq = nn.Linear(hidden, spec.query_width, bias=spec.qkv_bias)
        self.wk = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wv = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wo = nn.Linear(spec.query_width, hidden, bias=spec.out_bias)
        self.norms_width = spec.qk_norm is QkNorm.WIDTH
        self.q_norm = _qk_norm(spec, spec.query_width, arithmetic, norm_eps)
        self.k_norm = _qk_norm(spec, spec.kv_width, arithmetic, norm_eps)
        self.core: nn.Module = Core(spec.span, arithmetic.attention_scale, arithmetic.attention_cap)

    def forward(
        self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.wq(x_bsh), self.wk(x_bsh), self.wv(x_bsh)
        if self.norms_width:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if not self.norms_width:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = (rotate(t, cos, sin, interleaved=self.interleaved) for t in (q, k))
        mixed: Tensor = self.wo(self.core(q, k, v, begins).flatten(2))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        # The head count is left to `view`: under tensor parallelism a rank holds only some heads.
        return x.view(*x.shape[:2], -1, self.head_dim)


def _qk_norm(
    spec: attention_types.Attention, width: int, arithmetic: Arithmetic, norm_eps: float
) -> nn.Module:
    match spec.qk_norm:
        case QkNorm.HEAD:
            kind = UnitOffsetRMSNorm if arithmetic.unit_offset else nn.RMSNorm
            return kind(spec.head_dim, eps=norm_eps)
        case QkNorm.HEAD_LAYERNORM:
            return nn.LayerNorm(spec.head_dim, eps=norm_eps)
        case QkNorm.WIDTH:
            return WidthNorm(width, norm_eps)
        case _:
            return nn.Identity()

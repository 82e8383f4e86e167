"""Causal self-attention. Shapes: B micro-batch, S sequence, H hidden, N heads, D head_dim."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from planner import attention as attention_types
from runtime.transformer.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention; key and value heads may be fewer than query heads (GQA).

    `core` gives every query what the values hold for it. Context parallelism puts another in its place, which
    meets the keys and values of other ranks.
    """

    def __init__(self, hidden: int, spec: attention_types.Attention) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(hidden, spec.query_width, bias=spec.qkv_bias)
        self.wk = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wv = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wo = nn.Linear(spec.query_width, hidden, bias=spec.out_bias)
        self.core: nn.Module = CausalCore()

    def forward(self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        # The head count is left to `view`: under tensor parallelism a rank holds only some heads.
        q, k, v = (self._heads(w(x_bsh)) for w in (self.wq, self.wk, self.wv))
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed: Tensor = self.wo(self.core(q, k, v).flatten(2))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)


class CausalCore(nn.Module):
    """Attention of each query to the keys up to its own: q [B, S, N, D], k and v of no more heads."""

    def forward(self, q_bsnd: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = k.shape[2] != q_bsnd.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q_bsnd, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)

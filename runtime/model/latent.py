"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the expanded form that training computes.

Shapes: B micro-batch, S sequence, H hidden, N heads, D = nope_dim + rope_dim, R the ranks of the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from planner.model import attention as attention_types
from planner.model.arithmetic import Arithmetic
from runtime.model.attention_core import Core
from runtime.model.rotary import rotate


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values are expanded from one small latent a token.

    A query and a key have a part without positions and a part that is turned, the key's one for all heads.
    Queries have a latent of their own unless `query_rank` is None.
    """

    def __init__(
        self, hidden: int, spec: attention_types.LatentAttention, arithmetic: Arithmetic, norm_eps: float
    ) -> None:
        super().__init__()
        self.nope_dim, self.rope_dim, self.value_dim = spec.nope_dim, spec.rope_dim, spec.value_dim
        self.kv_rank = spec.kv_rank
        self.interleaved = arithmetic.rope_interleaved
        if spec.query_rank is None:
            self.wq = nn.Linear(hidden, spec.query_width, bias=False)
        else:
            self.wq_down = nn.Linear(hidden, spec.query_rank, bias=spec.bias)
            self.q_norm = nn.RMSNorm(spec.query_rank, eps=norm_eps)
            self.wq_up = nn.Linear(spec.query_rank, spec.query_width, bias=False)
        self.wkv_down = nn.Linear(hidden, spec.kv_rank + spec.rope_dim, bias=spec.bias)
        self.kv_norm = nn.RMSNorm(spec.kv_rank, eps=norm_eps)
        self.wkv_up = nn.Linear(spec.kv_rank, spec.heads * (spec.nope_dim + spec.value_dim), bias=False)
        self.wo = nn.Linear(spec.heads * spec.value_dim, hidden, bias=spec.bias)
        self.compressed = spec.query_rank is not None
        scale = arithmetic.attention_scale or spec.head_dim**-0.5
        self.core = Core(spec.span, scale, arithmetic.attention_cap)

    def forward(
        self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None = None
    ) -> Tensor:
        q = self.wq_up(self.q_norm(self.wq_down(x_bsh))) if self.compressed else self.wq(x_bsh)
        latent, turned = torch.split(self.wkv_down(x_bsh), [self.kv_rank, self.rope_dim], dim=-1)
        expanded = self._heads(self.wkv_up(self.kv_norm(latent)), self.nope_dim + self.value_dim)
        k_nope, v = torch.split(expanded, [self.nope_dim, self.value_dim], dim=-1)
        q = self._heads(q, self.nope_dim + self.rope_dim)
        q_nope, q_rope = torch.split(q, [self.nope_dim, self.rope_dim], dim=-1)
        k_rope = self._heads(_for_all_heads(turned), self.rope_dim)
        if cos is not None and sin is not None:
            q_rope, k_rope = (rotate(t, cos, sin, interleaved=self.interleaved) for t in (q_rope, k_rope))
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
        mixed: Tensor = self.wo(self.core(q, k, v, begins).flatten(2))
        return mixed

    def _heads(self, x: Tensor, width: int) -> Tensor:
        # The head count is left to `view`: under tensor parallelism a rank holds only some heads.
        return x.view(*x.shape[:2], -1, width)


def _for_all_heads(x: Tensor) -> Tensor:
    """The whole of a tensor that each tensor-parallel rank uses for its heads alone: gradients add up."""
    return x.to_local(grad_placements=[Partial()]) if isinstance(x, DTensor) else x

"""Causal self-attention. Shapes: B micro-batch, S sequence, H hidden, N heads, D head_dim, W = N D.

The core of attention: softmax of scores times values. B micro-batch, N heads, S sequence, D dims.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the expanded form that training computes.

Shapes: B micro-batch, S sequence, H hidden, N heads, D = nope_dim + rope_dim, R the ranks of the latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from planner.model import attention as attention_types
from planner.model.arithmetic import Arithmetic
from planner.model.attention import AttentionSpan, QkNorm, Reach
from runtime.model.block_attention import document_attention
from runtime.model.layers import UnitOffsetRMSNorm, WidthNorm, rotate

LEAST_CHUNK = 256
"""Queries that are taken together, at least, where keys or scores need a mask."""


class Core(nn.Module):
    """Causal attention of queries [B, S, N, D] to keys and values [B, S, N or fewer, D]; it has no weights.

    Full attention is one call of torch's fused kernel. A window goes by chunks of queries, each with the
    keys that it can meet, so no mask of S x S is made. Capped scores, c tanh(score / c), are in no fused
    kernel: they are written out by chunks too, and each chunk is computed again in the backward pass.

    `begins` [B, S], in host memory, keeps attention within documents: each token meets only the keys from
    where its own begins.
    """

    def __init__(self, span: AttentionSpan, scale: float | None, cap: float | None) -> None:
        super().__init__()
        self.window = span.size if span.reach is Reach.WINDOW else 0
        self.scale, self.cap = scale, cap

    def forward(self, q_bsnd: Tensor, k: Tensor, v: Tensor, begins: Tensor | None = None) -> Tensor:
        width, seq = v.shape[-1], q_bsnd.shape[1]
        by_chunks = self.cap is not None or 0 < self.window < seq
        if width < k.shape[-1] and (v.device.type == "cpu" or (begins is not None and not by_chunks)):
            # torch's fused kernel for CPUs, and those that attend by documents, want values as wide as keys.
            v = functional.pad(v, (0, k.shape[-1] - width))
        if begins is not None and not by_chunks:
            result: Tensor = document_attention(q_bsnd, k, v, begins, self.scale)[0]
            return result[..., :width]
        q, k, v = (t.transpose(1, 2) for t in (q_bsnd, k, v))
        if by_chunks:
            out = self._by_chunks(q, k, v, begins if begins is None else begins.to(q.device))
        else:
            grouped = k.shape[1] != q.shape[1]
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        return out[..., :width].transpose(1, 2)

    def _by_chunks(self, q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None) -> Tensor:
        seq = q.shape[2]
        window = self.window or seq
        size = max(LEAST_CHUNK, window // 4)
        attend: Callable[..., Tensor] = _fused if self.cap is None else _recomputed
        parts = []
        for first in range(0, seq, size):
            end = min(seq, first + size)
            begin = max(0, first - window + 1)
            places = torch.arange(begin, end, device=q.device)
            ahead = places - torch.arange(first, end, device=q.device)[:, None]
            met = (ahead <= 0) & (ahead > -window)
            if begins is not None:
                met = (met & (places >= begins[:, first:end, None]))[:, None]
            keys, values = k[:, :, begin:end], v[:, :, begin:end]
            parts.append(attend(q[:, :, first:end], keys, values, met, self.scale, self.cap))
        return torch.cat(parts, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, met: Tensor, scale: float | None, cap: None) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=met, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def _recomputed(q: Tensor, k: Tensor, v: Tensor, met: Tensor, scale: float | None, cap: float) -> Tensor:
    out: Tensor = checkpoint(_capped, q, k, v, met, scale, cap, use_reentrant=False, preserve_rng_state=False)
    return out


def _capped(q: Tensor, k: Tensor, v: Tensor, met: Tensor, scale: float | None, cap: float) -> Tensor:
    """softmax(cap tanh(scale q k / cap)) v in fp32, with the heads of a group together.

    `met` is a mask of queries and keys, for all sequences or [B, 1, queries, keys].
    """
    grouped = q.view(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).float() * (scale or q.shape[-1] ** -0.5)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~met.unsqueeze(-3), -torch.inf)
    return (scores.softmax(-1).type_as(v) @ v.unsqueeze(2)).flatten(1, 2)


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

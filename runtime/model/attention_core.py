"""The core of attention: softmax of scores times values. B micro-batch, N heads, S sequence, D dims."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from planner.model.attention import Reach, Span
from runtime.model.document_attention import document_attention

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

    def __init__(self, span: Span, scale: float | None, cap: float | None) -> None:
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

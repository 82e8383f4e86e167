"""Attention within documents of packed sequences: which queries and keys meet, and attention over just those.

`begins` [B, S], in host memory, has for each token the place in its sequence at which its document begins,
so that query s meets the keys begins[s] to s. That falls into blocks without a mask: each document by itself
is causal; and of two slices of a sequence one behind the other, the queries of the document that goes over
the border meet all of its keys in the earlier slice. Each block is one call of the kernels of
`runtime.model.attention_blocks`, so that work and memory shrink with the documents; a query meets nothing in
vain.

The calls are in an operator of its own: compilers leave it whole, though the blocks differ every time, and
selective recomputation keeps its result (runtime.parallel.recompute).

Shapes: B micro-batch, S positions, N query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.model.attention_blocks import ALL, Merged, attend, attend_backward, empty_results

Three = tuple[Tensor, Tensor, Tensor]


class Meeting(NamedTuple):
    """Queries and keys that meet all with all, or causally: of these sequences, at these places."""

    rows: slice = ALL
    queries: slice = ALL
    keys: slice = ALL
    causal: bool = False


class Slice(NamedTuple):
    """Positions [first, end) of a sequence, which lie from `place` on in a tensor."""

    first: int
    end: int
    place: int

    def local(self, first: int, end: int) -> slice:
        """Where some of its positions lie."""
        return slice(first - self.first + self.place, end - self.first + self.place)


def document_bounds(begins_bs: Tensor) -> list[list[int]]:
    """Of each sequence the places at which documents begin, and at last its length."""
    seq = begins_bs.shape[1]
    return [[*row.unique_consecutive().tolist(), seq] for row in begins_bs]


def meetings(bounds: list[list[int]], queries: Sequence[Slice], keys: Sequence[Slice]) -> list[Meeting]:
    """Which queries of some slices meet which keys of others. Slices are the same, or do not overlap."""
    found = []
    for row, own in enumerate(bounds):
        rows = slice(row, row + 1)
        for q in queries:
            for k in keys:
                if k == q:
                    pieces = ((max(a, q.first), min(b, q.end)) for a, b in pairwise(own))
                    places = [q.local(first, end) for first, end in pieces if first < end]
                    found += [Meeting(rows, place, place, True) for place in places]
                elif k.end <= q.first:
                    next_begin = bisect_right(own, q.first)
                    begin, end = own[next_begin - 1], min(q.end, own[next_begin])
                    if begin < k.end:
                        met = k.local(max(begin, k.first), k.end)
                        found.append(Meeting(rows, q.local(q.first, end), met))
    return found


def merge(total: Merged, inputs: Three, met: Sequence[Meeting], scale: float | None) -> None:
    """Adds to a result of queries what these meetings with a block of keys and values give."""
    q, k, v = inputs
    for rows, queries, keys, causal in met:
        block = (q[rows, queries], k[rows, keys], v[rows, keys])
        total.add(*attend(*block, causal=causal, scale=scale), rows=rows, queries=queries)


Parts = list[tuple[Meeting, Three]]
"""What each meeting gives to the gradients of its queries, keys and values."""


def gradient_parts(
    grad: Tensor, inputs: Three, out: Tensor, lse: Tensor, met: Sequence[Meeting], scale: float | None
) -> Parts:
    """Gradients by these meetings; `out` and `lse` are over all keys."""
    q, k, v = inputs
    parts = []
    for meeting in met:
        rows, queries, keys, causal = meeting
        block = (q[rows, queries], k[rows, keys], v[rows, keys])
        results = (out[rows, queries], lse[rows, :, queries])
        part = attend_backward(grad[rows, queries], block, *results, causal=causal, scale=scale)
        parts.append((meeting, part))
    return parts


def add_parts(totals: tuple[Tensor, ...], parts: Parts) -> None:
    """Adds them to the gradients of all queries, keys and values."""
    for (rows, queries, keys, _), part in parts:
        for total, place, more in zip(totals, (queries, keys, keys), part, strict=True):
            total[rows, place] += more


def _meetings_of(begins_bs: Tensor) -> list[Meeting]:
    whole = Slice(0, begins_bs.shape[1], 0)
    return meetings(document_bounds(begins_bs), [whole], [whole])


@torch.library.custom_op("shardwise::document_attention", mutates_args=())
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Causal attention [B, S, N, D] of whole sequences within documents, and its statistics [B, N, S]."""
    out, lse = empty_results(q, v)
    for rows, queries, keys, causal in _meetings_of(begins):
        block = (q[rows, queries], k[rows, keys], v[rows, keys])
        out[rows, queries], lse[rows, :, queries] = attend(*block, causal=causal, scale=scale)
    return out, lse


@torch.library.custom_op("shardwise::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    totals = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    for meeting in _meetings_of(begins):  # one at a time: their sum is what takes memory
        add_parts(totals, gradient_parts(grad, (q, k, v), out, lse, [meeting], scale))
    return totals


@document_attention.register_fake
def _empty_forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return empty_results(q, v)


@document_attention_backward.register_fake
def _empty_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Three:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *document_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


document_attention.register_autograd(_gradients, setup_context=_keep_inputs)

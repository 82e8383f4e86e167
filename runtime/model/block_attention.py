"""Attention of a block of queries to a block of keys, with its statistics, so that blocks can be merged.

Softmax over a sequence of keys that is cut into blocks j: each block gives its own result o_j and the
logarithm l_j of its sum of exponentials; then

    l = log sum_j exp(l_j),    o = sum_j exp(l_j - l) o_j

(Rabe and Staats 2021, arXiv 2112.05682; Ring Attention, arXiv 2310.01889). Going back, a block's gradients
need only the whole o and l. What computes a block is torch's flash attention, whose operators give l: for a
CPU, and for CUDA in 16 bits. Where there is none (fp32 on CUDA, keys and values of different widths) the same
is written out, over QUERY_ROWS queries at a time. All uses of these private operators are in this file.

Shapes: B micro-batch, S queries, T keys, N query heads, K key heads (N is a multiple of K), D head_dim,
E value width. Statistics are [B, N, S], in fp32 for 16-bit and fp32 inputs.

Attention within documents of packed sequences: which queries and keys meet, and attention over just those.

`begins` [B, S], in host memory, has for each token the place in its sequence at which its document begins,
so that query s meets the keys begins[s] to s. That falls into blocks without a mask: each document by itself
is causal; and of two slices of a sequence one behind the other, the queries of the document that goes over
the border meet all of its keys in the earlier slice. Each block is one call of the kernels of
`runtime.model.block_attention`, so that work and memory shrink with the documents; a query meets nothing in
vain.

The calls are in an operator of its own: compilers leave it whole, though the blocks differ every time, and
selective recomputation keeps its result (runtime.parallel.recompute).

Shapes: B micro-batch, S positions, N query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

QUERY_ROWS = 1024
"""Queries whose probabilities are written out at a time, where no flash kernel is there."""
ALL = slice(None)
FLASH_HEAD_DIM = 256
"""The widest head of torch's flash kernel for CUDA. It also asks for a multiple of 8 (mha_fwd)."""


class Kernel(Protocol):
    """Attention of one block. `causal` blocks are square: query i meets the keys up to i."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Result [B, S, N, E] and statistics."""
        ...

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v by a block; `out` and `lse` are those over all keys."""
        ...


def attend(
    q_bsnd: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Result [B, S, N, E] and statistics of queries that meet these keys. Scale None: 1 / sqrt(D)."""
    return kernel_for(q_bsnd, v).forward(q_bsnd, k, v, causal, scale)


def attend_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients of q, k and v that one block gives; `out` and `lse` are over all keys."""
    return kernel_for(inputs[0], inputs[2]).backward(grad, inputs, out, lse, causal, scale)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a result and statistics of queries."""
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=exact)


def kernel_for(q: Tensor, v: Tensor) -> Kernel:
    """What computes a block of these."""
    width = q.shape[-1]
    if width != v.shape[-1]:
        return WrittenOut()
    if q.device.type == "cpu":
        return FlashOnCpu()
    if q.dtype in (torch.bfloat16, torch.float16) and width <= FLASH_HEAD_DIM and width % 8 == 0:
        return FlashOnCuda()
    return WrittenOut()


class Merged:
    """A result over the blocks of keys seen so far, in fp32 at least."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.to(lse.dtype), lse.clone(memory_format=torch.contiguous_format)

    @classmethod
    def empty(cls, q: Tensor, v: Tensor) -> Merged:
        """Before any block was seen."""
        out, lse = empty_results(q, v)
        return cls(out.zero_(), lse.fill_(-torch.inf))

    def add(self, out: Tensor, lse: Tensor, *, rows: slice = ALL, queries: slice = ALL) -> None:
        """Merges in one more block, of these queries of these sequences."""
        total, total_lse = self.out[rows, queries], self.lse[rows, :, queries]
        weight = torch.sigmoid(lse - total_lse).transpose(1, 2).unsqueeze(-1)
        total.lerp_(out.to(total.dtype), weight)
        total_lse.copy_(torch.logaddexp(total_lse, lse))


class FlashOnCpu:
    """torch's flash attention for CPUs."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = flash(*_heads_first(q, k, v), 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        tensors = _heads_first(grad, *inputs, out)
        return _heads_inside(*flash(*tensors, lse, 0.0, causal, scale=scale))


class FlashOnCuda:
    """torch's FlashAttention-2 for CUDA, fp16 and bf16."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        out, lse, *_ = flash(*_heads_first(q, k, v), 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        q, k = inputs[:2]
        # The state of the random numbers is read with dropout only.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        lengths = (None, None, q.shape[1], k.shape[1])
        tensors = _heads_first(grad, *inputs, out)
        found = flash(*tensors, lse.contiguous(), *lengths, 0.0, causal, seed, offset, scale=scale)
        return _heads_inside(*found)


class WrittenOut:
    """Plain products and exponentials, in fp32 at least, for some queries at a time."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        results, statistics = [], []
        values = _per_query_head(v, q)
        for _, scores in _scores(q, k, causal, scale):
            lse = scores.logsumexp(-1)
            results.append(torch.matmul((scores - lse.unsqueeze(-1)).exp(), values))
            statistics.append(lse)
        return torch.cat(results, 2).transpose(1, 2).to(q.dtype), torch.cat(statistics, 2)

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs
        keys, values = _per_query_head(k, q), _per_query_head(v, q)
        queries, grads, results = (t.transpose(1, 2).to(keys.dtype) for t in (q, grad, out))
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for rows, scores in _scores(q, k, causal, scale):
            part = grads[:, :, rows]
            probabilities = (scores - lse[..., rows].unsqueeze(-1)).exp()
            grad_v += probabilities.transpose(-1, -2) @ part
            change = part @ values.transpose(-1, -2) - (part * results[:, :, rows]).sum(-1, keepdim=True)
            change = change * probabilities * _scale(q, scale)
            grad_q[:, :, rows] = change @ keys
            grad_k += change.transpose(-1, -2) @ queries[:, :, rows]
        return (
            grad_q.transpose(1, 2).to(q.dtype),
            _summed_by_key_head(grad_k, k).to(k.dtype),
            _summed_by_key_head(grad_v, v).to(v.dtype),
        )


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Scaled scores [B, N, rows, T] of QUERY_ROWS queries at a time; -inf where a query may not look."""
    keys = _per_query_head(k, q)
    queries = q.transpose(1, 2).to(keys.dtype) * _scale(q, scale)
    places = torch.arange(k.shape[1], device=q.device)
    for start in range(0, q.shape[1], QUERY_ROWS):
        rows = slice(start, min(start + QUERY_ROWS, q.shape[1]))
        scores = queries[:, :, rows] @ keys.transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(places > places[rows, None], -torch.inf)
        yield rows, scores


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _per_query_head(x_btkd: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, N, T, D], copied for each query head of a group, in fp32 at least."""
    x = x_btkd.transpose(1, 2).to(torch.promote_types(x_btkd.dtype, torch.float32))
    return x.repeat_interleave(q.shape[2] // x.shape[1], dim=1)


def _summed_by_key_head(grad_bntd: Tensor, like: Tensor) -> Tensor:
    """[B, T, K, D]: gradients of a key head's copies, summed."""
    batch, tokens, heads = like.shape[:3]
    return grad_bntd.reshape(batch, heads, -1, tokens, grad_bntd.shape[3]).sum(2).transpose(1, 2)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _heads_inside(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
    return q, k, v


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

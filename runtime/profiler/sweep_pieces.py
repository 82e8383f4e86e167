"""Operators of a training step, alone: what `planner.profile.operator_sample.RateKind` says, built to be run.

Each is the runtime's own code where it has some (attention's core, rotary positions, activation, loss,
products in fp8, products of experts, optimizer), so that its kernels are those of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.foundation.frozen import frozen
from planner.model.attention import CAUSAL
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import Norm
from planner.model.workload import Optimizer, Precision
from planner.profile.operator_sample import RateKind
from runtime.model.attention_core import Core
from runtime.model.experts import MixtureOfExperts, grouped_products
from runtime.model.fp8 import scaled_product
from runtime.model.held_weights import Weight
from runtime.model.loss import cross_entropy
from runtime.model.mlp import activate
from runtime.model.norms import make_norm
from runtime.model.rotary import Rotary, rotate
from runtime.profiler.measure_layers import DTYPES
from runtime.train.optimizer import OptimizerOptions, build_optimizer, clip, weighted_square_sum

HEAD_DIM = 128
"""Dims of a head whose rotary positions are timed; a narrower tensor is one head."""


@frozen
class RateCase:
    """One sample to take: a kind, its variant, and its sizes as `RateKind` names them."""

    kind: RateKind
    dims: tuple[int, ...]
    precision: Precision
    variant: str = ""

    def label(self) -> str:
        """A short name for progress and messages."""
        name = f"{self.kind} {self.variant}".strip()
        return f"{name} {'x'.join(map(str, self.dims))} {self.precision}"


@dataclass(frozen=True)
class Piece:
    """An operator: `call` on `inputs`, of which those in floating point get gradients; and its weights'.

    `turned` is whether there is a backward pass.
    """

    call: Callable[..., object]
    inputs: tuple[Tensor, ...] = ()
    turned: bool = True


class Place(NamedTuple):
    """Where a piece's tensors are, and their type."""

    device: torch.device
    dtype: torch.dtype

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device, dtype=self.dtype)

    def weight(self, *sizes: int) -> nn.Parameter:
        """A weight with a gradient that exists, as in all micro-batches but the first.

        Its results are of order 1: logits of order 100 have softmaxes of denormal numbers, slow on a CPU.
        """
        weight = nn.Parameter(self.random(*sizes) * sizes[-1] ** -0.5)
        weight.grad = torch.zeros_like(weight)
        return weight

    def integers(self, end: int, count: int) -> Tensor:
        return torch.randint(0, end, (count,), device=self.device)


def build_piece(case: RateCase, device: torch.device) -> Piece:
    """The operator of a case with random inputs on a device."""
    dtype = torch.bfloat16 if case.precision is Precision.FP8 else DTYPES[case.precision]
    place = Place(device, dtype)
    match case.kind:
        case RateKind.GEMM:
            return _gemm(case, place)
        case RateKind.GROUPED:
            return _grouped(case.dims, place)
        case RateKind.ROUTING:
            return _routing(case.dims, place)
        case RateKind.ATTENTION:
            return _attention(case.dims, place)
        case RateKind.ADD:
            return Piece(torch.add, (place.random(*case.dims), place.random(*case.dims)), turned=False)
        case RateKind.ACTIVATION:
            return _activation(case, place)
        case RateKind.NORM:
            return _norm(case, place)
        case RateKind.ROTARY:
            return _rotary(case.dims, place)
        case RateKind.CROSS_ENTROPY:
            return _cross_entropy(case.dims, place)
        case RateKind.EMBEDDING:
            return _embedding(case.dims, place)
        case RateKind.OPTIMIZER:
            return _optimizer(case, device)
        case RateKind.COPY | RateKind.TO_DEVICE | RateKind.TO_HOST:
            return _copy(case, device)


def _gemm(case: RateCase, place: Place) -> Piece:
    m, n, k = case.dims
    weight = place.weight(n, k)
    product = scaled_product if case.precision is Precision.FP8 else functional.linear
    return Piece(lambda x: product(x, weight), (place.random(m, k),))


def _grouped(dims: Sequence[int], place: Place) -> Piece:
    experts, rows, n, k = dims
    weight = place.weight(experts, n, k)
    ends = torch.arange(rows, experts * rows + 1, rows, device=place.device, dtype=torch.int32)
    return Piece(lambda x: grouped_products(x, weight, None, ends), (place.random(experts * rows, k),))


class _Same(nn.Module):
    """Takes the place of experts: their rows as they are."""

    def forward(self, rows_rh: Tensor, counts_e: Tensor) -> Tensor:
        return rows_rh


def _routing(dims: Sequence[int], place: Place) -> Piece:
    tokens, experts, topk, hidden = dims
    spec = Experts(count=experts, topk=topk, expert=Mlp(width=1, gated=False, activation=Activation.SILU))
    mixture = MixtureOfExperts(hidden, spec)
    mixture.experts = _Same()  # type: ignore[assignment]
    mixture.router.weight = place.weight(experts, hidden)
    mixture.to(place.device)
    return Piece(mixture, (place.random(1, tokens, hidden),))


def _attention(dims: Sequence[int], place: Place) -> Piece:
    """All pairs of sequences and heads as heads of one sequence."""
    pairs, seq, head_dim = dims
    core = Core(CAUSAL, None, None)
    shape = (1, seq, pairs, head_dim)
    inputs = tuple(place.random(*shape) for _ in range(3))
    return Piece(lambda q, k, v: core(q, k, v).flatten(2), inputs)


def _activation(case: RateCase, place: Place) -> Piece:
    name, _, gated = case.variant.partition("-")
    kind = Activation(name)
    inner = place.random(*case.dims)
    if gated:
        return Piece(lambda gate, up: activate(gate, kind) * up, (inner, place.random(*case.dims)))
    return Piece(lambda up: activate(up, kind), (inner,))


def _norm(case: RateCase, place: Place) -> Piece:
    rows, width = case.dims
    norm = make_norm(Norm(case.variant), width, 1e-5).to(place.device, place.dtype)
    for parameter in norm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return Piece(norm, (place.random(rows, width),))


def _rotary(dims: Sequence[int], place: Place) -> Piece:
    tokens, width = dims
    head_dim = min(HEAD_DIM, width)
    table = Rotary(tokens, head_dim, 10_000.0)
    table.fill()
    cos, sin = table.cos.to(place.device), table.sin.to(place.device)
    x = place.random(1, tokens, width // head_dim, head_dim)
    return Piece(lambda turned: rotate(turned, cos, sin), (x,))


def _cross_entropy(dims: Sequence[int], place: Place) -> Piece:
    tokens, vocab, hidden = dims
    weight, targets = place.weight(vocab, hidden), place.integers(vocab, tokens)
    return Piece(lambda x: cross_entropy(x, weight, targets), (place.random(tokens, hidden),))


def _embedding(dims: Sequence[int], place: Place) -> Piece:
    tokens, vocab, hidden = dims
    table, chosen = place.weight(vocab, hidden), place.integers(vocab, tokens)
    return Piece(lambda: functional.embedding(chosen, table))


def _optimizer(case: RateCase, device: torch.device) -> Piece:
    """Master weights, gradients and state are in fp32 in every precision."""
    count, size = case.dims
    shards = [nn.Parameter(torch.randn(1, size, device=device)) for _ in range(count)]
    grads = [torch.randn_like(shard) for shard in shards]
    if case.variant == "clip":

        def norm_and_clip() -> None:
            norm = float(weighted_square_sum(grads, [1.0] * count).sqrt())
            clip(grads, norm, norm / 1.0001)

        return Piece(norm_and_clip, turned=False)
    for shard, grad in zip(shards, grads, strict=True):
        shard.grad = grad
    weights = [Weight(name="", path="", parameter=shard, shard=shard, share=1.0) for shard in shards]
    return Piece(build_optimizer(Optimizer.ADAMW, weights, OptimizerOptions()).step, turned=False)


def _copy(case: RateCase, device: torch.device) -> Piece:
    """Bytes from memory to memory; to and from the host a copy that does not wait where it is pinned."""
    (size,) = case.dims
    held = torch.ones(size, dtype=torch.uint8, device=device)
    if case.kind is RateKind.COPY:
        target = torch.empty_like(held)
        return Piece(lambda: target.copy_(held), turned=False)
    pinned = case.variant == "pinned"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    source, target = (host, held) if case.kind is RateKind.TO_DEVICE else (held, host)
    return Piece(lambda: target.copy_(source, non_blocking=pinned), turned=False)

"""Operators of a training step, alone: what `planner.profile.profile.OperatorKind` says, built to be run.

Each is the runtime's own code where it has some (attention's core, rotary positions, activation, loss,
products in fp8, products of experts, optimizer), so that its kernels are those of a layer.

Which sizes of operators are swept: those that shards of models of 0.1 to 400 billion parameters meet.

Sizes of an axis are powers of two and one and a half times them. Of all their combinations within a device's
limits the cases are taken in the order of farthest points in log sizes (Gonzalez, "Clustering to minimize the
maximum intercluster distance", 1985): any first few of them lie as far apart as so many can.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.foundation.frozen import frozen
from planner.model.attention import CAUSAL
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import Norm
from planner.model.workload import Optimizer, Precision
from planner.profile.profile import OperatorKind
from runtime.model.attention import Core
from runtime.model.experts import MixtureOfExperts, grouped_products
from runtime.model.fp8 import scaled_product
from runtime.model.held_weights import Weight
from runtime.model.layers import Rotary, activate, make_norm, rotate
from runtime.model.loss import cross_entropy
from runtime.profiler.layers import DTYPES
from runtime.train.optimizer import OptimizerOptions, build_optimizer, clip, weighted_square_sum

if TYPE_CHECKING:
    import numpy as np


HEAD_DIM = 128
"""Dims of a head whose rotary positions are timed; a narrower tensor is one head."""


@frozen
class RateCase:
    """One sample to take: a kind, its variant, and its sizes as `OperatorKind` names them."""

    kind: OperatorKind
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
        case OperatorKind.GEMM:
            return _gemm(case, place)
        case OperatorKind.GROUPED:
            return _grouped(case.dims, place)
        case OperatorKind.ROUTING:
            return _routing(case.dims, place)
        case OperatorKind.ATTENTION:
            return _attention(case.dims, place)
        case OperatorKind.ADD:
            return Piece(torch.add, (place.random(*case.dims), place.random(*case.dims)), turned=False)
        case OperatorKind.ACTIVATION:
            return _activation(case, place)
        case OperatorKind.NORM:
            return _norm(case, place)
        case OperatorKind.ROTARY:
            return _rotary(case.dims, place)
        case OperatorKind.CROSS_ENTROPY:
            return _cross_entropy(case.dims, place)
        case OperatorKind.EMBEDDING:
            return _embedding(case.dims, place)
        case OperatorKind.OPTIMIZER:
            return _optimizer(case, device)
        case OperatorKind.COPY | OperatorKind.TO_DEVICE | OperatorKind.TO_HOST:
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
    if case.kind is OperatorKind.COPY:
        target = torch.empty_like(held)
        return Piece(lambda: target.copy_(held), turned=False)
    pinned = case.variant == "pinned"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    source, target = (host, held) if case.kind is OperatorKind.TO_DEVICE else (held, host)
    return Piece(lambda: target.copy_(source, non_blocking=pinned), turned=False)


@frozen
class Limits:
    """The largest case: FLOPs of its forward product, and values of its tensors together."""

    flops: float
    values: float

    def times(self, share: float) -> Limits:
        """Smaller ones."""
        return Limits(flops=share * self.flops, values=share * self.values)


FEW_SHARES = {"cpu": 1 / 16, "cuda": 1 / 2}
"""Of the limits where few cases are taken. On a CPU the largest cases take most of the time."""

LIMITS = {
    "cpu": Limits(flops=2.0**32, values=2.0**27),
    "cuda": Limits(flops=2.0**45, values=2.0**31),
}
"""A twentieth of a second about for one thread, and for an H100; 512 MiB in fp32, and 4 GiB in 16 bits."""


@frozen
class Sweep:
    """One kind of operator: its variants, first and last of each size, and how many cases of each variant.

    `few` of them are always measured.
    """

    kind: OperatorKind
    axes: tuple[tuple[int, int], ...]
    count: int
    few: int
    variants: tuple[str, ...] = ("",)


SWEEPS = {
    "cuda": (
        Sweep(kind=OperatorKind.GEMM, axes=((128, 32768), (64, 65536), (64, 65536)), count=160, few=48),
        Sweep(
            kind=OperatorKind.GROUPED,
            axes=((2, 64), (16, 8192), (512, 16384), (512, 16384)),
            count=24,
            few=8,
        ),
        Sweep(kind=OperatorKind.ROUTING, axes=((256, 32768), (8, 256), (1, 8), (512, 8192)), count=16, few=6),
        Sweep(kind=OperatorKind.ATTENTION, axes=((1, 256), (512, 65536), (64, 128)), count=48, few=24),
        Sweep(kind=OperatorKind.ADD, axes=((2**12, 2**30),), count=10, few=5),
        Sweep(
            kind=OperatorKind.ACTIVATION,
            axes=((2**12, 2**30),),
            count=10,
            few=5,
            variants=("silu-gated", "gelu"),
        ),
        Sweep(
            kind=OperatorKind.NORM,
            axes=((256, 65536), (64, 16384)),
            count=12,
            few=5,
            variants=("rmsnorm", "layernorm"),
        ),
        Sweep(kind=OperatorKind.ROTARY, axes=((256, 65536), (64, 16384)), count=10, few=5),
        Sweep(
            kind=OperatorKind.CROSS_ENTROPY,
            axes=((512, 32768), (4096, 262144), (512, 16384)),
            count=20,
            few=8,
        ),
        Sweep(
            kind=OperatorKind.EMBEDDING, axes=((256, 65536), (4096, 262144), (512, 16384)), count=14, few=6
        ),
        Sweep(
            kind=OperatorKind.OPTIMIZER,
            axes=((1, 256), (1024, 2**28)),
            count=12,
            few=5,
            variants=("adamw", "clip"),
        ),
        Sweep(kind=OperatorKind.COPY, axes=((2**12, 2**32),), count=8, few=4),
        Sweep(
            kind=OperatorKind.TO_DEVICE,
            axes=((2**12, 2**30),),
            count=7,
            few=4,
            variants=("pinned", "pageable"),
        ),
        Sweep(
            kind=OperatorKind.TO_HOST, axes=((2**12, 2**30),), count=7, few=4, variants=("pinned", "pageable")
        ),
    ),
    "cpu": (
        Sweep(kind=OperatorKind.GEMM, axes=((16, 4096), (16, 8192), (16, 8192)), count=80, few=24),
        Sweep(kind=OperatorKind.GROUPED, axes=((2, 16), (8, 1024), (32, 2048), (32, 2048)), count=16, few=6),
        Sweep(kind=OperatorKind.ROUTING, axes=((16, 4096), (4, 64), (1, 8), (16, 2048)), count=16, few=6),
        Sweep(kind=OperatorKind.ATTENTION, axes=((1, 64), (16, 4096), (8, 128)), count=32, few=12),
        Sweep(kind=OperatorKind.ADD, axes=((2**8, 2**25),), count=18, few=8),
        Sweep(
            kind=OperatorKind.ACTIVATION,
            axes=((2**8, 2**25),),
            count=14,
            few=6,
            variants=("silu-gated", "gelu"),
        ),
        Sweep(
            kind=OperatorKind.NORM,
            axes=((16, 8192), (16, 4096)),
            count=12,
            few=5,
            variants=("rmsnorm", "layernorm"),
        ),
        Sweep(kind=OperatorKind.ROTARY, axes=((16, 8192), (16, 4096)), count=12, few=5),
        Sweep(kind=OperatorKind.CROSS_ENTROPY, axes=((16, 4096), (64, 131072), (16, 4096)), count=24, few=10),
        Sweep(kind=OperatorKind.EMBEDDING, axes=((16, 8192), (64, 131072), (16, 4096)), count=16, few=6),
        Sweep(
            kind=OperatorKind.OPTIMIZER,
            axes=((1, 128), (256, 2**22)),
            count=10,
            few=5,
            variants=("adamw", "clip"),
        ),
        Sweep(kind=OperatorKind.COPY, axes=((2**12, 2**28),), count=6, few=4),
    ),
}
"""By type of device. Rows are tokens of a micro-batch; the narrowest widths are shards at tp 16. A CPU copies
between no memories."""


SORTS: Mapping[str, tuple[OperatorKind, ...]] = MappingProxyType(
    {
        "products": (OperatorKind.GEMM, OperatorKind.GROUPED),
        "attention": (OperatorKind.ATTENTION,),
        "what lies between": (
            *(OperatorKind.ADD, OperatorKind.ACTIVATION, OperatorKind.NORM),
            *(OperatorKind.ROTARY, OperatorKind.ROUTING),
        ),
        "ends": (OperatorKind.CROSS_ENTROPY, OperatorKind.EMBEDDING),
        "the update": (OperatorKind.OPTIMIZER,),
        "copies": (OperatorKind.COPY, OperatorKind.TO_DEVICE, OperatorKind.TO_HOST),
    }
)
"""Which operators are measured one after another, and judged together."""


OBLONG = 256
"""Most of a weight's longer side over its shorter one: Llama 3.1 405B's key projection at tp 16 has 256."""


def cases_of(sweep: Sweep, variant: str, precision: Precision, limits: Limits, count: int) -> list[RateCase]:
    """`count` cases of a variant, farthest points first."""
    return [
        RateCase(kind=sweep.kind, dims=dims, precision=precision, variant=variant)
        for dims in _farthest(_lattice(sweep, limits), count)
    ]


def _lattice(sweep: Sweep, limits: Limits) -> list[tuple[int, ...]]:
    axes = [sorted(set(_sizes(*axis))) for axis in sweep.axes]
    found = []
    for dims in itertools.product(*axes):
        flops, values = work_of(sweep.kind, dims)
        if _met(sweep.kind, dims) and flops <= limits.flops and values <= limits.values:
            found.append(dims)
    return found


def _met(kind: OperatorKind, dims: Sequence[int]) -> bool:
    """Whether layers have such operators: weights not too oblong, fewer choices than experts."""
    match kind:
        case OperatorKind.GEMM | OperatorKind.GROUPED:
            return max(dims[-2:]) <= OBLONG * min(dims[-2:])
        case OperatorKind.ROUTING:
            return dims[2] < dims[1]
        case _:
            return True


def _sizes(first: int, last: int) -> list[int]:
    powers = [1 << step for step in range(first.bit_length() - 1, last.bit_length())]
    between = [power * 3 // 2 for power in powers if power % 16 == 0]
    return [size for size in (*powers, *between) if first <= size <= last]


def work_of(kind: OperatorKind, dims: Sequence[int]) -> tuple[float, float]:
    """FLOPs of a case's forward product, and values of its inputs, weights, their gradients and results."""
    match kind:
        case OperatorKind.GEMM:
            m, n, k = dims
            return 2.0 * m * n * k, 2.0 * n * k + m * (n + k)
        case OperatorKind.GROUPED:
            experts, m, n, k = dims
            return 2.0 * experts * m * n * k, experts * (2.0 * n * k + m * (n + k))
        case OperatorKind.ROUTING:
            tokens, experts, topk, hidden = dims
            return 2.0 * tokens * experts * hidden, tokens * (4.0 * experts + 3.0 * topk * hidden)
        case OperatorKind.ATTENTION:
            pairs, seq, width = dims
            return 2.0 * pairs * seq * seq * width, 8.0 * pairs * seq * width
        case OperatorKind.CROSS_ENTROPY:
            tokens, vocab, hidden = dims
            values = 3.0 * vocab * hidden + tokens * (2.0 * vocab + 2 * hidden)
            return 2.0 * tokens * vocab * hidden, values  # one product of three
        case OperatorKind.EMBEDDING:
            tokens, vocab, hidden = dims
            return 0.0, 3.0 * vocab * hidden + 2.0 * tokens * hidden
        case OperatorKind.OPTIMIZER:
            return 0.0, 4.0 * math.prod(dims)
        case OperatorKind.COPY | OperatorKind.TO_DEVICE | OperatorKind.TO_HOST:
            return 0.0, 2.0 * math.prod(dims) / 4
        case _:
            return 0.0, 4.0 * math.prod(dims)


def _farthest(points: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Points one after the other, each as far in log sizes as can be from those before; first the middle."""
    import numpy as np

    places: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.log2(np.asarray(points, dtype=float))
    spans = np.maximum(places.max(axis=0) - places.min(axis=0), 1e-9)
    places = (places - places.min(axis=0)) / spans
    chosen = [int(((places - 0.5) ** 2).sum(axis=1).argmin())]
    away = ((places - places[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(away.argmax()))
        away = np.minimum(away, ((places - places[chosen[-1]]) ** 2).sum(axis=1))
    return [points[index] for index in chosen]

"""Sweeps of a device that is made up: what every operator takes follows from a few constants."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from planner.model.workload import Precision
from planner.profile.profile import Constant, LayerSample, OperatorKind, OperatorSample, Profile
from tests.planner import instances

FLOPS, BYTES_PER_S, LAUNCH_S = 50e12, 1e12, 5e-6
SIZE = 2
"""Bytes of a value in bf16."""

SIZES: dict[OperatorKind, tuple[tuple[int, ...], ...]] = {
    OperatorKind.GEMM: ((32, 256, 2048, 8192), (16, 128, 1024, 8192), (16, 128, 1024, 8192)),
    OperatorKind.GROUPED: ((1, 4, 16), (16, 256, 2048), (16, 128, 1024), (16, 128, 1024)),
    OperatorKind.ROUTING: ((32, 512, 8192), (4, 64), (1, 8), (32, 1024)),
    OperatorKind.ATTENTION: ((1, 8, 64), (64, 512, 4096), (16, 128)),
    OperatorKind.ADD: ((2**10, 2**15, 2**20, 2**26),),
    OperatorKind.ACTIVATION: ((2**10, 2**15, 2**20, 2**26),),
    OperatorKind.NORM: ((32, 512, 8192), (16, 256, 4096)),
    OperatorKind.ROTARY: ((32, 512, 8192), (16, 256, 4096)),
    OperatorKind.CROSS_ENTROPY: ((32, 512, 8192), (64, 1024, 65536), (32, 256, 4096)),
    OperatorKind.EMBEDDING: ((32, 512, 8192), (64, 1024, 65536), (32, 256, 4096)),
    OperatorKind.OPTIMIZER: ((1, 16, 128), (2**10, 2**16, 2**22)),
    OperatorKind.COPY: ((2**12, 2**20, 2**28),),
    OperatorKind.TO_DEVICE: ((2**12, 2**20, 2**28),),
    OperatorKind.TO_HOST: ((2**12, 2**20, 2**28),),
}
NO_HOST = Constant(name="host_block_forward_s", value=1e-9, origin="test")
"""The device is never slower than its host."""

VARIANTS = {
    OperatorKind.ACTIVATION: ("silu-gated", "gelu"),
    OperatorKind.NORM: ("rmsnorm", "layernorm"),
    OperatorKind.OPTIMIZER: ("adamw", "clip"),
    OperatorKind.TO_DEVICE: ("pinned",),
    OperatorKind.TO_HOST: ("pinned",),
}


def work(kind: OperatorKind, dims: Sequence[float]) -> tuple[float, float, float]:
    """Values moved, FLOPs, and the backward pass over the forward."""
    match kind:
        case OperatorKind.GEMM:
            m, n, k = dims
            return m * n + n * k + m * k, 2 * m * n * k, 2.0
        case OperatorKind.GROUPED:
            e, m, n, k = dims
            return e * (m * n + n * k + m * k), 2 * e * m * n * k, 2.0
        case OperatorKind.ROUTING:
            t, e, k, h = dims
            return t * (e + 3 * k * h), 0.0, 1.0
        case OperatorKind.ATTENTION:
            p, s, d = dims
            return 4 * p * s * d, 2 * p * s * s * d, 2.5
        case OperatorKind.CROSS_ENTROPY:
            t, v, h = dims
            return 4 * t * v + v * h, 6 * t * v * h, 0.01
        case OperatorKind.EMBEDDING:
            t, v, h = dims
            return 2 * t * h, 0.0, 3.0
        case OperatorKind.COPY:
            return 2 * dims[0] / SIZE, 0.0, 0.0
        case OperatorKind.TO_DEVICE | OperatorKind.TO_HOST:
            return 20 * dims[0] / SIZE, 0.0, 0.0
        case _:
            return (
                3.0 * math.prod(dims),
                0.0,
                0.0 if kind in (OperatorKind.ADD, OperatorKind.OPTIMIZER) else 2.0,
            )


def seconds(kind: OperatorKind, dims: Sequence[float]) -> tuple[float, float]:
    """What the device takes, forward and backward."""
    values, flops, back = work(kind, dims)
    ahead = LAUNCH_S + SIZE * values / BYTES_PER_S + flops / FLOPS
    return ahead, back * ahead


def samples(
    precision: Precision = Precision.BF16, *, noise: float = 0.0, slower: float = 1.0
) -> Iterator[OperatorSample]:
    """All of them, of a device that is slower by a factor."""
    draw = random.Random(3)
    for kind, axes in SIZES.items():
        for dims, variant in itertools.product(itertools.product(*axes), VARIANTS.get(kind, ("",))):
            ahead, back = (slower * s * math.exp(draw.gauss(0.0, noise)) for s in seconds(kind, dims))
            yield OperatorSample(
                kind=kind,
                dims=dims,
                precision=precision,
                variant=variant,
                forward_s=ahead,
                backward_s=back or None,
                spread=0.02,
                samples=9,
            )


def profile(
    rates: Sequence[OperatorSample] = (),
    layers: Sequence[LayerSample] = (),
    constants: Sequence[Constant] = (),
) -> Profile:
    """A profile of the device."""
    return instances.profile(layers=tuple(layers), constants=(*constants, NO_HOST), rates=tuple(rates))

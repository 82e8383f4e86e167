"""Sweeps of a device that is made up: what every operator takes follows from a few constants."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from planner.model.workload import Precision
from planner.profile.profile import Constant, LayerSample, Profile, RateKind, RateSample
from tests.planner import instances

FLOPS, BYTES_PER_S, LAUNCH_S = 50e12, 1e12, 5e-6
SIZE = 2
"""Bytes of a value in bf16."""

SIZES: dict[RateKind, tuple[tuple[int, ...], ...]] = {
    RateKind.GEMM: ((32, 256, 2048, 8192), (16, 128, 1024, 8192), (16, 128, 1024, 8192)),
    RateKind.GROUPED: ((1, 4, 16), (16, 256, 2048), (16, 128, 1024), (16, 128, 1024)),
    RateKind.ROUTING: ((32, 512, 8192), (4, 64), (1, 8), (32, 1024)),
    RateKind.ATTENTION: ((1, 8, 64), (64, 512, 4096), (16, 128)),
    RateKind.ADD: ((2**10, 2**15, 2**20, 2**26),),
    RateKind.ACTIVATION: ((2**10, 2**15, 2**20, 2**26),),
    RateKind.NORM: ((32, 512, 8192), (16, 256, 4096)),
    RateKind.ROTARY: ((32, 512, 8192), (16, 256, 4096)),
    RateKind.CROSS_ENTROPY: ((32, 512, 8192), (64, 1024, 65536), (32, 256, 4096)),
    RateKind.EMBEDDING: ((32, 512, 8192), (64, 1024, 65536), (32, 256, 4096)),
    RateKind.OPTIMIZER: ((1, 16, 128), (2**10, 2**16, 2**22)),
    RateKind.COPY: ((2**12, 2**20, 2**28),),
    RateKind.TO_DEVICE: ((2**12, 2**20, 2**28),),
    RateKind.TO_HOST: ((2**12, 2**20, 2**28),),
}
NO_HOST = Constant(name="host_block_forward_s", value=1e-9, origin="test")
"""The device is never slower than its host."""

VARIANTS = {
    RateKind.ACTIVATION: ("silu-gated", "gelu"),
    RateKind.NORM: ("rmsnorm", "layernorm"),
    RateKind.OPTIMIZER: ("adamw", "clip"),
    RateKind.TO_DEVICE: ("pinned",),
    RateKind.TO_HOST: ("pinned",),
}


def work(kind: RateKind, dims: Sequence[float]) -> tuple[float, float, float]:
    """Values moved, FLOPs, and the backward pass over the forward."""
    match kind:
        case RateKind.GEMM:
            m, n, k = dims
            return m * n + n * k + m * k, 2 * m * n * k, 2.0
        case RateKind.GROUPED:
            e, m, n, k = dims
            return e * (m * n + n * k + m * k), 2 * e * m * n * k, 2.0
        case RateKind.ROUTING:
            t, e, k, h = dims
            return t * (e + 3 * k * h), 0.0, 1.0
        case RateKind.ATTENTION:
            p, s, d = dims
            return 4 * p * s * d, 2 * p * s * s * d, 2.5
        case RateKind.CROSS_ENTROPY:
            t, v, h = dims
            return 4 * t * v + v * h, 6 * t * v * h, 0.01
        case RateKind.EMBEDDING:
            t, v, h = dims
            return 2 * t * h, 0.0, 3.0
        case RateKind.COPY:
            return 2 * dims[0] / SIZE, 0.0, 0.0
        case RateKind.TO_DEVICE | RateKind.TO_HOST:
            return 20 * dims[0] / SIZE, 0.0, 0.0
        case _:
            return 3.0 * math.prod(dims), 0.0, 0.0 if kind in (RateKind.ADD, RateKind.OPTIMIZER) else 2.0


def seconds(kind: RateKind, dims: Sequence[float]) -> tuple[float, float]:
    """What the device takes, forward and backward."""
    values, flops, back = work(kind, dims)
    ahead = LAUNCH_S + SIZE * values / BYTES_PER_S + flops / FLOPS
    return ahead, back * ahead


def samples(
    precision: Precision = Precision.BF16, *, noise: float = 0.0, slower: float = 1.0
) -> Iterator[RateSample]:
    """All of them, of a device that is slower by a factor."""
    draw = random.Random(3)
    for kind, axes in SIZES.items():
        for dims, variant in itertools.product(itertools.product(*axes), VARIANTS.get(kind, ("",))):
            ahead, back = (slower * s * math.exp(draw.gauss(0.0, noise)) for s in seconds(kind, dims))
            yield RateSample(
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
    rates: Sequence[RateSample] = (),
    layers: Sequence[LayerSample] = (),
    constants: Sequence[Constant] = (),
) -> Profile:
    """A profile of the device."""
    return instances.profile(layers=tuple(layers), constants=(*constants, NO_HOST), rates=tuple(rates))

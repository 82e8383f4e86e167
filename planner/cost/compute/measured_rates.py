"""MeasuredRates: seconds of operators on a device, from the samples of a profile.

Each kind of operator has one Surface forward and one backward, over sizes on which its time rises, with terms
that follow from what it reads, writes and computes. They are fitted when they are first asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

from planner.cost.compute.surface import Surface, Terms
from planner.model.workload import Precision
from planner.profile.operator_sample import RateKind, RateSample
from planner.profile.profile import Profile

TERMS: Mapping[RateKind, Terms] = MappingProxyType(
    {
        # launch; result, weight and input; FLOPs; rows and columns of padding
        RateKind.GEMM: ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
        # the same of every expert
        RateKind.GROUPED: (
            *((0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 0), (1, 0, 1, 1)),
            *((1, 1, 0, 1), (1, 1, 1, 1)),
        ),
        # launches; scores of experts; choices; rows; results
        RateKind.ROUTING: ((0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1), (1, 0, 0, 1)),
        # launch; queries, keys, values, results; softmax; scores and values
        RateKind.ATTENTION: ((0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)),
        RateKind.ADD: ((0,), (1,)),
        RateKind.ACTIVATION: ((0,), (1,)),
        RateKind.NORM: ((0, 0), (1, 0), (0, 1), (1, 1)),
        RateKind.ROTARY: ((0, 0), (1, 0), (1, 1)),
        # launch; logits; weight and its gradient; hidden states; three products
        RateKind.CROSS_ENTROPY: ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
        # launch; the gradient of the table; rows gathered
        RateKind.EMBEDDING: ((0, 0, 0), (0, 1, 1), (1, 0, 1)),
        RateKind.OPTIMIZER: ((0, 0), (1, 0), (1, 1)),
        RateKind.COPY: ((0,), (1,)),
        RateKind.TO_DEVICE: ((0,), (1,)),
        RateKind.TO_HOST: ((0,), (1,)),
    }
)
"""Exponents of each dim in each term of a kind's form."""


class MeasuredRates:
    """Operators of one precision. Those that were not sampled have no surface.

    Under fp8 products are in it; all else stays in bf16.
    """

    def __init__(self, samples: Sequence[RateSample], precision: Precision) -> None:
        beside = Precision.BF16 if precision is Precision.FP8 else precision
        self._samples = [
            sample
            for sample in samples
            if sample.precision is (precision if sample.kind is RateKind.GEMM else beside)
        ]
        self._surfaces: dict[tuple[RateKind, str, bool], Surface | None] = {}

    def has(self, *kinds: RateKind) -> bool:
        """Whether each of these kinds was sampled."""
        return set(kinds) <= {sample.kind for sample in self._samples}

    def forward_s(self, kind: RateKind, *sizes: float, variant: str = "") -> float:
        """Seconds of an operator's forward pass; the kind has been sampled."""
        surface = self.surface(kind, variant)
        assert surface is not None, f"{kind} was not sampled"
        return surface.seconds(*sizes)

    def backward_s(self, kind: RateKind, *sizes: float, variant: str = "") -> float:
        """Seconds of its backward pass; 0 where it has none."""
        surface = self.surface(kind, variant, backward=True)
        return surface.seconds(*sizes) if surface is not None else 0.0

    def both_s(self, kind: RateKind, *sizes: float, variant: str = "") -> tuple[float, float]:
        """Forward and backward."""
        return self.forward_s(kind, *sizes, variant=variant), self.backward_s(kind, *sizes, variant=variant)

    def product_flops(self) -> float:
        """The best rate of a product that was sampled; 0: none was."""
        products = [(s.dims, s.forward_s) for s in self._samples if s.kind is RateKind.GEMM]
        return max((2.0 * m * n * k / seconds for (m, n, k), seconds in products), default=0.0)

    def memory_bytes_per_s(self) -> float:
        """The rate of the largest copy that was sampled, what it reads and writes; 0: none was."""
        copies = [(s.dims[0], s.forward_s) for s in self._samples if s.kind is RateKind.COPY]
        size_bytes, seconds = max(copies, default=(0, 1.0))
        return 2.0 * size_bytes / seconds

    def update_s(self) -> tuple[float, float] | None:
        """Seconds that clipping and update add for each tensor and each parameter; None: not sampled."""
        update, clipping = (self.surface(RateKind.OPTIMIZER, variant) for variant in ("adamw", "clip"))
        if update is None or clipping is None:
            return None
        both = update.coefficients + clipping.coefficients
        return float(both[1]), float(both[2])

    def copies_bytes_per_s(self, size_bytes: float) -> float | None:
        """The rate of copies of a size between device and pinned host memory, the slower way."""
        ways = [self.surface(kind, "pinned") for kind in (RateKind.TO_DEVICE, RateKind.TO_HOST)]
        taken_s = [surface.seconds(size_bytes) for surface in ways if surface is not None]
        return size_bytes / max(taken_s) if len(taken_s) == len(ways) else None

    def surface(self, kind: RateKind, variant: str = "", *, backward: bool = False) -> Surface | None:
        """The fit of one kind; of an activation or norm that was not sampled, the nearest's."""
        key = kind, variant, backward
        if key not in self._surfaces:
            own = _of_variant(kind, [s for s in self._samples if s.kind is kind], variant)
            found = [(s.dims, s.backward_s if backward else s.forward_s) for s in own]
            timed = [(dims, seconds) for dims, seconds in found if seconds]
            self._surfaces[key] = (
                Surface([dims for dims, _ in timed], [seconds for _, seconds in timed], TERMS[kind])
                if timed
                else None
            )
        return self._surfaces[key]


def _of_variant(kind: RateKind, samples: Sequence[RateSample], variant: str) -> list[RateSample]:
    """Those of a variant; of activations and norms else one that is gated as it is, else the first."""
    names = sorted({sample.variant for sample in samples})
    if variant not in names and names and kind in (RateKind.ACTIVATION, RateKind.NORM):
        gated = variant.partition("-")[2]
        variant = next((name for name in names if name.partition("-")[2] == gated), names[0])
    return [sample for sample in samples if sample.variant == variant]


def measured_rates(profile: Profile | None, precision: Precision) -> MeasuredRates | None:
    """The rates that a profile's samples give in a precision; None where it has no products of it."""
    if profile is None or not profile.rates:
        return None
    import statistics

    layers = tuple(s.reference_s for s in profile.layers if s.reference_s)
    rates = _rates_of(profile.rates, statistics.median(layers) if layers else None, precision)
    return rates if rates.has(RateKind.GEMM) else None


@lru_cache(maxsize=8)
def _rates_of(samples: tuple[RateSample, ...], usual_s: float | None, precision: Precision) -> MeasuredRates:
    return MeasuredRates(at_usual_speed(samples, usual_s), precision)


def at_usual_speed(samples: Sequence[RateSample], usual_s: float | None = None) -> list[RateSample]:
    """The samples as if the machine had kept one speed: that of `usual_s`, or else its median."""
    references = [s.reference_s for s in samples if s.reference_s]
    if not references:
        return list(samples)
    import statistics

    usual = usual_s or statistics.median(references)
    return [_at_speed(s, usual / s.reference_s) if s.reference_s else s for s in samples]


def _at_speed(sample: RateSample, factor: float) -> RateSample:
    backward_s = None if sample.backward_s is None else sample.backward_s * factor
    return dataclasses.replace(sample, forward_s=sample.forward_s * factor, backward_s=backward_s)

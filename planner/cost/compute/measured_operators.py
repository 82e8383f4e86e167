"""Surface: seconds of an operator over its sizes, from samples at some of them.

A form with few constants, none below zero, is fitted first (least squares of relative errors):

    form(x) = sum_j c_j prod_i x_i^e_ij

For a product of m, n, k the terms are launch, operands read and written, and FLOPs; the cost of padded tiles
and of filling a pipeline, (m + a)(n + b)(k + c) / r, is such a sum. What is left, log(seconds / form), is
interpolated by a Gaussian process over log2 x (Matern 3/2 with noise; Rasmussen and Williams, "Gaussian
Processes for Machine Learning", 2006, eq. 2.25, 4.17; left-out residuals by eq. 5.12), unless the form alone
predicts left-out samples better. So:

    seconds(x) = exp(log seconds between knots, linear in log x)

Knots are powers of two, some octaves beyond the samples, where the process comes back to the form. At them
seconds are made to rise with every size, so they do everywhere. Beyond the last knot seconds grow with the
highest power of a size in any term, before the first they stay. Twice as fast a device gives half of them.

MeasuredRates: seconds of operators on a device, from the samples of a profile.

Each kind of operator has one Surface forward and one backward, over sizes on which its time rises, with terms
that follow from what it reads, writes and computes. They are fitted when they are first asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from planner.model.workload import Precision
from planner.profile.profile import OperatorKind, OperatorSample, Profile

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats


Point = Sequence[float]
Terms = Sequence[Sequence[int]]

LENGTHS = (1.0, 2.0, 4.0)
NOISES = (0.02, 0.05, 0.12)
"""Choices of the process: octaves of each size over which residuals are alike, and relative noise of one
sample. Those are taken whose left-out residuals are least."""

CLEARLY = 0.9
"""Left-out residuals must fall by a tenth for a length of its own: of few samples less may be chance."""

BELOW, ABOVE = 2, 4
"""Octaves of knots before the least sample and beyond the largest."""

FEWEST = 6
"""Fewer samples than this are described by the form alone."""


class Surface:
    """Seconds over sizes. `points` are positive, `seconds` positive, `terms` the exponents of the form."""

    def __init__(self, points: Sequence[Point], seconds: Sequence[float], terms: Terms) -> None:
        import numpy as np

        assert points, "no sample, no surface"
        self.terms = [tuple(exponents) for exponents in terms]
        self._powers = [max(exponents) for exponents in zip(*self.terms, strict=True)]
        self._x = np.log2(np.asarray(points, dtype=float))
        self._seconds = np.asarray(seconds, dtype=float)
        self.coefficients = self._fitted()
        self._parts = [(c, e) for c, e in zip(self.coefficients.tolist(), self.terms, strict=True) if c > 0]
        self._residual = np.log(self._seconds / self._forms(self._x))
        self._choose()

    def seconds(self, *sizes: float) -> float:
        """Seconds at some sizes, which may lie beyond the samples."""
        knots, flat = self._grid
        places, beyond = [], 0.0
        for size, (first, last), power in zip(sizes, knots, self._powers, strict=True):
            logged = math.log2(size)
            place = min(max(logged, first), last)
            index = min(int(place - first), last - first - 1)
            places.append((index, place - first - index, last - first + 1))
            beyond += power * max(logged - last, 0.0)
        return math.exp(_between(places, flat) + beyond * math.log(2.0))

    def form(self, sizes: Point) -> float:
        """Seconds by the fitted constants alone."""
        return math.fsum(
            c * math.prod(size**e for size, e in zip(sizes, exponents, strict=True) if e)
            for c, exponents in self._parts
        )

    def uncertainty(self, *sizes: float) -> float:
        """Standard deviation, relative, of the prediction at some sizes."""
        import numpy as np

        x = np.log2(np.asarray([sizes], dtype=float))
        across = self._scale * matern(x, self._x, self._lengths)[0]
        variance = self._scale - across @ self._inverse @ across
        return math.sqrt(max(float(variance), 0.0))

    def without(self, *sizes: float) -> float:
        """What the other samples say of the one at some sizes."""
        import numpy as np

        index = int(np.abs(self._x - np.log2(np.asarray(sizes, dtype=float))).sum(axis=1).argmin())
        left_out = self._left_out if self._corrects else self._form_left_out()
        return float(self._seconds[index] / np.exp(left_out[index]))

    @cached_property
    def held_out(self) -> list[float]:
        """Relative errors of samples, each predicted from the others by the better of both ways.

        Those at an end of most of their sizes are left out, unless all are: to them one extrapolates.
        """
        import numpy as np

        left_out = np.abs(np.expm1(self._left_out if self._corrects else self._form_left_out()))
        ends = (self._x == self._x.min(axis=0)) | (self._x == self._x.max(axis=0))
        inner = ends.mean(axis=1) <= 0.5
        found: list[float] = left_out[inner if inner.any() else ~inner].tolist()
        return found

    @property
    def held_out_error(self) -> float:
        """The median of those errors, of samples between others."""
        import statistics

        return statistics.median(self.held_out)

    # Fit

    def _features(self, x: Floats) -> Floats:
        import numpy as np

        found: Floats = np.exp2(x @ np.asarray(self.terms, dtype=float).T)
        return found

    def _forms(self, x: Floats) -> Floats:
        found: Floats = self._features(x) @ self.coefficients
        return found

    def _fitted(self) -> Floats:
        """Constants none below zero, of least squared relative error."""
        import numpy as np
        from scipy.optimize import nnls

        rows = self._features(self._x) / self._seconds[:, None]
        scales = rows.max(axis=0)
        found, _ = nnls(rows / scales, np.ones(len(rows)))
        coefficients: Floats = found / scales
        return coefficients

    def _form_left_out(self) -> Floats:
        """Log of seconds over the form that is fitted without them, its active terms the same."""
        import numpy as np

        active = self.coefficients > 0
        rows = (self._features(self._x) / self._seconds[:, None])[:, active]
        leverage = np.einsum("ij,ji->i", rows, np.linalg.pinv(rows)).clip(0.0, 0.99)
        predicted = 1 - (1 - rows @ self.coefficients[active]) / (1 - leverage)
        found: Floats = -np.log(predicted.clip(1e-3))
        return found

    def _choose(self) -> None:
        """Takes lengths and noise of the process by their left-out residuals, and whether it helps.

        One length for all sizes first, then for each size another where that is clearly better.
        """
        import numpy as np

        count, axes = self._x.shape
        self._scale = max(float(np.mean(self._residual**2)), 1e-4)
        best = min(
            (self._process(np.full(axes, length), noise) for length in LENGTHS for noise in NOISES),
            key=lambda process: process.error,
        )
        for axis, length in itertools.product(range(axes if axes > 1 else 0), LENGTHS):
            lengths = best.lengths.copy()
            lengths[axis] = length
            other = self._process(lengths, best.noise)
            best = other if other.error < CLEARLY * best.error else best
        self._lengths, self._inverse, self._left_out = best.lengths, best.inverse, best.left_out
        form_error = float(np.mean(np.abs(self._form_left_out())))
        self._corrects = count >= FEWEST and best.error < form_error

    def _process(self, lengths: Floats, noise: float) -> _Process:
        import numpy as np

        covariance = self._scale * matern(self._x, self._x, lengths) + noise**2 * np.eye(len(self._x))
        inverse: Floats = np.linalg.inv(covariance)  # type: ignore[assignment]
        left_out = (inverse @ self._residual) / np.diag(inverse)
        return _Process(lengths, noise, inverse, left_out, float(np.mean(np.abs(left_out))))

    # Knots

    @cached_property
    def _grid(self) -> tuple[list[tuple[int, int]], list[float]]:
        """First and last power of two of each size, and log seconds at all knots, the last size fastest."""
        import numpy as np

        low, high = np.floor(self._x.min(axis=0)) - BELOW, np.ceil(self._x.max(axis=0)) + ABOVE
        axes = [np.arange(a, b + 1) for a, b in zip(low, high, strict=True)]
        x = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        log_s = np.log(self._forms(x))
        if self._corrects:
            across = self._scale * matern(x, self._x, self._lengths)
            log_s = log_s + across @ (self._inverse @ self._residual)
        rising = _rising(log_s.reshape([len(axis) for axis in axes]))
        return [(int(a), int(b)) for a, b in zip(low, high, strict=True)], rising.ravel().tolist()


class _Process(NamedTuple):
    """A choice of lengths and noise: the inverse of its covariance, and the residuals that it leaves out."""

    lengths: Floats
    noise: float
    inverse: Floats
    left_out: Floats
    error: float


def matern(a: Floats, b: Floats, lengths: Floats) -> Floats:
    """Matern 3/2 between two lists of points, with a length for each axis."""
    import numpy as np

    away = np.sqrt(3.0 * (((a[:, None, :] - b[None, :, :]) / lengths) ** 2).sum(axis=2))
    found: Floats = (1.0 + away) * np.exp(-away)
    return found


def _rising(values: Floats) -> Floats:
    """The mean of the least array above and the greatest below that rise along every axis."""
    import numpy as np

    above, below = values, values
    for axis in range(values.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    return (above + below) / 2


def _between(places: Sequence[tuple[int, float, int]], flat: Sequence[float]) -> float:
    """Linear between the corners around a place; each is an index, a share of the way on, and the count."""
    corners = [(0, 1.0)]
    for index, share, count in places:
        step = [(index, 1.0 - share)] + ([(index + 1, share)] if share > 0 else [])
        corners = [(at * count + i, weight * w) for at, weight in corners for i, w in step if w > 0]
    return sum(weight * flat[at] for at, weight in corners)


TERMS: Mapping[OperatorKind, Terms] = MappingProxyType(
    {
        # launch; result, weight and input; FLOPs; rows and columns of padding
        OperatorKind.GEMM: ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
        # the same of every expert
        OperatorKind.GROUPED: (
            *((0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 1, 0), (1, 0, 1, 1)),
            *((1, 1, 0, 1), (1, 1, 1, 1)),
        ),
        # launches; scores of experts; choices; rows; results
        OperatorKind.ROUTING: ((0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1), (1, 0, 0, 1)),
        # launch; queries, keys, values, results; softmax; scores and values
        OperatorKind.ATTENTION: ((0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)),
        OperatorKind.ADD: ((0,), (1,)),
        OperatorKind.ACTIVATION: ((0,), (1,)),
        OperatorKind.NORM: ((0, 0), (1, 0), (0, 1), (1, 1)),
        OperatorKind.ROTARY: ((0, 0), (1, 0), (1, 1)),
        # launch; logits; weight and its gradient; hidden states; three products
        OperatorKind.CROSS_ENTROPY: ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
        # launch; the gradient of the table; rows gathered
        OperatorKind.EMBEDDING: ((0, 0, 0), (0, 1, 1), (1, 0, 1)),
        OperatorKind.OPTIMIZER: ((0, 0), (1, 0), (1, 1)),
        OperatorKind.COPY: ((0,), (1,)),
        OperatorKind.TO_DEVICE: ((0,), (1,)),
        OperatorKind.TO_HOST: ((0,), (1,)),
    }
)
"""Exponents of each dim in each term of a kind's form."""


class MeasuredRates:
    """Operators of one precision. Those that were not sampled have no surface.

    Under fp8 products are in it; all else stays in bf16.
    """

    def __init__(self, samples: Sequence[OperatorSample], precision: Precision) -> None:
        beside = Precision.BF16 if precision is Precision.FP8 else precision
        self._samples = [
            sample
            for sample in samples
            if sample.precision is (precision if sample.kind is OperatorKind.GEMM else beside)
        ]
        self._surfaces: dict[tuple[OperatorKind, str, bool], Surface | None] = {}

    def has(self, *kinds: OperatorKind) -> bool:
        """Whether each of these kinds was sampled."""
        return set(kinds) <= {sample.kind for sample in self._samples}

    def forward_s(self, kind: OperatorKind, *sizes: float, variant: str = "") -> float:
        """Seconds of an operator's forward pass; the kind has been sampled."""
        surface = self.surface(kind, variant)
        assert surface is not None, f"{kind} was not sampled"
        return surface.seconds(*sizes)

    def backward_s(self, kind: OperatorKind, *sizes: float, variant: str = "") -> float:
        """Seconds of its backward pass; 0 where it has none."""
        surface = self.surface(kind, variant, backward=True)
        return surface.seconds(*sizes) if surface is not None else 0.0

    def both_s(self, kind: OperatorKind, *sizes: float, variant: str = "") -> tuple[float, float]:
        """Forward and backward."""
        return self.forward_s(kind, *sizes, variant=variant), self.backward_s(kind, *sizes, variant=variant)

    def product_flops(self) -> float:
        """The best rate of a product that was sampled; 0: none was."""
        products = [(s.dims, s.forward_s) for s in self._samples if s.kind is OperatorKind.GEMM]
        return max((2.0 * m * n * k / seconds for (m, n, k), seconds in products), default=0.0)

    def memory_bytes_per_s(self) -> float:
        """The rate of the largest copy that was sampled, what it reads and writes; 0: none was."""
        copies = [(s.dims[0], s.forward_s) for s in self._samples if s.kind is OperatorKind.COPY]
        size_bytes, seconds = max(copies, default=(0, 1.0))
        return 2.0 * size_bytes / seconds

    def update_s(self) -> tuple[float, float] | None:
        """Seconds that clipping and update add for each tensor and each parameter; None: not sampled."""
        update, clipping = (self.surface(OperatorKind.OPTIMIZER, variant) for variant in ("adamw", "clip"))
        if update is None or clipping is None:
            return None
        both = update.coefficients + clipping.coefficients
        return float(both[1]), float(both[2])

    def copies_bytes_per_s(self, size_bytes: float) -> float | None:
        """The rate of copies of a size between device and pinned host memory, the slower way."""
        ways = [self.surface(kind, "pinned") for kind in (OperatorKind.TO_DEVICE, OperatorKind.TO_HOST)]
        taken_s = [surface.seconds(size_bytes) for surface in ways if surface is not None]
        return size_bytes / max(taken_s) if len(taken_s) == len(ways) else None

    def surface(self, kind: OperatorKind, variant: str = "", *, backward: bool = False) -> Surface | None:
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


def _of_variant(kind: OperatorKind, samples: Sequence[OperatorSample], variant: str) -> list[OperatorSample]:
    """Those of a variant; of activations and norms else one that is gated as it is, else the first."""
    names = sorted({sample.variant for sample in samples})
    if variant not in names and names and kind in (OperatorKind.ACTIVATION, OperatorKind.NORM):
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
    return rates if rates.has(OperatorKind.GEMM) else None


@lru_cache(maxsize=8)
def _rates_of(
    samples: tuple[OperatorSample, ...], usual_s: float | None, precision: Precision
) -> MeasuredRates:
    return MeasuredRates(at_usual_speed(samples, usual_s), precision)


def at_usual_speed(samples: Sequence[OperatorSample], usual_s: float | None = None) -> list[OperatorSample]:
    """The samples as if the machine had kept one speed: that of `usual_s`, or else its median."""
    references = [s.reference_s for s in samples if s.reference_s]
    if not references:
        return list(samples)
    import statistics

    usual = usual_s or statistics.median(references)
    return [_at_speed(s, usual / s.reference_s) if s.reference_s else s for s in samples]


def _at_speed(sample: OperatorSample, factor: float) -> OperatorSample:
    backward_s = None if sample.backward_s is None else sample.backward_s * factor
    return dataclasses.replace(sample, forward_s=sample.forward_s * factor, backward_s=backward_s)

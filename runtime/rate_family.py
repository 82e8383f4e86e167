"""Sweeps of operators as families of the profiler: each kind of operator predicts its own sizes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from planner.cost.measured_rates import MeasuredRates, at_usual_speed
from planner.cost.surface import Surface
from planner.rate_sample import RateKind, RateSample
from planner.workload import Precision
from runtime.children import ChildFailed, Emit, run_children
from runtime.families import Reading, readings
from runtime.fp8 import LEAST_CAPABILITY
from runtime.measure_sweeps import measure_sweeps
from runtime.scope import Sweeps
from runtime.sweep_cases import FEW_SHARE, LIMITS, SWEEPS, Sweep, cases_of
from runtime.sweep_pieces import RateCase
from runtime.timing import Effort


class RateFamily:
    """One kind of operator, of one variant and in one precision, over its sizes.

    The first `sweep.few` cases, which span its sizes, are its seeds; with `few` there are no others.
    """

    def __init__(
        self, sweep: Sweep, variant: str, precision: Precision, device_type: str, effort: Effort, few: bool
    ) -> None:
        self.sweep, self.variant, self.precision = sweep, variant, precision
        self.device_type, self.effort = device_type, effort
        limits = LIMITS[device_type].times(FEW_SHARE if few else 1.0)
        self._cases = cases_of(sweep, variant, precision, limits, sweep.few if few else sweep.count)
        self._rates: MeasuredRates | None = None
        self._fitted: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.sweep.kind, self.variant, self.precision)))

    def cases(self) -> Sequence[RateCase]:
        return self._cases

    def together(self, case: RateCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[RateCase]) -> Iterator[Reading]:
        yield from readings(RateSample, measure_sweeps(cases, self.device_type, self.effort))

    # Where the next sample tells most

    def seeds(self) -> Sequence[RateCase]:
        return self._cases[: self.sweep.few]

    def uncertainty(self, case: RateCase, samples: Sequence[Any]) -> float:
        """The larger standard deviation of its passes' predictions."""
        known = [surface.uncertainty(*case.dims) for surface in self._surfaces(samples)]
        return max(known, default=float("inf"))

    def held_out_error(self, samples: Sequence[Any]) -> float | None:
        """The median over samples of the error with which the others predict them, the worse pass's."""
        return max((surface.held_out_error for surface in self._surfaces(samples)), default=None)

    def _surfaces(self, samples: Sequence[Any]) -> list[Surface]:
        rates = self._of(samples)
        found = [rates.surface(self.sweep.kind, self.variant, backward=way) for way in (False, True)]
        return [surface for surface in found if surface is not None]

    def _of(self, samples: Sequence[RateSample]) -> MeasuredRates:
        """The fit to some samples; the latest is remembered, for it is asked of many cases."""
        key = len(samples), id(samples[-1]) if samples else 0
        if self._rates is None or key != self._fitted:
            own = [sample for sample in samples if sample.precision is self.precision]
            self._rates, self._fitted = MeasuredRates(at_usual_speed(own), self.precision), key
        return self._rates


def rate_families(device_type: str, precision: Precision, effort: Effort, wanted: Sweeps) -> list[RateFamily]:
    """The sweeps of a type of device; products in fp8 besides, where the device has them."""
    if wanted is Sweeps.NONE:
        return []
    sweeps = [(sweep, variant, precision) for sweep in SWEEPS[device_type] for variant in sweep.variants]
    if device_type == "cuda" and precision is Precision.BF16 and _multiplies_fp8():
        sweeps += [(sweep, "", Precision.FP8) for sweep, *_ in sweeps if sweep.kind is RateKind.GEMM]
    return [
        RateFamily(sweep, variant, own, device_type, effort, wanted is Sweeps.FEW)
        for sweep, variant, own in sweeps
    ]


def _multiplies_fp8() -> bool:
    """Whether the first device does; asked in a child, since this process may not touch it."""

    def body(rank: int, emit: Emit) -> None:
        emit({"capability": list(torch.cuda.get_device_capability()), "hip": torch.version.hip or ""})

    try:
        found = next(run_children(body))
    except (ChildFailed, StopIteration):
        return False
    return not found["hip"] and tuple(found["capability"]) >= LEAST_CAPABILITY

"""Sweeps of operators as families of the profiler: each operator predicts its own sizes.

Operators of one sort are a family, whose cases share processes: a GPU takes a second or two to start one.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from planner.cost.compute.measured_rates import MeasuredRates, at_usual_speed
from planner.cost.compute.surface import Surface
from planner.foundation.frozen import frozen
from planner.model.workload import Precision
from planner.profile.operator_sample import RateKind, RateSample
from runtime.model.fp8 import LEAST_CAPABILITY
from runtime.profiler.measure_sweeps import measure_sweeps
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.scope import Sweeps
from runtime.profiler.subprocesses import ChildFailed, Emit, run_children
from runtime.profiler.sweep_cases import FEW_SHARES, LIMITS, SORTS, SWEEPS, Sweep, cases_of
from runtime.profiler.sweep_pieces import RateCase
from runtime.profiler.timing import Effort


@frozen
class Operator:
    """One kind of operator, of one variant and in one precision."""

    sweep: Sweep
    variant: str
    precision: Precision


class RateFamily:
    """Operators of one sort, each over its sizes.

    The first `sweep.few` cases of each, which span its sizes, are its seeds; with `few` there are no others.
    """

    def __init__(
        self, sort: str, operators: Sequence[Operator], device_type: str, effort: Effort, *, few: bool
    ) -> None:
        self.sort, self.operators = sort, tuple(operators)
        self.device_type, self.effort = device_type, effort
        limits = LIMITS[device_type].times(FEW_SHARES[device_type] if few else 1.0)
        each = [
            cases_of(o.sweep, o.variant, o.precision, limits, o.sweep.few if few else o.sweep.count)
            for o in self.operators
        ]
        self._seeds = [c for o, cases in zip(self.operators, each, strict=True) for c in cases[: o.sweep.few]]
        others = [c for o, cases in zip(self.operators, each, strict=True) for c in cases[o.sweep.few :]]
        self._cases = self._seeds + others
        self._rates: dict[Precision, MeasuredRates] = {}
        self._fitted: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"sweeps of {self.sort}"

    def cases(self) -> Sequence[RateCase]:
        return self._cases

    def together(self, case: RateCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[RateCase]) -> Iterator[Reading]:
        yield from readings(RateSample, measure_sweeps(cases, self.device_type, self.effort))

    # Where the next sample tells most

    def seeds(self) -> Sequence[RateCase]:
        return self._seeds

    def uncertainty(self, case: RateCase, samples: Sequence[Any]) -> float:
        """The larger standard deviation of its passes' predictions."""
        surfaces = self._surfaces(case.kind, case.variant, case.precision, samples)
        return max((surface.uncertainty(*case.dims) for surface in surfaces), default=float("inf"))

    def held_out_error(self, samples: Sequence[Any]) -> float | None:
        """The mean over operators and passes of the median error of samples that the others predict."""
        surfaces = [
            surface
            for operator in self.operators
            for surface in self._surfaces(operator.sweep.kind, operator.variant, operator.precision, samples)
        ]
        return statistics.fmean(each.held_out_error for each in surfaces) if surfaces else None

    def _surfaces(
        self, kind: RateKind, variant: str, precision: Precision, samples: Sequence[RateSample]
    ) -> list[Surface]:
        rates = self._of(samples, precision)
        found = [rates.surface(kind, variant, backward=way) for way in (False, True)]
        return [surface for surface in found if surface is not None]

    def _of(self, samples: Sequence[RateSample], precision: Precision) -> MeasuredRates:
        """The fit to some samples; the latest is remembered, for it is asked of many cases."""
        key = len(samples), id(samples[-1]) if samples else 0
        if key != self._fitted:
            self._rates, self._fitted = {}, key
        if precision not in self._rates:
            own = [sample for sample in samples if sample.precision is precision]
            self._rates[precision] = MeasuredRates(at_usual_speed(own), precision)
        return self._rates[precision]


def rate_families(device_type: str, precision: Precision, effort: Effort, wanted: Sweeps) -> list[RateFamily]:
    """The sweeps of a type of device; products in fp8 besides, where the device has them."""
    if wanted is Sweeps.NONE:
        return []
    found = [
        Operator(sweep=sweep, variant=variant, precision=precision)
        for sweep in SWEEPS[device_type]
        for variant in sweep.variants
    ]
    if device_type == "cuda" and precision is Precision.BF16 and _multiplies_fp8():
        products = [each.sweep for each in found if each.sweep.kind is RateKind.GEMM]
        found += [Operator(sweep=sweep, variant="", precision=Precision.FP8) for sweep in products]
    by_sort = {sort: [each for each in found if each.sweep.kind in kinds] for sort, kinds in SORTS.items()}
    return [
        RateFamily(sort, operators, device_type, effort, few=wanted is Sweeps.FEW)
        for sort, operators in by_sort.items()
        if operators
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

"""Times operators alone: samples of rates, from which layers that were not measured are priced.

A run is a burst of calls, as many as take BURST_S about, so that short operators are met as in a layer: their
inputs in cache where these were just written, and no clock read between them. Forward calls keep their graphs
until the backward burst. On a GPU the time is the device's own (`runtime.profiler.timing`), without
what the host
takes to launch a burst. On a CPU the reference runs beside each burst.

Sweeps of operators as families of the profiler: each operator predicts its own sizes.

Operators of one sort are a family, whose cases share processes: a GPU takes a second or two to start one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planner.cost.compute.measured_operators import MeasuredRates, Surface, at_usual_speed
from planner.foundation.decode import encode
from planner.foundation.frozen import frozen
from planner.model.workload import Precision
from planner.profile.profile import OperatorKind, OperatorSample
from runtime.model.fp8 import LEAST_CAPABILITY
from runtime.profiler.layers import ATTEMPTS, STEADY_SPREAD, out_of_memory
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.scope import Sweeps
from runtime.profiler.sweeps import (
    FEW_SHARES,
    LIMITS,
    SORTS,
    SWEEPS,
    Piece,
    RateCase,
    Sweep,
    build_piece,
    cases_of,
)
from runtime.profiler.timing import (
    ChildFailed,
    Effort,
    Emit,
    Phase,
    Reference,
    Timing,
    run_children,
    run_phases,
    summarize,
    time_apart,
    time_phases,
)

BURST_S = 2e-3
MOST_CALLS = 64
"""A burst's length about, and its most calls: a queue of a GPU holds a thousand launches."""

ONCE = Effort(warmup=1, least=1, most=1, budget_s=0.0)


def measure_sweeps(cases: Sequence[RateCase], device_type: str, effort: Effort) -> Iterator[dict[str, Any]]:
    """Yields the sample of each case (encoded), or `{"skipped": why}`."""

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        device = torch.device(device_type)
        for case in cases:
            try:
                emit(encode(measure_rate(case, device, effort)))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                emit({"skipped": f"{case.label()}: not enough memory"})
            if device_type == "cuda":
                torch.cuda.empty_cache()

    yield from run_children(body)


class BurstTimes(NamedTuple):
    """Of one call, forward and backward (None: it has none), and the reference beside it (None: a GPU)."""

    forward: Timing
    backward: Timing | None
    reference_s: float | None

    @property
    def spread(self) -> float:
        return max(self.forward.spread, self.backward.spread if self.backward else 0.0)


def measure_rate(case: RateCase, device: torch.device, effort: Effort) -> OperatorSample:
    """One sample; what was disturbed is taken again, and the steadiest is kept."""
    bench = Bench(build_piece(case, device), device)
    attempts: list[BurstTimes] = []
    while len(attempts) < ATTEMPTS and not any(each.spread <= STEADY_SPREAD for each in attempts):
        attempts.append(bench.times(effort))
    best = min(attempts, key=lambda attempt: attempt.spread)
    return OperatorSample(
        kind=case.kind,
        dims=case.dims,
        precision=case.precision,
        variant=case.variant,
        forward_s=best.forward.median_s,
        backward_s=best.backward.median_s if best.backward else None,
        spread=best.spread,
        samples=best.forward.samples,
        reference_s=best.reference_s,
    )


class Bench:
    """Bursts of one operator, forward and backward."""

    def __init__(self, piece: Piece, device: torch.device) -> None:
        self.piece, self.device = piece, device
        self.calls = 1
        self.inputs: list[tuple[Tensor, ...]] = []
        self.outputs: list[Any] = []
        self.grad: Tensor | None = None
        passes = time_phases(self._phases(), ONCE, device)[1:]
        longest_s = max(each.median_s for each in passes)
        self.calls = min(MOST_CALLS, max(1, math.ceil(BURST_S / max(longest_s, 1e-9))))

    def prepare(self) -> None:
        """Inputs of each call, none of which has a gradient."""
        self.inputs = [tuple(_fresh(x) for x in self.piece.inputs) for _ in range(self.calls)]
        self.outputs = []

    def forward(self) -> None:
        call = self.piece.call
        if self.piece.turned:
            self.outputs = [call(*inputs) for inputs in self.inputs]
        else:
            for _ in range(self.calls):
                call(*self.piece.inputs)

    def backward(self) -> None:
        if self.grad is None and self.outputs[0].dim():
            self.grad = torch.ones_like(self.outputs[0])
        while self.outputs:
            torch.autograd.backward(self.outputs.pop(), self.grad)

    def times(self, effort: Effort) -> BurstTimes:
        """Seconds of one call. Each run on a CPU is expressed at the median speed of the sample's runs."""
        if self.device.type != "cpu":
            passes = [each.device for each in time_apart(self._phases(), effort, self.device)[1:]]
            return BurstTimes(*self._of_one_call(passes), None)
        beside, _, *taken = run_phases([Reference(), *self._phases()], effort, self.device)
        usual_s = statistics.median(beside)
        passes = [summarize([s * usual_s / b for s, b in zip(each, beside, strict=True)]) for each in taken]
        return BurstTimes(*self._of_one_call(passes), usual_s)

    def _phases(self) -> list[Phase]:
        passes: list[Phase] = [self.forward, self.backward] if self.piece.turned else [self.forward]
        return [self.prepare, *passes]

    def _of_one_call(self, passes: Sequence[Timing]) -> tuple[Timing, Timing | None]:
        each = [
            Timing(median_s=taken.median_s / self.calls, spread=taken.spread, samples=taken.samples)
            for taken in passes
        ]
        return each[0], each[1] if self.piece.turned else None


def _fresh(x: Tensor) -> Tensor:
    """The same values as a leaf whose gradient is let go at once, as a layer's is."""
    fresh = x.detach()
    if fresh.is_floating_point():
        fresh.requires_grad_()
        fresh.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
    return fresh


def _let_go(x: Tensor) -> None:
    x.grad = None


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
        yield from readings(OperatorSample, measure_sweeps(cases, self.device_type, self.effort))

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
        self, kind: OperatorKind, variant: str, precision: Precision, samples: Sequence[OperatorSample]
    ) -> list[Surface]:
        rates = self._of(samples, precision)
        found = [rates.surface(kind, variant, backward=way) for way in (False, True)]
        return [surface for surface in found if surface is not None]

    def _of(self, samples: Sequence[OperatorSample], precision: Precision) -> MeasuredRates:
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
        products = [each.sweep for each in found if each.sweep.kind is OperatorKind.GEMM]
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

"""Times operators alone: samples of rates, from which layers that were not measured are priced.

A run is a burst of calls, as many as take BURST_S about, so that short operators are met as in a layer: their
inputs in cache where these were just written, and no clock read between them. Forward calls keep their graphs
until the backward burst. On a GPU the time is the device's own (`runtime.profiler.device_time`), without
what the host
takes to launch a burst. On a CPU the reference runs beside each burst.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planner.foundation.decode import encode
from planner.profile.operator_sample import RateSample
from runtime.profiler.device_time import Phase, time_apart
from runtime.profiler.measure_layers import ATTEMPTS, STEADY_SPREAD, out_of_memory
from runtime.profiler.subprocesses import Emit, run_children
from runtime.profiler.sweep_pieces import Piece, RateCase, build_piece
from runtime.profiler.timing import Effort, Reference, Timing, run_phases, summarize, time_phases

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


def measure_rate(case: RateCase, device: torch.device, effort: Effort) -> RateSample:
    """One sample; what was disturbed is taken again, and the steadiest is kept."""
    bench = Bench(build_piece(case, device), device)
    attempts: list[BurstTimes] = []
    while len(attempts) < ATTEMPTS and not any(each.spread <= STEADY_SPREAD for each in attempts):
        attempts.append(bench.times(effort))
    best = min(attempts, key=lambda attempt: attempt.spread)
    return RateSample(
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

"""The step time of a run in its steady state: a median after warm-up, with its spread.

Of n logged steps, the first w = min(max(3, n/10), n/2, 50) are left out: they compile, allocate and tune. The
median of the others is not moved by checkpoints, evaluations and stragglers, which are in under half of the
steps; the spread is their interquartile range over it. A log that marks its own timed steps is taken at its
word.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from planner.foundation.frozen import frozen

LEAST_WARMUP, WARMUP_SHARE, MOST_WARMUP = 3, 0.1, 50


@frozen
class Steady:
    """A figure in the steady state. `spread` is None for fewer than two steps."""

    value: float
    steps: int
    left_out: int
    spread: float | None

    @property
    def text(self) -> str:
        """How it was found, for people."""
        spread = "no spread" if self.spread is None else f"quartiles {self.spread:.1%} apart"
        steps = f"median of {self.steps} steps" if self.steps > 1 else "one step"
        return f"{steps} after {self.left_out} of warm-up, {spread}"


def warmup(steps: int) -> int:
    """How many of the first steps of a log are left out."""
    return min(max(LEAST_WARMUP, int(WARMUP_SHARE * steps)), steps // 2, MOST_WARMUP)


def steady(values: Sequence[float], left_out: int | None = None) -> Steady:
    """The median of the values behind the first `left_out` (None: behind the warm-up)."""
    skipped = warmup(len(values)) if left_out is None else left_out
    kept = values[skipped:] if left_out is None else values
    middle = statistics.median(kept)
    spread = None
    if len(kept) > 1:
        low, _, high = statistics.quantiles(kept, n=4, method="inclusive")
        spread = (high - low) / middle
    return Steady(value=middle, steps=len(kept), left_out=skipped, spread=spread)

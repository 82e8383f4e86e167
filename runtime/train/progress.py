"""Progress of a run for people, on stderr: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from planner.foundation.units import format_bytes, format_count, format_seconds
from runtime.train.metrics import StepMetrics

PLAIN_INTERVAL_S = 2.0
"""Off a terminal, a line at most this often (and always the first and last step)."""
BAR_COLUMNS = 24
"""What the bar, the time that remains and the gaps take of a terminal's line."""


def describe(line: StepMetrics, steps: int, width: int | None = None) -> str:
    """One step in words, the most wanted first: `step 12/60  loss 3.214  ...`; what `width` has room for."""
    parts = [
        f"step {line.step}/{steps}",
        f"loss {line.loss:.4f}",
        _beside_prediction(line),
        f"{format_count(line.tokens_per_s)} tok/s",
        "MFU unknown" if line.mfu is None else f"MFU {line.mfu:.1%}",
        f"peak {format_bytes(max(line.peak_memory_bytes, default=0))}",
        *([] if line.cost_usd is None else [_dollars(line.cost_usd, line.expected_cost_usd)]),
        *([] if width is not None or not line.left_s else [f"{format_seconds(line.left_s)} left"]),
        f"grad {line.grad_norm:.3g}",
        f"lr {line.lr:.2e}",
    ]
    while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def _beside_prediction(line: StepMetrics) -> str:
    """The step time, and what was predicted where something was."""
    predicted = (
        f" ({format_seconds(line.predicted_step_time_s)} predicted)" if line.predicted_step_time_s else ""
    )
    return format_seconds(line.step_time_s) + predicted


def _dollars(so_far: float, expected: float | None) -> str:
    """Dollars so far, and those that the whole run will have cost."""
    return f"${so_far:,.2f}" + ("" if expected is None else f" of ${expected:,.2f}")


class Progress:
    """Shows the steps of a run as they come; silent where `shown` is false."""

    def __init__(self, first_step: int, steps: int, *, shown: bool = True) -> None:
        self._steps, self._shown, self._said_s = steps, shown, 0.0
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            self._bar, self._task = _bar(first_step, steps)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, line: StepMetrics) -> None:
        """Shows one step."""
        if not self._shown:
            return
        if self._bar is not None:
            room = self._bar.console.width - BAR_COLUMNS
            self._bar.update(self._task, completed=line.step, text=describe(line, self._steps, room))
            return
        now_s = time.monotonic()
        if now_s - self._said_s >= PLAIN_INTERVAL_S or line.step in (1, self._steps):
            self._said_s = now_s
            print(describe(line, self._steps), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A remark between the steps."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _bar(first_step: int, steps: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        BarColumn(bar_width=12),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    return bar, bar.add_task("training", total=steps, completed=first_step, text="starting ...")

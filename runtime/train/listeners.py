"""Who follows a run while it goes: people on stderr, and experiment trackers. Told by messages of rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from planner.foundation.decode import decode
from planner.strategy.plan import Plan
from runtime.train.metrics import StepMetrics
from runtime.train.options import TrainOptions
from runtime.train.progress import Progress
from runtime.train.step_breakdown import StepCauses
from runtime.train.summary import TrainSummary
from runtime.train.trackers import Trackers


class Audience:
    """Takes the messages of a run and hands them on; at its end it has the summary."""

    def __init__(self, plan: Plan, options: TrainOptions, *, shown: bool) -> None:
        self._progress = Progress(0, options.steps, shown=shown)
        self._trackers = Trackers(options.log, plan, Path(options.run_dir), self._progress.say)
        self._summary: TrainSummary | None = None

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.close("failed" if self._summary is None else self._summary.status)
        self._progress.__exit__(kind, error, trace)

    def receive(self, message: Mapping[str, Any]) -> None:
        """One message: a step, a remark, or the summary."""
        if "step" in message:
            line = decode_step(message["step"])
            self._progress.step(line)
            self._trackers.step(line)
        elif "say" in message:
            self._progress.say(message["say"])
        elif "summary" in message:
            self._summary = decode(TrainSummary, message["summary"], source="summary")

    def summary(self) -> TrainSummary:
        """The summary, which a run that ended well has sent."""
        assert self._summary is not None
        return self._summary


def decode_step(values: Mapping[str, Any]) -> StepMetrics:
    """A step that came through a pipe; its loss may be NaN there."""
    causes = values["causes"]
    return StepMetrics(
        **{
            **values,
            "peak_memory_bytes": tuple(values["peak_memory_bytes"]),
            "causes": None if causes is None else StepCauses(**causes),
        }
    )

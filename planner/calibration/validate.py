"""validate(): predicted against measured over a table of runs, and what a user would have lost.

For n rows with predicted p and measured t, the error of a row is p / t - 1:

    MAPE = mean |p / t - 1|,  bias = mean (p / t - 1)

In a group (the same model, workload and cluster, different strategies) the chosen row is that of the least
predicted time among those not judged NO. Its regret is its measured time over the least measured time of
the group, minus 1; a chosen row that ran out of memory counts as a regret of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from planner.calibration.run_setup import ProfileOf, RunSetup, Setups
from planner.calibration.runs import MemoryKind, Run, Status
from planner.cost.evaluate import CostModel, Evaluation, predicted_memory_bytes
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Rejected, Verdict

OUTCOMES = ("safe_ran", "safe_oom", "risky_ran", "risky_oom", "no_ran", "no_oom")
OOM_REGRET = 1.0
Progress = Callable[[int, int], None]
"""Called with the rows that are done and all rows."""


@frozen
class ValidatedRow:
    """One run with its prediction. Without one, `reason` says why; `assumed` is what the row left open.

    Errors are predicted over measured, minus 1. The predicted peak is of `memory_kind`; a row may hold the
    allocator's reserved blocks and the driver's figure besides.
    """

    id: str
    group: str
    source: str
    framework: str
    strategy: str
    predicted_step_time_s: float | None
    step_time_s: float | None
    error: float | None
    predicted_peak_memory_gib: float | None
    peak_memory_gib: float | None
    memory_error: float | None
    memory_kind: MemoryKind | None
    verdict: Verdict | None
    status: Status | None
    predicted_interval_s: tuple[float, float] | None = None
    predicted_reserved_gib: float | None = None
    peak_reserved_gib: float | None = None
    reserved_error: float | None = None
    predicted_device_gib: float | None = None
    device_used_gib: float | None = None
    device_error: float | None = None
    reason: str = ""
    assumed: tuple[str, ...] = ()


@frozen
class Summary:
    """Errors over rows, as shares. `n` counts rows with a prediction, of `rows` in all.

    `within_interval` is the share of measured step times that lie in the interval of their prediction.
    """

    n: int
    time_mape: float | None
    time_bias: float | None
    memory_mape: float | None
    memory_bias: float | None
    n_time: int
    n_memory: int
    rows: int
    within_interval: float | None = None
    reserved_mape: float | None = None
    reserved_bias: float | None = None
    device_mape: float | None = None
    device_bias: float | None = None


@frozen
class GroupResult:
    """How well the rows of a group were put in order; `chosen` and `best` are ids of rows."""

    group: str
    n: int
    time_mape: float | None
    time_bias: float | None
    kendall_tau: float | None
    regret: float | None
    chosen: str | None
    best: str | None


@frozen
class Validation:
    """All rows, their errors together and by group, and what became of each verdict."""

    rows: tuple[ValidatedRow, ...]
    summary: Summary
    groups: tuple[GroupResult, ...]
    verdicts: dict[str, int]


def validate(runs: Sequence[Run], profile_of: ProfileOf, progress: Progress | None = None) -> Validation:
    """Predicts every run that can be predicted and compares it with what was measured."""
    predictor = Predictor(profile_of)
    rows = []
    for index, run in enumerate(runs):
        rows.append(predictor.row(run))
        if progress is not None:
            progress(index + 1, len(runs))
    return judge(rows)


def judge(rows: Sequence[ValidatedRow]) -> Validation:
    """The errors of rows together and by group, and their verdicts."""
    groups: dict[str, list[ValidatedRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return Validation(
        rows=tuple(rows),
        summary=summarise(rows),
        groups=tuple(judge_group(name, members) for name, members in groups.items()),
        verdicts=count_verdicts(rows),
    )


class Predictor:
    """Predicts runs one after the other; those of one problem share a cost model."""

    def __init__(self, profile_of: ProfileOf) -> None:
        self._setups = Setups(profile_of)
        self._models: dict[object, CostModel] = {}

    def row(self, run: Run) -> ValidatedRow:
        """The run with its prediction, or with the reason why there is none."""
        setup = self._setups.setup(run)
        if isinstance(setup, Rejected):
            return _row(run, None, None, setup.detail)
        try:
            return _row(run, setup, self._model(setup.problem).evaluate(setup.strategy))
        except InputError as error:
            return _row(run, setup, None, str(error.problems[0]))

    def _model(self, problem: PlanningProblem) -> CostModel:
        # A profile holds a dict and has no hash: the device decides it.
        key = (
            problem.model,
            problem.workload,
            problem.cluster,
            problem.engine_settings,
            problem.memory_limit_bytes,
        )
        if key not in self._models:
            self._models[key] = CostModel(problem)
        return self._models[key]


def _row(run: Run, setup: RunSetup | None, done: Evaluation | None, reason: str = "") -> ValidatedRow:
    step_s = done.estimate.step_time_s if done else None
    peaks = {kind: peak_gib(done, kind) if done else None for kind in MemoryKind}
    peak = peaks[run.memory_kind or MemoryKind.ALLOCATED]
    return ValidatedRow(
        id=run.id,
        group=run.group_name,
        source=run.source,
        framework=run.framework,
        strategy=setup.strategy.degrees.label() if setup else "",
        predicted_step_time_s=step_s,
        step_time_s=run.step_time_s,
        error=_error(step_s, run.step_time_s),
        predicted_peak_memory_gib=peak,
        peak_memory_gib=run.peak_memory_gib,
        memory_error=_error(peak, run.peak_memory_gib),
        memory_kind=run.memory_kind,
        verdict=done.estimate.verdict if done else None,
        status=run.status or (Status.OK if run.step_time_s or run.peak_memory_gib else None),
        predicted_interval_s=done.estimate.step_time_interval_s if done else None,
        predicted_reserved_gib=peaks[MemoryKind.RESERVED],
        peak_reserved_gib=run.peak_reserved_gib,
        reserved_error=_error(peaks[MemoryKind.RESERVED], run.peak_reserved_gib),
        predicted_device_gib=peaks[MemoryKind.DEVICE],
        device_used_gib=run.device_used_gib,
        device_error=_error(peaks[MemoryKind.DEVICE], run.device_used_gib),
        reason=reason,
        assumed=setup.assumed if setup else (),
    )


def peak_gib(done: Evaluation, kind: MemoryKind) -> float:
    """The predicted peak as this observer sees it."""
    return predicted_memory_bytes(done, kind) / GIB


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1


def summarise(rows: Sequence[ValidatedRow]) -> Summary:
    """Mean errors of the rows that have them."""
    time = [row.error for row in rows if row.error is not None]
    memory = [row.memory_error for row in rows if row.memory_error is not None]
    reserved = [row.reserved_error for row in rows if row.reserved_error is not None]
    device = [row.device_error for row in rows if row.device_error is not None]
    return Summary(
        n=sum(row.predicted_step_time_s is not None for row in rows),
        time_mape=mape(time),
        time_bias=bias(time),
        memory_mape=mape(memory),
        memory_bias=bias(memory),
        n_time=len(time),
        n_memory=len(memory),
        rows=len(rows),
        within_interval=mape([float(_within(row)) for row in rows if row.error is not None]),
        reserved_mape=mape(reserved),
        reserved_bias=bias(reserved),
        device_mape=mape(device),
        device_bias=bias(device),
    )


def _within(row: ValidatedRow) -> bool:
    """Whether the measured step time lies in the interval of its prediction."""
    low, high = row.predicted_interval_s or (0.0, 0.0)
    return row.step_time_s is not None and low <= row.step_time_s <= high


def mape(errors: Sequence[float]) -> float | None:
    """The mean of absolute errors, or None without any."""
    return fmean(abs(error) for error in errors) if errors else None


def bias(errors: Sequence[float]) -> float | None:
    """The mean error, or None without any."""
    return fmean(errors) if errors else None


def judge_group(name: str, rows: Sequence[ValidatedRow]) -> GroupResult:
    """Errors, order and regret of one group."""
    summary = summarise(rows)
    timed = [row for row in rows if row.error is not None]
    ran = [row for row in rows if row.step_time_s is not None and row.status is not Status.OOM]
    best = min(ran, key=lambda row: row.step_time_s or 0.0, default=None)
    chosen = choose(rows)
    return GroupResult(
        group=name,
        n=summary.n,
        time_mape=summary.time_mape,
        time_bias=summary.time_bias,
        kendall_tau=kendall_tau(
            [row.predicted_step_time_s or 0.0 for row in timed], [row.step_time_s or 0.0 for row in timed]
        ),
        regret=_regret(chosen, best),
        chosen=chosen.id if chosen else None,
        best=best.id if best else None,
    )


def choose(rows: Sequence[ValidatedRow]) -> ValidatedRow | None:
    """The row of the least predicted time among those not judged NO whose outcome is known."""
    open_rows = [
        row
        for row in rows
        if row.predicted_step_time_s is not None
        and row.verdict is not Verdict.NO
        and (row.status is Status.OOM or row.step_time_s is not None)
    ]
    return min(open_rows, key=lambda row: row.predicted_step_time_s or 0.0, default=None)


def _regret(chosen: ValidatedRow | None, best: ValidatedRow | None) -> float | None:
    if chosen is None:
        return None
    if chosen.status is Status.OOM:
        return OOM_REGRET
    assert best is not None and best.step_time_s and chosen.step_time_s, "the chosen row ran"
    return chosen.step_time_s / best.step_time_s - 1


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two orders; None where either order is empty or all ties.

    (concordant - discordant) / sqrt((pairs - ties of the first) (pairs - ties of the second)).
    Source: M. Kendall, The treatment of ties in ranking problems, Biometrika 33 (1945).
    """
    score = untied_first = untied_second = 0
    for i in range(len(first)):
        for j in range(i):
            a, b = _sign(first[i] - first[j]), _sign(second[i] - second[j])
            score += a * b
            untied_first += a * a
            untied_second += b * b
    if not untied_first or not untied_second:
        return None
    return float(score / (untied_first * untied_second) ** 0.5)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def count_verdicts(rows: Sequence[ValidatedRow]) -> dict[str, int]:
    """How many rows of each verdict ran, and how many ran out of memory."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for row in rows:
        if row.verdict is not None and row.status in (Status.OK, Status.OOM):
            counts[f"{row.verdict.lower()}_{'ran' if row.status is Status.OK else 'oom'}"] += 1
    return counts

"""The plans that a run ran by before the one that it has now, in words. `plan train --resume` keeps them.

Comparison: several plans that were predicted and run, side by side; comparison.json.

RunRecord: what a training run left in its folder, read back for the report.

A run folder holds plan.json, and as the run got that far: metrics.jsonl, summary.json, timeline.json and
comparison.json. A file that is absent is left out of the page; a file that is broken is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from planner.calibration.run_log import ran_by
from planner.foundation.decode import decode, decode_json, load_json_object, read_text, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.run_files import EARLIER
from planner.strategy.plan import Plan, load_plan, predicted_usd

STEP = re.compile(r"step-(\d+)")


def earlier_plans(run_dir: Path) -> tuple[str, ...]:
    """A sentence for each earlier plan of a run folder, the first one first."""
    found = sorted(run_dir.glob(f"{EARLIER}/step-*/plan.json"))
    told, first = [], 1
    for path in found:
        match = STEP.fullmatch(path.parent.name)
        if match is None:
            continue
        last, name = int(match[1]), path.relative_to(run_dir)
        try:
            plan = load_plan(path)
        except InputError as error:
            told.append(f"The plan of the steps up to {last} cannot be read: {error.problems[0]}")
        else:
            label = plan.strategy.degrees.label()
            told.append(f"Steps {first} to {last} ran by {label} on {plan.cluster.name} ({name}).")
        first = last + 1
    return tuple(told)


DISTINCT = 0.10
"""Measured times closer than this count as equal: their order says nothing about the planner."""


@frozen
class ComparisonRow:
    """One plan that was run: what was predicted and what was measured.

    `label` is for people; `strategy` is `Degrees.label()`. Peaks are those of the fullest rank.
    """

    label: str
    strategy: str
    predicted_step_time_s: float
    measured_step_time_s: float
    predicted_peak_memory_bytes: int
    measured_peak_memory_bytes: int
    chosen: bool = False

    @property
    def time_error(self) -> float:
        """(predicted - measured) / measured step time."""
        return self.predicted_step_time_s / self.measured_step_time_s - 1

    @property
    def memory_error(self) -> float:
        """(predicted - measured) / measured peak."""
        return self.predicted_peak_memory_bytes / self.measured_peak_memory_bytes - 1


@frozen
class Ordering:
    """How many pairs of plans that truly differ were put in the right order, and the chosen's regret.

    `regret` is the chosen plan's measured time over the best measured time, minus 1.
    """

    pairs: int
    right: int
    regret: float


def judge_order(rows: tuple[ComparisonRow, ...]) -> Ordering:
    """Compares the predicted order of `rows` with the measured one, over pairs that differ by DISTINCT."""
    pairs = [
        (fast, slow)
        for fast, slow in itertools.permutations(rows, 2)
        if slow.measured_step_time_s > fast.measured_step_time_s * (1 + DISTINCT)
    ]
    right = sum(fast.predicted_step_time_s < slow.predicted_step_time_s for fast, slow in pairs)
    chosen = next((row for row in rows if row.chosen), min(rows, key=lambda row: row.predicted_step_time_s))
    best_s = min(row.measured_step_time_s for row in rows)
    return Ordering(pairs=len(pairs), right=right, regret=chosen.measured_step_time_s / best_s - 1)


def save_comparison(rows: tuple[ComparisonRow, ...], path: Path) -> None:
    """Writes comparison.json whole or not at all."""
    write_atomic(path, "[\n" + ",\n".join(to_json(row).strip() for row in rows) + "\n]\n")


def load_comparison(path: Path) -> tuple[ComparisonRow, ...]:
    """The rows in a file. Raises InputError for a wrong file and for times or peaks that are not positive."""
    rows: tuple[ComparisonRow, ...] = decode_json(
        tuple[ComparisonRow, ...], read_text(path), source=str(path)
    )
    fields = ("predicted_step_time_s", "measured_step_time_s", "measured_peak_memory_bytes")
    problems = [
        Problem(where=f"{path}: {index}.{field}", fault=f"is {getattr(row, field)}.", legal="above 0")
        for index, row in enumerate(rows)
        for field in fields
        if getattr(row, field) <= 0
    ]
    if not rows:
        problems.append(Problem(where=str(path), fault="holds no plan."))
    if problems:
        raise InputError(*problems)
    return rows


T = TypeVar("T")


@frozen
class StepRecord:
    """One line of metrics.jsonl. `loss` and `grad_norm` are None where they were not finite.

    `timed` is false for steps that were slowed down on purpose, by warming up or by recording.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    step_time_s: float
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: tuple[int, ...] = ()
    timed: bool = True
    wall_s: float | None = None
    cost_usd: float | None = None
    expected_cost_usd: float | None = None
    predicted_cost_usd: float | None = None
    predicted_step_time_s: float | None = None


@frozen
class RunSummary:
    """What the report uses of summary.json. Everything in it is optional."""

    status: str | None = None
    last_step: int | None = None
    measured_step_time_s: float | None = None
    measured_step_time_spread: float | None = None
    timed_steps: int | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    measured_peak_memory_bytes: int | None = None
    measured_peak_memory_bytes_by_rank: tuple[int, ...] = ()
    goodput: float | None = None
    wall_s: float | None = None
    cost_usd: float | None = None
    expected_cost_usd: float | None = None
    executed_differences: tuple[str, ...] = ()
    versions: dict[str, str] | None = None


@frozen
class MeasuredEvent:
    """One entry of timeline.json: what global rank `rank` did, and when."""

    rank: int
    name: str
    start_s: float
    duration_s: float


@frozen
class RunRecord:
    """All that is known of a run. `notes` are remarks on what was left out, for the page."""

    steps: tuple[StepRecord, ...] = ()
    summary: RunSummary | None = None
    timeline: tuple[MeasuredEvent, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def timed_steps(self) -> tuple[StepRecord, ...]:
        """The steps that count for the step time."""
        return tuple(step for step in self.steps if step.timed)

    @property
    def step_time_s(self) -> float | None:
        """The measured step time: the summary's, else the median of the timed steps."""
        if self.summary is not None and self.summary.measured_step_time_s is not None:
            return self.summary.measured_step_time_s
        return _median([step.step_time_s for step in self.timed_steps])

    @property
    def tokens_per_s(self) -> float | None:
        if self.summary is not None and self.summary.tokens_per_s is not None:
            return self.summary.tokens_per_s
        return _median([step.tokens_per_s for step in self.timed_steps])

    @property
    def mfu(self) -> float | None:
        if self.summary is not None and self.summary.mfu is not None:
            return self.summary.mfu
        return _median([step.mfu for step in self.timed_steps])

    @property
    def steps_done(self) -> int:
        """Steps of the run so far, earlier launches included."""
        done = self.summary.last_step if self.summary is not None else None
        return max([done or 0, *(step.step for step in self.steps)])

    @property
    def wall_s(self) -> float | None:
        """Seconds of all launches so far. A launch that was killed wrote no summary after its steps."""
        return _largest(self.summary.wall_s if self.summary else None, *(s.wall_s for s in self.steps))

    @property
    def cost_usd(self) -> float | None:
        """Dollars so far, as the summary or the last step says; None: no price is known."""
        last = self.steps[-1].cost_usd if self.steps else None
        return _largest(self.summary.cost_usd if self.summary else None, last)

    def predicted_cost_usd(self, plan: Plan) -> float | None:
        """Dollars predicted for the steps so far: by the plans that they ran by, where the log says so."""
        last = self.steps[-1] if self.steps else None
        if last is not None and last.step == self.steps_done and last.predicted_cost_usd is not None:
            return last.predicted_cost_usd
        return predicted_usd(plan, self.steps_done)

    @property
    def expected_cost_usd(self) -> float | None:
        """Dollars that the whole run will have cost, as last expected."""
        if self.summary is not None and self.summary.expected_cost_usd is not None:
            return self.summary.expected_cost_usd
        return self.steps[-1].expected_cost_usd if self.steps else None

    @property
    def peak_memory_by_rank(self) -> tuple[int, ...]:
        """The highest peak that each rank reported."""
        if self.summary is not None and self.summary.measured_peak_memory_bytes_by_rank:
            return self.summary.measured_peak_memory_bytes_by_rank
        reports = [step.peak_memory_bytes for step in self.steps if step.peak_memory_bytes]
        return tuple(max(peaks) for peaks in zip(*reports, strict=True)) if reports else ()

    @property
    def peak_memory_bytes(self) -> int | None:
        """The measured peak of the fullest rank."""
        if self.summary is not None and self.summary.measured_peak_memory_bytes is not None:
            return self.summary.measured_peak_memory_bytes
        return max(self.peak_memory_by_rank, default=None)


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _median(values: list[float | None] | list[float]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@frozen
class ReportInput:
    """A plan, and the run and comparison that belong to it where there are some."""

    plan: Plan
    run: RunRecord | None = None
    comparison: tuple[ComparisonRow, ...] = ()


def load_report_input(path: Path) -> ReportInput:
    """What is found at `path`: a plan.json, or a run folder. Raises InputError with every fault."""
    if not path.is_dir():
        return ReportInput(plan=_load_sound_plan(path))
    if not (path / "plan.json").exists():
        raise InputError(
            Problem(
                where=str(path),
                fault="is not a run folder: it holds no plan.json.",
                legal="a plan.json, or a folder that `plan train` wrote",
            )
        )
    plan = _load_sound_plan(path / "plan.json")
    comparison = path / "comparison.json"
    return ReportInput(
        plan=plan,
        run=_load_run(path, plan),
        comparison=load_comparison(comparison) if comparison.exists() else (),
    )


def _load_sound_plan(path: Path) -> Plan:
    """The plan in a file, whose stages and timeline fit its degrees: a drawing of others would lie."""
    plan = load_plan(path)
    faults = list(_structural_faults(plan))
    if faults:
        fix = "solve again, or see `plan check`"
        raise InputError(*(Problem(where=f"{path}: {at}", fault=fault, fix=fix) for at, fault in faults))
    return plan


def _structural_faults(plan: Plan) -> Iterator[tuple[str, str]]:
    degrees, stages = plan.strategy.degrees, plan.strategy.stages
    sizes = (*degrees.grid_shape(), degrees.chunks, degrees.num_micro_batches)
    if min(sizes) < 1:
        yield "strategy", "has a degree below 1."
        return
    if len(stages) != degrees.stages:
        yield "stages", f"are {len(stages)}, but pp x chunks is {degrees.stages}."
    for index, stage in enumerate(stages):
        counts = (stage.recompute.none, stage.recompute.selective, stage.recompute.full)
        if min(counts) < 0 or sum(counts) != stage.layers:
            yield f"stages.{index}.recompute", f"counts {counts} for {stage.layers} layers."
    for index, event in enumerate(plan.timeline):
        if not 0 <= event.rank < degrees.pp or event.start_s < 0 or event.duration_s < 0:
            yield f"timeline.{index}", "is on a rank or at a time that the plan does not have."


def _load_run(folder: Path, plan: Plan) -> RunRecord | None:
    metrics, summary, timeline = (folder / n for n in ("metrics.jsonl", "summary.json", "timeline.json"))
    if not any(path.exists() for path in (metrics, summary, timeline)):
        return None
    steps, notes = load_metrics(metrics) if metrics.exists() else ((), ())
    steps, foreign = _set_apart_other_plans(steps, plan)
    if foreign:
        count = f"{foreign} step{'s' if foreign > 1 else ''}"
        notes += (f"{count} ran by an earlier plan: not timed.", *earlier_plans(folder))
    events = load_timeline(timeline) if timeline.exists() else ()
    run = RunRecord(
        steps=steps,
        summary=load_summary(summary) if summary.exists() else None,
        timeline=events,
        notes=notes,
    )
    _check_ranks(run, plan.strategy.degrees.world, folder)
    return run


def _set_apart_other_plans(steps: tuple[StepRecord, ...], plan: Plan) -> tuple[tuple[StepRecord, ...], int]:
    """The steps, those of an earlier plan without time and peaks; and how many these are.

    A run that was resumed by another plan keeps its log, whose first steps say nothing about this plan.
    """
    own = [ran_by(plan, len(step.peak_memory_bytes), step.predicted_step_time_s) for step in steps]
    kept = (
        step if mine else dataclasses.replace(step, timed=False, peak_memory_bytes=())
        for step, mine in zip(steps, own, strict=True)
    )
    return tuple(kept), own.count(False)


def load_summary(path: Path) -> RunSummary:
    """summary.json, of which the report knows a part."""
    return _decode_known(RunSummary, load_json_object(path), str(path))


def load_metrics(path: Path) -> tuple[tuple[StepRecord, ...], tuple[str, ...]]:
    """The steps of metrics.jsonl in order, and remarks.

    A last line without its newline is one that a killed run did not finish: it is left out and remarked.
    A step that a resumed run did again counts once, as it was last done.
    """
    lines = read_text(path).split(b"\n")
    unfinished = lines.pop()
    notes = ("The last line of metrics.jsonl is cut off; it was left out.",) if unfinished.strip() else ()
    records = [
        _load_step(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    by_step = {record.step: record for record in records}
    return tuple(by_step[step] for step in sorted(by_step)), notes


def _load_step(line: bytes, where: str) -> StepRecord:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(where=where, fault=f"is not JSON: {error}.")) from None
    if not isinstance(data, dict):
        raise InputError(Problem(where=where, fault=f"holds a {type(data).__name__}, not an object."))
    for key in ("loss", "grad_norm"):
        if isinstance(data.get(key), float) and not math.isfinite(data[key]):
            data[key] = None
    step = _decode_known(StepRecord, data, where)
    if step.step_time_s <= 0:
        raise InputError(
            Problem(where=f"{where}: step_time_s", fault=f"is {step.step_time_s}.", legal="above 0")
        )
    return step


def load_timeline(path: Path) -> tuple[MeasuredEvent, ...]:
    """The events of timeline.json, the earliest at 0 s."""
    events: tuple[MeasuredEvent, ...] = decode_json(
        tuple[MeasuredEvent, ...], read_text(path), source=str(path)
    )
    problems = [
        Problem(where=f"{path}: {index}.duration_s", fault=f"is {event.duration_s}.", legal="0 or more")
        for index, event in enumerate(events)
        if event.duration_s < 0
    ]
    if problems:
        raise InputError(*problems)
    first_s = min((event.start_s for event in events), default=0.0)
    return tuple(dataclasses.replace(event, start_s=event.start_s - first_s) for event in events)


def _decode_known(cls: type[T], data: dict[str, Any], where: str) -> T:
    # A run's files may say more than the report shows, so keys that it does not know are not faults.
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return decode(cls, {key: value for key, value in data.items() if key in known}, source=where)


def _check_ranks(run: RunRecord, world: int, folder: Path) -> None:
    problems = [
        Problem(
            where=f"{folder / 'timeline.json'}: {index}.rank",
            fault=f"is {event.rank}, but the plan has {world} ranks.",
            legal=f"0 to {world - 1}",
        )
        for index, event in enumerate(run.timeline)
        if not 0 <= event.rank < world
    ]
    peaks = run.summary.measured_peak_memory_bytes_by_rank if run.summary is not None else ()
    if len(peaks) not in (0, world):
        problems.append(
            Problem(
                where=f"{folder / 'summary.json'}: measured_peak_memory_bytes_by_rank",
                fault=f"has {len(peaks)} entries, but the plan has {world} ranks.",
            )
        )
    if problems:
        raise InputError(*problems)

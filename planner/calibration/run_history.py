"""The step time of a run in its steady state: a median after warm-up, with its spread.

Of n logged steps, the first w = min(max(3, n/10), n/2, 50) are left out: they compile, allocate and tune. The
median of the others is not moved by checkpoints, evaluations and stragglers, which are in under half of the
steps; the spread is their interquartile range over it. A log that marks its own timed steps is taken at its
word.

convert(): a row of runs.csv from what a run left behind, and what could not be found of it.

Later sources win: the plan or the tracker's settings, then what the user set. Figures are steady-state
(planner.calibration.run_history); the peak of memory is the largest that any step reports. Where no step
time was
logged it follows from the tokens a second:

    step time = sequence length x global batch / (tokens a second x devices it is stated for)

and where a tracker logged neither, from the times of its entries and the steps between them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from planner.calibration.plan_row import plan_columns
from planner.calibration.run_log import Logged, RunLog, raise_all, read_log
from planner.calibration.runs import READERS, MemoryKind, Run, Status, read_cell
from planner.calibration.tracker_names import (
    ALLOCATED,
    QUANTITIES,
    RESERVED,
    SETTINGS,
    STEP,
    TOKENS,
    Quantity,
    column_of,
    names_for,
    quantity_of,
)
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import nearest_names
from planner.strategy.plan import Plan

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


DESCRIBING = ("device", "nodes", "gpus_per_node", "seq_len", "global_batch", "micro_batch")
"""What a prediction cannot do without, besides the model and the degrees that are not 1."""

LAYOUT = ("tp", "pp", "zero", "recompute", "precision", "framework")
"""What is taken for granted where it is not found."""

CLOCK = "_timestamp"
COUNTERS = ("train/global_step", "trainer/global_step", "global_step", "train.global_step", "_step")
"""When W&B was told of a step, in seconds, and the step's number: a trainer's own before W&B's count of
entries."""

PRECISIONS = {"bf16": r"bf16|bfloat16", "fp8": r"fp8|float8", "fp16": r"fp16|float16|^16", "fp32": r"32"}
RECOMPUTES = {"true": "full", "1": "full", "false": "none", "0": "none", "": "none"}


@frozen
class Asked:
    """What the user says of the runs: a plan for those without one, columns, and names of figures."""

    plan: Plan | None = None
    columns: Mapping[str, Any]
    metrics: Mapping[str, str]


@frozen
class Converted:
    """A row, how its step time was found, and what a reader should hear."""

    run: Run
    step_time: Steady
    source: str
    remarks: tuple[str, ...]


def asked_of(plan: Plan | None, columns: Iterable[str], metrics: Iterable[str]) -> Asked:
    """What `--set COLUMN=VALUE` and `--metric QUANTITY=NAME` say. Raises InputError with every fault."""
    problems: list[Problem] = []
    set_columns: dict[str, Any] = {}
    for name, value in _pairs(columns, "--set", READERS, problems):
        read = read_cell(name, value, f"--set {name}")
        if isinstance(read, Problem):
            problems.append(read)
        else:
            set_columns[name] = read
    named = dict(_pairs(metrics, "--metric", QUANTITIES, problems))
    if problems:
        raise InputError(*problems)
    return Asked(plan=plan, columns=set_columns, metrics=named)


def _pairs(
    texts: Iterable[str], flag: str, legal: Iterable[str], problems: list[Problem]
) -> list[tuple[str, str]]:
    """The texts at their first `=`; unknown names are added to `problems`."""
    known, found = list(legal), []
    for text in texts:
        name, equals, value = text.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not value:
            problems.append(Problem(where=flag, fault=f"'{text[:60]}' is not NAME=VALUE."))
        elif name not in known:
            near = nearest_names(name[:60], known)
            legal_names = ", ".join(near or known)
            problems.append(Problem(where=flag, fault=f"'{name[:60]}' is not known.", legal=legal_names))
        else:
            found.append((name, value))
    return found


def convert_all(paths: Sequence[Path], asked: Asked) -> tuple[Converted, ...]:
    """The rows of all runs in order. Raises InputError with every fault of every run."""
    found: list[Converted] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            found.append(convert(read_log(path, asked.plan), asked))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return tuple(found)


def convert(log: RunLog, asked: Asked) -> Converted:
    """The row of one run. Raises InputError with every fault of it."""
    columns, remarks = _columns(log, asked)
    figures = _figures(log.steps, asked.metrics)
    problems: list[Problem] = []
    steps = [step for step in log.steps if step.values.get("timed") is not False] or list(log.steps)
    marked = any("timed" in step.values for step in log.steps)
    timed = _step_times(steps, figures, columns, log, problems)
    peaks = {
        column: _peak(log.steps, *figures[column], problems)
        for column in (ALLOCATED, RESERVED)
        if column in figures
    }
    raise_all(problems)
    assert timed is not None, "its absence is a fault"
    values, source = timed
    result = steady(values, len(log.steps) - len(steps) if marked else None)
    seen = {name: value for name, value in columns.items() if value is not None and value != ""}
    notes = [str(seen.pop("notes", "")), "the last step alone" if log.only_last else result.text]
    row: dict[str, Any] = {
        "id": log.name,
        "source": str(log.path),
        "status": Status.OK,
        STEP: result.value,
        **{name: value for name, value in peaks.items() if value is not None},
        **({"memory_kind": MemoryKind.ALLOCATED} if peaks.get(ALLOCATED) else {}),
        **seen,
        "notes": "; ".join(note for note in notes if note),
    }
    absent = _absent(row, peaks)
    run = Run(**row, where=str(log.path))
    return Converted(run=run, step_time=result, source=source, remarks=(*log.remarks, *remarks, *absent))


def _columns(log: RunLog, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is known of the job besides its figures, and remarks."""
    if log.trained and log.plan is None and not asked.columns:
        where = f"--from-run {log.path}"
        fix = "name the plan that it ran by --plan FILE, or say its columns by --set COLUMN=VALUE"
        raise InputError(Problem(where=where, fault="holds no plan.json.", fix=fix))
    if log.plan is not None:
        columns, remarks = plan_columns(log.plan)
        columns |= {} if log.compiled is None else {"compile": log.compiled}
    else:
        columns, remarks = _settings_columns(log.settings)
    return {**columns, **asked.columns}, remarks


def _settings_columns(settings: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Columns from a tracker's settings. Those that cannot be read, or contradict, are remarked."""
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}
    remarks: list[str] = []
    for path, text in settings.items():
        column = "device" if path == "gpu" else column_of(path)
        if column is None:
            continue
        value = read_cell(column, _as_cell(column, text), path)
        if isinstance(value, Problem):
            remarks.append(f"setting {value}")
        elif column in found and found[column] != value:
            remarks.append(f"setting {path} is {text}, {origins[column]} says {found[column]}: it is taken")
        else:
            found[column], origins[column] = value, path
    return found, tuple(remarks)


def _as_cell(column: str, text: str) -> str:
    """A setting as the cell of its column."""
    if column == "device":
        return _device(text)
    if column == "precision":
        named = (name for name, pattern in PRECISIONS.items() if re.search(pattern, text.lower()))
        return next(named, text)
    return RECOMPUTES.get(text.lower(), text) if column == "recompute" else text


def _device(text: str) -> str:
    """The catalog's name of a device that the driver calls so; else the text itself."""
    from planner.hardware.catalog import device_reported_as

    facts = device_reported_as(text)
    return text if facts is None else facts.name


def _figures(steps: Sequence[Logged], named: Mapping[str, str]) -> dict[str, tuple[str, Quantity]]:
    """For each column, the logged name that holds it and its quantity. Raises InputError where two might."""
    names = list(dict.fromkeys(name for step in steps for name in step.values))
    found: dict[str, tuple[str, Quantity]] = {}
    problems: list[Problem] = []
    for quantity, name in named.items():
        if name not in names:
            legal = ", ".join(nearest_names(name, names) or names[:12])
            problems.append(Problem(where="--metric", fault=f"no figure '{name[:60]}'.", legal=legal))
        found[QUANTITIES[quantity].column] = (name, QUANTITIES[quantity])
    raise_all(problems)
    for name in names:
        key = quantity_of(name)
        if key is None:
            continue
        column = QUANTITIES[key].column
        rank = QUANTITIES[key].per_device
        if column not in found or (found[column][1].per_device and not rank):
            found[column] = (name, QUANTITIES[key])
    return found


def _step_times(
    steps: Sequence[Logged],
    figures: Mapping[str, tuple[str, Quantity]],
    columns: Mapping[str, Any],
    log: RunLog,
    problems: list[Problem],
) -> tuple[list[float], str] | None:
    """Seconds of every step that logged them, and the name they were logged under; or the fault."""
    if STEP in figures:
        name, quantity = figures[STEP]
        values = _series(steps, name, problems)
        seconds = [quantity.unit / v if quantity.per_unit else quantity.unit * v for v in values]
        if seconds or problems:
            return seconds, name
    if TOKENS in figures:
        name, quantity = figures[TOKENS]
        size = _tokens_per_step(columns, name, quantity, problems)
        values = _series(steps, name, problems)
        if size is None or values or problems:
            return [(size or 0.0) / value for value in values], name
    clocked = _by_the_clock(steps)
    if clocked:
        return clocked, "the tracker's clock"
    logged = [name for step in log.steps for name in step.values]
    shown = ", ".join(list(dict.fromkeys(logged))[:12])
    problems.append(
        Problem(
            where=f"--from-run {log.path}",
            fault=f"has no step time and no tokens a second among its figures: {shown}.",
            legal=names_for((STEP, TOKENS)),
            fix="name it, as in --metric step_time_s=NAME, step_time_ms=NAME or tokens_per_s=NAME",
        )
    )
    return None


def _by_the_clock(steps: Sequence[Logged]) -> list[float]:
    """Seconds a step between entries of a tracker that stamps each with its time (W&B; seconds): what a
    trainer that logs no rate leaves."""
    names = {name for step in steps for name in step.values}
    counter = next((name for name in COUNTERS if name in names), COUNTERS[-1])
    stamps = [
        (time_s, number)
        for step in steps
        if (time_s := _number(step.values.get(CLOCK))) is not None
        and (number := _number(step.values.get(counter))) is not None
    ]
    return [
        (later_s - time_s) / (later - number)
        for (time_s, number), (later_s, later) in pairwise(stamps)
        if later > number and later_s > time_s
    ]


def _tokens_per_step(
    columns: Mapping[str, Any], name: str, quantity: Quantity, problems: list[Problem]
) -> float | None:
    """Tokens of a step for each device that a rate is stated for."""
    needed = ["seq_len", "global_batch"] + ["nodes", "gpus_per_node"] * quantity.per_device
    unknown = [column for column in needed if not columns.get(column)]
    if unknown:
        problems.append(
            Problem(
                where="--from-run",
                fault=f"the step time follows from {name} only with {', '.join(unknown)}.",
                fix="name them: " + " ".join(f"--set {column}=N" for column in unknown),
            )
        )
        return None
    devices = columns["nodes"] * columns["gpus_per_node"] if quantity.per_device else 1
    return float(columns["seq_len"] * columns["global_batch"] / devices)


def _series(steps: Sequence[Logged], name: str, problems: list[Problem]) -> list[float]:
    """The values of a figure in order; steps without it are passed over, wrong ones are faults."""
    values = []
    for step in steps:
        raw = step.values.get(name)
        if raw is None or raw == "":
            continue
        value = _number(raw)
        if value is None or not 0 < value < math.inf:
            where = f"{step.where}: {name}"
            problems.append(Problem(where=where, fault=f"is {str(raw)[:40]}.", legal="a number above 0"))
        else:
            values.append(value)
    return values


def _number(raw: Any) -> float | None:
    """A figure as a number; of a list (one a rank) the largest; NaN and texts are none."""
    if isinstance(raw, list):
        each = [_number(item) for item in raw]
        return max((value for value in each if value is not None), default=None)
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        return None
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(value) else value


def _peak(steps: Sequence[Logged], name: str, quantity: Quantity, problems: list[Problem]) -> float | None:
    """The largest peak in GiB that any step reports."""
    kept = [step for step in steps if step.values.get(name) not in ([], None)]
    values = _series(kept, name, problems)
    return max(values) * quantity.unit if values else None


def _absent(row: Mapping[str, Any], peaks: Mapping[str, float | None]) -> tuple[str, ...]:
    """What was not found, and how to name it."""
    described = [name for name in DESCRIBING if not row.get(name)]
    if not row.get("model") and not (row.get("layers") and row.get("hidden")):
        described.insert(0, "model (or layers, hidden, heads, ffn, vocab)")
    remarks = []
    if described:
        known = "; ".join(
            f"{name}: {', '.join(SETTINGS[name][:5])}" for name in described if name in SETTINGS
        )
        remarks.append(
            f"not found, and no prediction without: {', '.join(described)}. Name each with --set "
            f"COLUMN=VALUE, or configure it under such names as {known}"
        )
    granted = [name for name in LAYOUT if name not in row]
    if granted:
        remarks.append(f"not found, the usual is taken: {', '.join(granted)}. Say otherwise with --set")
    if not any(peaks.values()):
        remarks.append(f"no peak of memory was found. Name it with --metric; read: {names_for((ALLOCATED,))}")
    return tuple(remarks)

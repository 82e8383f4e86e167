"""Scalars of a YAML file of nested mappings, by their path: what W&B's config.yaml needs, and no more.

W&B writes each setting as a mapping with `value` (and `desc`, and its own under `_wandb`). Lists, flow
collections and texts over several lines are left out: nothing that a plan needs is one.

Which steps of a log ran by the plan that lies beside it: a run may go on under another plan.

RunLog: what a run left behind, read from its files, before anything is made of it.

a folder with metrics.jsonl     of `plan train`: its metrics and its plan
a folder with run-ID.wandb, or  of W&B: its history, settings and machine
that file
a folder with wandb-summary     of W&B without that file: settings and the last step's figures
.json
FILE.jsonl, FILE.json           one step a line, or a list of steps; plan.json or config.yaml beside it
FILE.csv                        W&B's panel as CSV: a column a figure, `RUN - NAME` or plain names
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.calibration.wandb_file import read_wandb_file
from planner.foundation.decode import load_json_object, read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.strategy.plan import Plan, load_plan

_LINE = re.compile(r"^(?P<indent> *)(?P<key>\"[^\"]*\"|'[^']*'|[^\s:#\-][^:]*?) *:(?: +(?P<value>.*))?$")
WRAPPERS = ("value", "desc")
"""Keys of W&B's own around a setting."""

NOTHING = ("null", "~", "none", "{}", "[]")
LARGER = ("{", "[", "&", "*", "!")
"""How values begin that are no scalars of their own."""


def read_flat_yaml(path: Path) -> dict[str, str]:
    """The scalars of a YAML file by dotted path, W&B's own keys left out. Raises InputError."""
    try:
        text = read_text(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(Problem(where=str(path), fault=f"is not text: {error}.")) from None
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    folded = -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if not line.strip() or (folded >= 0 and indent > folded):
            continue
        folded = -1
        match = _LINE.match(line)
        if match is None:
            continue
        above = [entry for entry in above if entry[0] < indent]
        key, value = match["key"].strip("\"'"), _scalar(match["value"] or "")
        if value[:1] in ("|", ">"):
            folded = indent
            continue
        parts = [part for _, part in above if part not in WRAPPERS]
        above.append((indent, key))
        if value and not value.startswith(LARGER) and key != "desc" and "_wandb" not in parts:
            path_text = ".".join([*parts, *([] if key in WRAPPERS else [key])])
            if value.lower() not in NOTHING:
                found[path_text] = value
    return found


def _scalar(text: str) -> str:
    """A value without its quotes and its comment."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        return text[1:].partition(text[0])[0]
    return re.sub(r"\s+#.*$", "", "" if text.startswith("#") else text)


def ran_by(plan: Plan, ranks: int, predicted_step_time_s: float | None) -> bool:
    """Whether a step that reports the memory of so many ranks (0: of none) may have run by `plan`.

    Each line of a log says what its own plan predicted; of lines that do not, the ranks alone tell.
    """
    if ranks not in (0, plan.strategy.degrees.world):
        return False
    own_s = plan.estimate.step_time_s
    return predicted_step_time_s is None or math.isclose(predicted_step_time_s, own_s, rel_tol=1e-9)


WANDB = ".wandb"
SUMMARY, METADATA, CONFIG = "wandb-summary.json", "wandb-metadata.json", "config.yaml"
MAX_FAULTS = 20
BANDS = re.compile(r"__(min|max)$", re.IGNORECASE)
TABLE_OF_RUNS = {"name", "state", "runtime"}
"""Columns of W&B's table of runs, which holds last values and no history."""


@frozen
class Logged:
    """One logged step: where it stands, and its figures as they were written."""

    where: str
    values: Mapping[str, Any]


@frozen
class RunLog:
    """A run's steps, its settings by path, the plan that it ran, and remarks on what was left out.

    `compiled` is whether its blocks were, where the run says so; `only_last` where the steps are the last one
    alone; `trained` where it is a folder of `plan train`.
    """

    path: Path
    name: str
    steps: tuple[Logged, ...]
    settings: Mapping[str, str]
    plan: Plan | None = None
    remarks: tuple[str, ...] = ()
    compiled: bool | None = None
    only_last: bool = False
    trained: bool = False


def read_log(path: Path, plan: Plan | None) -> RunLog:
    """What is found at `path`. `plan` stands in where none lies beside it. Raises InputError."""
    if path.is_dir():
        return _read_folder(path, plan)
    kind = path.suffix.lower()
    remarks: tuple[str, ...] = ()
    if kind == WANDB:
        return _read_tracked(path, path.parent / "files", [path], plan)
    if kind == ".csv":
        steps = _csv_steps(path)
    elif kind in (".jsonl", ".ndjson", ".json"):
        steps, remarks = _json_steps(path)
    elif path.exists():
        raise InputError(_unknown_kind(path))
    else:
        read_text(path)  # raises: there is no such file
        raise AssertionError
    beside, config = path.parent / "plan.json", path.parent / CONFIG
    if plan is None and beside.exists() and path.name == "metrics.jsonl":
        plan = load_plan(beside)
    settings = read_flat_yaml(config) if config.exists() else {}
    return RunLog(path=path, name=_name(path), steps=steps, settings=settings, plan=plan, remarks=remarks)


def _name(path: Path) -> str:
    return path.stem if path.stem not in ("metrics", "history") else path.absolute().parent.name


def _unknown_kind(path: Path) -> Problem:
    return Problem(
        where=f"--from-run {path}",
        fault="is neither a history nor a run's folder.",
        legal="a folder of `plan train` or of W&B, a .jsonl, .json or .csv history",
    )


def _read_folder(path: Path, plan: Plan | None) -> RunLog:
    if (path / "metrics.jsonl").exists():
        return _read_trained(path, plan)
    files = path / "files" if (path / "files").is_dir() else path
    own = sorted({*path.glob(f"run-*{WANDB}"), *files.parent.glob(f"run-*{WANDB}")})
    if own or (files / SUMMARY).exists():
        return _read_tracked(path, files, own, plan)
    raise InputError(
        Problem(
            where=f"--from-run {path}",
            fault=f"holds neither metrics.jsonl (plan train) nor run-ID{WANDB} or {SUMMARY} (W&B).",
            legal="a folder of `plan train` or of W&B, or the history's own file",
        )
    )


def _read_trained(path: Path, plan: Plan | None) -> RunLog:
    """A folder of `plan train`. All of its files are read before any fault is raised."""
    problems: list[Problem] = []
    steps: tuple[Logged, ...] = ()
    remarks: tuple[str, ...] = ()
    summary: Mapping[str, Any] = {}
    own = path / "plan.json"
    try:
        plan = load_plan(own) if own.exists() else plan
    except InputError as error:
        problems.extend(error.problems)
    try:
        steps, remarks = _json_steps(path / "metrics.jsonl")
    except InputError as error:
        problems.extend(error.problems)
    try:
        summary = load_json_object(path / "summary.json") if (path / "summary.json").exists() else {}
    except InputError as error:
        problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    kept, left_out = _of_this_plan(steps, plan, path / "metrics.jsonl")
    return RunLog(
        path=path,
        name=path.absolute().name,
        steps=kept,
        settings={},
        plan=plan,
        remarks=(*remarks, *left_out, *_differences(summary)),
        compiled=_compiled(summary),
        trained=True,
    )


def _compiled(summary: Mapping[str, Any]) -> bool | None:
    """Whether the run's blocks were compiled, where its summary says so."""
    executed = summary.get("executed")
    found = executed.get("compiled") if isinstance(executed, dict) else None
    return found if isinstance(found, bool) else None


def _differences(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the summary says that the run was not as its plan."""
    found = summary.get("executed_differences")
    each = found if isinstance(found, list) else []
    return tuple(f"the run differs from its plan: {str(text)[:200]}" for text in each)


def _of_this_plan(
    steps: tuple[Logged, ...], plan: Plan | None, path: Path
) -> tuple[tuple[Logged, ...], tuple[str, ...]]:
    """The steps as they were last done, without those of an earlier plan. Raises InputError where all are."""
    last = {_number(step, index): step for index, step in enumerate(steps)}
    own = list(last.values())
    if plan is not None:
        own = [step for step in own if ran_by(plan, _ranks(step), _predicted_s(step))]
    foreign = len(last) - len(own)
    if not own:
        fault = "has no step that ran by the plan.json beside it: all ran by an earlier plan."
        fix = "name metrics.jsonl itself, and by --plan the plan of its steps (see the folder earlier/)"
        raise InputError(Problem(where=str(path), fault=fault, fix=fix))
    remark = f"{foreign} steps ran by an earlier plan: they are left out"
    return tuple(own), (remark,) if foreign else ()


def _number(step: Logged, index: int) -> tuple[bool, int]:
    """The step's number; its place where it has none."""
    number = step.values.get("step")
    return (True, number) if isinstance(number, int) else (False, index)


def _ranks(step: Logged) -> int:
    """How many ranks a step reports the memory of."""
    peaks = step.values.get("peak_memory_bytes")
    return len(peaks) if isinstance(peaks, list) else 0


def _predicted_s(step: Logged) -> float | None:
    """The step time that the step's plan predicted, where it says so."""
    predicted = step.values.get("predicted_step_time_s")
    return predicted if isinstance(predicted, float) else None


def _read_tracked(path: Path, files: Path, own: list[Path], plan: Plan | None) -> RunLog:
    """A run of W&B: settings, the machine, and each logged step; without the run's `own` file, or where it
    has none, each figure as it was last logged."""
    if len(own) > 1:
        names = ", ".join(file.name for file in own[:5])
        fault = f"holds {len(own)} runs: {names}."
        raise InputError(
            Problem(where=f"--from-run {path}", fault=fault, legal="one run", fix="name its file")
        )
    settings = read_flat_yaml(files / CONFIG) if (files / CONFIG).exists() else {}
    metadata = load_json_object(files / METADATA) if (files / METADATA).exists() else {}
    machine = {key: str(metadata[key]) for key in ("gpu", "gpu_count") if metadata.get(key)}
    steps: tuple[Logged, ...] = ()
    remarks: tuple[str, ...] = ()
    for file in own:
        found = read_wandb_file(file)
        settings |= found.settings
        steps = tuple(Logged(where=f"{file}: {n}", values=values) for n, values in enumerate(found.steps))
        remarks = (f"{file}: cut off or damaged behind its first {len(steps)} steps",) * found.cut_off
    only_last = not steps
    if only_last:
        if not (files / SUMMARY).exists():
            raise InputError(
                Problem(where=str(own[0]), fault="holds no step.", legal="a run that logged figures")
            )
        steps = (Logged(where=str(files / SUMMARY), values=load_json_object(files / SUMMARY)),)
        remarks = (*remarks, f"no history (run-ID{WANDB}) beside it: each figure is the last one")
    if not settings:
        remarks = (*remarks, f"{files / CONFIG} was not found: no settings")
    return RunLog(
        path=path,
        name=path.absolute().name if path.is_dir() else path.stem,
        steps=steps,
        settings={**machine, **settings},
        plan=plan,
        remarks=remarks,
        only_last=only_last,
    )


def _json_steps(path: Path) -> tuple[tuple[Logged, ...], tuple[str, ...]]:
    """Steps of a file with an object a line, or with one list of objects. Lists every faulty line.

    A last line without its newline that cannot be read is one that a killed run did not finish.
    """
    text = read_text(path)
    if text.lstrip()[:1] == b"[":
        return _json_list(path, text), ()
    *lines, last = text.split(b"\n")
    remarks: tuple[str, ...] = ()
    if last.strip() and _object(last) is None:
        remarks = (f"{path}: the last line is cut off and was left out",)
    elif last.strip():
        lines.append(last)
    steps, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, values = f"{path}: line {number}", _object(line)
        if values is None:
            problems.append(Problem(where=where, fault="is not a JSON object of a step."))
        else:
            steps.append(Logged(where=where, values=values))
    _raise(problems)
    if not steps:
        raise InputError(Problem(where=str(path), fault="holds no step.", legal="a JSON object a step"))
    return tuple(steps), remarks


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_list(path: Path, text: bytes) -> tuple[Logged, ...]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(where=str(path), fault=f"is not JSON: {error}.")) from None
    _raise(
        Problem(where=f"{path}: {index}", fault=f"is a {type(value).__name__}, not an object of a step.")
        for index, value in enumerate(values)
        if not isinstance(value, dict)
    )
    if not values:
        raise InputError(Problem(where=str(path), fault="holds no step.", legal="a JSON object a step"))
    return tuple(Logged(where=f"{path}: {index}", values=value) for index, value in enumerate(values))


def _csv_steps(path: Path) -> tuple[Logged, ...]:
    """Steps of a CSV file. W&B writes `RUN - NAME` for each run of a panel, and bands of what it drew."""
    try:
        text = read_text(path).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(Problem(where=str(path), fault=f"is not a CSV file: {error}.")) from None
    header = [name.strip() for name in rows[0]] if rows else []
    if len(rows) < 2 or len(header) < 1:
        legal = "a header, and a row a step"
        raise InputError(Problem(where=str(path), fault="holds no step.", legal=legal))
    if {name.lower() for name in header} >= TABLE_OF_RUNS:
        fault = "is a table of runs, one a row, with each figure's last value."
        fix = "export the history of one run: the panel's `Export CSV`, or run.history()"
        raise InputError(Problem(where=str(path), fault=fault, fix=fix))
    names = _own_names(path, header)
    return tuple(
        Logged(
            where=f"{path}: line {number}",
            values={name: cell for name, cell in zip(names, row, strict=False) if name and cell.strip()},
        )
        for number, row in enumerate(rows[1:], 2)
    )


def _own_names(path: Path, header: list[str]) -> list[str]:
    """The figures' names without their run's; "" for the bands. Raises InputError for several runs."""
    runs = list(dict.fromkeys(name.partition(" - ")[0] for name in header if " - " in name))
    if len(runs) > 1:
        raise InputError(
            Problem(
                where=str(path),
                fault=f"holds {len(runs)} runs: {', '.join(run[:40] for run in runs[:5])}.",
                legal="one run",
                fix="hide the others in the panel and export it again",
            )
        )
    return ["" if BANDS.search(name) else name.partition(" - ")[2] or name for name in header]


def _raise(problems: list[Problem] | Iterator[Problem]) -> None:
    """Raises InputError with the first faults and the number of the others, where there are any."""
    found = list(problems)
    if len(found) > MAX_FAULTS:
        rest = Problem(where="and", fault=f"{len(found) - MAX_FAULTS} more faults like these.")
        found = [*found[:MAX_FAULTS], rest]
    if found:
        raise InputError(*found)


def raise_all(problems: list[Problem]) -> None:
    """Raises InputError with the faults, where there are any."""
    _raise(problems)

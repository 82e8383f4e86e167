"""Export: the files of an exported plan, and writing them whole or not at all.

What is said of a plan beside its configuration: the prediction, what the engine decides, what is left.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from planner.export.settings import workload_words
from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_count, format_seconds
from planner.strategy.plan import Plan

MARK = "README.txt"
"""A folder that holds this file and only names of an export is one of ours, and may be written again."""


@frozen
class ExportFile:
    """One file of an export: its name in the folder and its text. Scripts may be run."""

    name: str
    text: str

    @property
    def script(self) -> bool:
        return self.name.endswith((".sh", ".sbatch"))


@frozen
class Export:
    """What a plan is for another program: files, how they are started, and what they leave to it.

    `decides` is what of the plan the engine decides by itself, `yours` what the plan does not say and the
    user fills in.
    """

    target: str
    release: str
    files: tuple[ExportFile, ...]
    start: str
    decides: tuple[str, ...] = ()
    yours: tuple[str, ...] = ()


def write_export(export: Export, files: tuple[ExportFile, ...], folder: Path) -> None:
    """Writes the files into a new or empty folder, or over an earlier export. Raises InputError otherwise."""
    _check_folder(folder, {file.name for file in files})
    for file in sorted(
        files, key=lambda each: each.name == MARK
    ):  # the mark last: it says that all are there
        path = folder / file.name
        write_atomic(path, file.text)
        if file.script:
            path.chmod(0o755)


def _check_folder(folder: Path, names: set[str]) -> None:
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            fault = "is a file, and an export is a folder of several."
            raise InputError(Problem(where=f"-o {folder}", fault=fault, fix="name a new folder"))
        there = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(Problem(where=f"-o {folder}", fault=f"cannot be read: {error.strerror}.")) from None
    others = [name for name in there if name not in names]
    if there and (others or MARK not in there):
        shown = ", ".join((others or there)[:5])
        raise InputError(
            Problem(
                where=f"-o {folder}",
                fault=f"is a folder that holds other things ({shown}), which an export never writes over.",
                legal="a new or empty folder, or that of an earlier export of the same kind",
                fix="name another folder",
            )
        )


COLUMNS = 100


def predictions(plan: Plan) -> list[str]:
    """The plan and its figures, a line each."""
    estimate, (low, high) = plan.estimate, plan.estimate.step_time_interval_s
    software = "any engine, priced as the native runtime" if plan.engine is None else str(plan.engine)
    lines = [
        f"{plan.model.name} ({format_count(plan.model.params_total)} parameters) on {plan.cluster.name}: "
        f"{workload_words(plan.workload)}",
        f"strategy   {plan.strategy.degrees.label()}, planned for {software}",
        f"step time  {format_seconds(estimate.step_time_s)} "
        f"({format_seconds(low)} to {format_seconds(high)}), {estimate.tokens_per_s:,.0f} tokens/s",
        f"memory     {format_bytes(estimate.peak_memory_bytes)} of "
        f"{format_bytes(estimate.memory_limit_bytes)} a device: {estimate.verdict}",
    ]
    if estimate.days is not None:
        lines.append(f"run        {estimate.days:.4g} days{_at_goodput(plan)}")
    return lines


def _at_goodput(plan: Plan) -> str:
    job = plan.estimate.job
    if job is None or job.days is None:
        return " of steps alone: what stops a job was not said"
    return f" of steps, {job.days:.4g} at a goodput of {job.goodput:.1%}"


def priced_elsewhere(plan: Plan, engine: str) -> tuple[str, ...]:
    """A remark where the figures are of other software than what runs."""
    if plan.engine is not None and str(plan.engine) == engine:
        return ()
    made = "no engine in particular" if plan.engine is None else f"the engine {plan.engine}"
    return (
        f"the figures are of {made}: `plan solve --engine {engine}` (or estimate) prices {engine}'s software",
    )


def rotary(plan: Plan) -> tuple[str, ...]:
    """Rotary frequencies change no cost, and the catalog has no stretch of them."""
    if not plan.model.rotary:
        return ()
    return (
        f"rotary base {plan.model.rope_theta:g} as in the plan's model: to go on with published weights, "
        "plan with their own config.json (--model FILE)",
    )


def node_order(plan: Plan) -> tuple[str, ...]:
    """In which order nodes of several kinds must be started."""
    groups = plan.cluster.groups
    if len(groups) == 1:
        return ()
    order = plan.strategy.degrees.device_order or tuple(range(len(groups)))
    listed = ", then ".join(f"{groups[index].nodes} of {groups[index].device.name}" for index in order)
    return (f"nodes must be numbered in the order of the plan's groups: {listed}",)


def comment(lines: list[str], mark: str = "#") -> str:
    """Lines as comments, long ones wrapped."""
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, COLUMNS) or [""]]
    return "".join(f"{mark} {line}".rstrip() + "\n" for line in wrapped)


def readme(plan: Plan, export: Export) -> ExportFile:
    """The note that goes with the files."""
    sections = [
        f"A plan of shardwise for {export.release}.",
        "\n".join(predictions(plan)),
        f"Start it with:\n\n  {export.start}",
        _listed("Decided by the engine, not by the plan:", export.decides),
        _listed("Not in the plan, for you to say:", export.yours),
        _listed("Not modelled in the figures:", plan.not_modelled),
    ]
    return ExportFile(name=MARK, text="\n\n".join(section for section in sections if section) + "\n")


def _listed(title: str, items: tuple[str, ...]) -> str:
    if not items:
        return ""
    wrapped = [
        textwrap.fill(item, COLUMNS, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for item in items
    ]
    return "\n".join([title, *wrapped])

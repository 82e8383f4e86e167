"""`plan diff`: two plans side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option
from planner.commands.shared.text import pairs, print_json, table

if TYPE_CHECKING:
    from planner.advice.plan_diff import Amount, Difference, PlanDiff
    from planner.strategy.plan import Plan

COLUMNS = 100
WIDEST = 40
"""Columns of one value in the tables; longer ones are cut."""


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@json_option
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Show where two plans differ, which is faster, and mostly due to what.

    Inputs, choices, stages, step time by cause, memory by tenant, cost, certificate, as the files have them.
    """
    from planner.advice.plan_diff import plan_diff
    from planner.foundation.decode import encode
    from planner.strategy.plan import load_plan

    plans = [load_plan(path) for path in (first, second)]
    found = plan_diff(plans[0], plans[1])
    if as_json:
        print_json({"a": str(first), "b": str(second), **encode(found)})
    else:
        click.echo(diff_text(found, plans, (str(first), str(second))))


def diff_text(found: PlanDiff, plans: list[Plan], names: tuple[str, str]) -> str:
    """The statement first, then what differs, section by section."""
    labels = [plan.strategy.degrees.label() for plan in plans]
    sides = [f"{name}: {label}" for name, label in zip(names, labels, strict=True)]
    heading = pairs(zip(("A", "B"), sides, strict=True), COLUMNS)
    sections = [
        heading,
        textwrap.fill(found.statement, COLUMNS),
        _differences("inputs", found.inputs) or "The inputs are the same.",
        _differences("choices", found.strategy) or "The degrees are the same.",
        _differences("stages (layers, none/sel/full)", found.stages),
        _amounts("step time by cause", found.causes, _seconds),
        _amounts("memory of the fullest stage", found.memory, _bytes),
        _differences("figures", found.figures),
        _differences("certificate", found.certificate),
    ]
    return "\n\n".join(section for section in sections if section)


def _differences(title: str, found: tuple[Difference, ...]) -> str:
    if not found:
        return ""
    rows = [(each.path, _value(each.first), _value(each.second)) for each in found]
    return table((title, "A", "B"), rows, numbers=())


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list) and all(isinstance(each, float) for each in value):
        return " to ".join(f"{each:.4g}" for each in value)
    text = str(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _amounts(title: str, found: tuple[Amount, ...], shown: Any) -> str:
    rows = [
        (
            each.name.removesuffix("_s").removesuffix("_bytes").replace("_", " "),
            shown(each.first),
            shown(each.second),
            ("+" if each.difference > 0 else "-" if each.difference < 0 else "")
            + shown(abs(each.difference)),
        )
        for each in found
        if each.first or each.second
    ]
    return table((title, "A", "B", "B - A"), rows, numbers=(1, 2, 3))


def _seconds(value: float) -> str:
    from planner.foundation.units import format_seconds

    return format_seconds(value) if value else "0"


def _bytes(value: float) -> str:
    from planner.foundation.units import format_bytes

    return ("-" if value < 0 else "") + format_bytes(abs(value)) if value else "0"

"""`plan calibrate`: the constants of the cost model, fitted to measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.options import json_option

if TYPE_CHECKING:
    from planner.calibration.calibrate import Calibration
    from planner.calibration.fit import Fit


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUNS...")
@click.option(
    "-o", "output", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE",
    help="The profile to write.",
)  # fmt: skip
@click.option(
    "--profile", "base", type=click.Path(path_type=Path), metavar="FILE",
    help="A profile to start from: its samples stay, its constants are fitted again.",
)  # fmt: skip
@json_option
def calibrate(runs: tuple[Path, ...], output: Path, base: Path | None, as_json: bool) -> None:
    """Fit the constants of the cost model to measured runs, and write a profile.

    RUNS are CSV files with one run a row; rows may be partial. Constants that the runs cannot determine stay
    at their prior and are named. Judge the profile on other runs: `plan validate OTHER.csv --profile FILE`.
    """
    from planner.calibration.calibrate import calibrate as fit_all
    from planner.codec import to_json, write_atomic
    from planner.commands.text import print_json
    from planner.profile import load_profile
    from planner.runs.table import read_runs

    table = read_runs(runs)
    for warning in table.warnings:
        click.echo(f"warning: {warning}", err=True)
    result = fit_all(
        table.runs,
        name=output.stem,
        base=load_profile(base) if base else None,
        progress=lambda text: click.echo(text, err=True),
    )
    write_atomic(output, to_json(result.profile))
    if as_json:
        print_json(_document(result, output))
    else:
        click.echo(_text(result, output))


def _document(result: Calibration, output: Path) -> dict[str, Any]:
    return {
        "profile": str(output),
        "unused": result.unused,
        "fits": [
            {
                "device": fit.scope.device,
                "framework": fit.scope.framework,
                "engine": fit.scope.engine,
                "runs": len(fit.runs),
                "time_mape": _mean_abs(fit.errors),
                "time_bias": _mean(fit.errors),
                "left_out_mape": _mean_abs(fit.left_out),
                "left_out_bias": _mean(fit.left_out),
                "constants": [
                    {
                        "name": unknown.name,
                        "kernels": unknown.kernels,
                        "value": fit.values[index] if fit.determined(index) else unknown.start,
                        "prior": unknown.start,
                        "uncertainty_left": fit.uncertainty[index],
                        "determined": fit.determined(index),
                    }
                    for index, unknown in enumerate(fit.unknowns)
                ],
            }
            for fit in result.fits
        ],
        "memory": [
            {
                "framework": fit.framework,
                "runs": len(fit.runs),
                "left_out_mape": _mean_abs(fit.peak_errors) if fit.peak_errors else None,
                "constants": [
                    {"name": c.name, "kernels": c.kernels, "value": c.value, "origin": c.origin}
                    for c in fit.constants
                ],
            }
            for fit in result.memory
        ],
    }


def _text(result: Calibration, output: Path) -> str:
    from planner.commands.text import table

    rows = [
        (
            fit.scope.label,
            len(fit.runs),
            f"{_mean_abs(fit.errors):.1%}",
            f"{_mean(fit.errors):+.1%}",
            f"{_mean_abs(fit.left_out):.1%}",
            f"{_mean(fit.left_out):+.1%}",
        )
        for fit in result.fits
    ]
    header = ("fitted to", "runs", "mean error", "bias", "left out", "bias")
    parts = [table(header, rows, numbers={1, 2, 3, 4, 5})]
    parts.append("left out: every group of runs, predicted from the other groups alone")
    parts += [_constants_text(fit) for fit in result.fits[:1]]
    if result.memory:
        parts.append(_memory_text(result))
    if result.unused:
        listed = ", ".join(f"{rule} {count}" for rule, count in result.unused.items())
        parts.append(f"rows that were not used: {listed}")
    parts.append(f"profile  {output}")
    return "\n\n".join(parts)


def _memory_text(result: Calibration) -> str:
    from planner.commands.text import table

    rows = [
        (
            fit.framework,
            len(fit.runs),
            f"{_mean_abs(fit.peak_errors):.1%}" if fit.peak_errors else "-",
            ", ".join(f"{c.name} {c.value:.3g}" for c in fit.constants if not c.kernels),
        )
        for fit in result.memory
    ]
    return table(("memory of", "runs", "left-out peaks", "constants"), rows, numbers={1, 2})


def _constants_text(fit: Fit) -> str:
    from planner.commands.text import table, wrapped_table
    from planner.cost.physics import PRIORS

    rows, unknown = [], []
    for index, constant in enumerate(fit.unknowns):
        if fit.determined(index):
            value, start = fit.values[index], constant.start
            rows.append((constant.label, f"{value:.4g}", f"{start:.4g}", f"{fit.uncertainty[index]:.0%}"))
        else:
            unknown.append(constant.label)
    shown = table(("constant", "fitted", "prior", "uncertainty left"), rows, numbers={1, 2, 3})
    names = dict.fromkeys(u.name for u in fit.unknowns)
    meanings = wrapped_table(("constant", "meaning"), [(name, PRIORS[name].meaning) for name in names])
    stayed = f"not determined by these runs, left at their prior: {', '.join(unknown) or 'none'}"
    return f"{fit.scope.label}\n{shown}\n{stayed}\n\n{meanings}"


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _mean_abs(values: tuple[float, ...]) -> float:
    return sum(abs(value) for value in values) / len(values)

"""`plan calibrate`: the constants of the cost model, fitted to measured runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.calibration.calibrate import Calibration
    from planner.calibration.fit import Fit


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUNS...]")
@click.option(
    "-o", "output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The profile to write. With --from-run and without RUNS: the table to write (default: stdout).",
)  # fmt: skip
@click.option(
    "--profile", "base", type=click.Path(path_type=Path), metavar="FILE",
    help="A profile to start from: its samples stay, its constants are fitted again.",
)  # fmt: skip
@click.option(
    "--from-run", "from_run", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help="A run of your own, made a row of a table of runs: a folder of `plan train`, its metrics.jsonl, a "
    "history that W&B exported (CSV, or JSON lines of run.history()), or a local W&B folder. Repeatable.",
)  # fmt: skip
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The plan of runs that have none beside them.",
)  # fmt: skip
@click.option(
    "--set", "columns", multiple=True, metavar="COLUMN=VALUE",
    help="A column of the runs, such as device=h100-sxm-80gb or tp=8, where no file says it or one is wrong.",
)  # fmt: skip
@click.option(
    "--metric", "metrics", multiple=True, metavar="QUANTITY=NAME",
    help="The name a run logs a quantity under: step_time_s, step_time_ms, steps_per_s, tokens_per_s, "
    "tokens_per_s_per_device; allocated_ and reserved_ with bytes, gib or gb.",
)  # fmt: skip
@json_option
def calibrate(
    runs: tuple[Path, ...],
    output: Path | None,
    base: Path | None,
    from_run: tuple[Path, ...],
    plan_file: Path | None,
    columns: tuple[str, ...],
    metrics: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fit the constants of the cost model to measured runs, and write a profile.

    RUNS are CSV files with one run a row; rows may be partial. Constants that the runs cannot determine stay
    at their prior and are named. Judge the profile on other runs: `plan validate OTHER.csv --profile FILE`.

    --from-run makes rows of your own runs' histories. Without RUNS, that is all: the table is written.
    """
    from planner.calibration.calibrate import calibrate as fit_all
    from planner.calibration.runs import read_runs
    from planner.commands.accuracy.from_run import converted_runs, write_table
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import to_json, write_atomic
    from planner.profile.profile import load_profile

    _check(runs, output, base, from_run, (plan_file, columns, metrics))
    own = converted_runs(from_run, plan_file, columns, metrics)
    if not runs:
        write_table(own, output, as_json=as_json)
        return
    assert output is not None, "checked above"
    table = read_runs(runs)
    for warning in table.warnings:
        click.echo(f"warning: {warning}", err=True)
    result = fit_all(
        [*table.runs, *(each.run for each in own)],
        name=output.stem,
        base=load_profile(base) if base else None,
        progress=lambda text: click.echo(text, err=True),
    )
    write_atomic(output, to_json(result.profile))
    if as_json:
        print_json(_document(result, output))
    else:
        click.echo(_text(result, output))


def _check(
    runs: tuple[Path, ...],
    output: Path | None,
    base: Path | None,
    from_run: tuple[Path, ...],
    of_runs: tuple[Path | None, tuple[str, ...], tuple[str, ...]],
) -> None:
    """Raises InputError where the options do not go together; lists every fault."""
    from planner.foundation.errors import InputError, Problem

    problems = []
    if not runs and not from_run:
        legal = "tables of runs, --from-run PATH, or both"
        problems.append(Problem(where="RUNS", fault="is missing, and so is --from-run.", legal=legal))
    if runs and output is None:
        problems.append(Problem(where="-o", fault="is missing: where the profile is to be written."))
    if from_run and not runs and output is not None and output.suffix.lower() == ".json":
        fault = f"is {output}, but without RUNS --from-run only writes a table of runs."
        fix = "name it .csv; then `plan calibrate THAT.csv -o PROFILE.json`"
        problems.append(Problem(where="-o", fault=fault, fix=fix))
    if from_run and not runs and base is not None:
        problems.append(
            Problem(where="--profile", fault="is for fitting, and without RUNS nothing is fitted.")
        )
    for flag, value in zip(("--plan", "--set", "--metric"), of_runs, strict=True):
        if value and not from_run:
            problems.append(Problem(where=flag, fault="says something of --from-run, which is missing."))
    if problems:
        raise InputError(*problems)


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
                "blocks": {
                    "shapes": len(told.residuals.told) if told.residuals else 0,
                    "left_out_mape": _mean_abs(told.left_out),
                    "left_out_bias": _mean(told.left_out),
                },
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
            for fit, told in zip(result.fits, result.blocks, strict=True)
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
    from planner.commands.shared.text import WIDTH, pairs, table

    rows = [
        (
            number,
            fit.scope.label,
            len(fit.runs),
            f"{_mean_abs(fit.errors):.1%}",
            f"{_mean(fit.errors):+.1%}",
            f"{_mean_abs(fit.left_out):.1%}",
            f"{_mean(fit.left_out):+.1%}",
        )
        for number, fit in enumerate(result.fits, 1)
    ]
    header = ("fit", "fitted to", "runs", "mean error", "bias", "left out", "bias")
    parts = [table(header, rows, numbers={0, 2, 3, 4, 5, 6})]
    parts.append("left out: every group of runs, predicted from the other groups alone")
    parts.append(_blocks_text(result))
    parts.append(_constants_text(result.fits))
    if result.memory:
        parts.append(_memory_text(result))
    unused = ", ".join(f"{rule} {count}" for rule, count in result.unused.items())
    judged = f"plan validate OTHER.csv --profile {output}"
    ends = [
        ("not used", unused),
        ("profile", output),
        ("judge it", f"on runs that it has not seen: {judged}"),
    ]
    parts.append(pairs(ends, WIDTH))
    return "\n\n".join(part for part in parts if part)


def _blocks_text(result: Calibration) -> str:
    """What runs tell of blocks besides constants, where they tell anything."""
    from planner.commands.shared.text import table
    from planner.cost.stage.layer_cost import Residuals

    rows = []
    for number, (fit, told) in enumerate(zip(result.fits, result.blocks, strict=True), 1):
        if told.residuals:
            ratio = Residuals(told.residuals).ratio
            ratios = sorted(ratio(each.shape) for each in told.residuals.told)
            rows.append(
                (
                    number,
                    len(ratios),
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                    f"{_mean_abs(fit.left_out):.1%}",
                    f"{_mean_abs(told.left_out):.1%}",
                )
            )
    if not rows:
        return ""
    header = ("fit", "block shapes", "time over price", "left out", "with blocks")
    said = "blocks of one shape take the same time in every run: what theirs took beyond the fitted price"
    return table(header, rows, numbers={0, 1, 3, 4}) + f"\n{said}"


def _memory_text(result: Calibration) -> str:
    from planner.commands.shared.text import wrapped_table

    rows = [
        (
            fit.framework,
            len(fit.runs),
            f"{_mean_abs(fit.peak_errors):.1%}" if fit.peak_errors else "-",
            ", ".join(f"{c.name} {c.value:.3g}" for c in fit.constants if not c.kernels),
        )
        for fit in result.memory
    ]
    return wrapped_table(("memory of", "runs", "left-out error", "constants"), rows)


FITS_A_TABLE = 7
"""Fits whose constants fit side by side on a terminal."""


def _constants_text(fits: Sequence[Fit]) -> str:
    """What each fit determined, what that means, and what stayed at its prior everywhere."""
    from planner.commands.shared.text import WIDTH, pairs, table, wrapped_table
    from planner.cost.constants import TIME_SPECS

    labels = dict.fromkeys(unknown.label for fit in fits for unknown in fit.unknowns)
    priors = {unknown.label: unknown.start for fit in reversed(fits) for unknown in fit.unknowns}
    names = {unknown.label: unknown.name for fit in fits for unknown in fit.unknowns}
    found = [_determined(fit) for fit in fits]
    known = [label for label in labels if any(label in fit for fit in found)]
    columns = ["fitted"] if len(fits) == 1 else [f"fit {number}" for number in range(1, len(fits) + 1)]
    shown = []
    for first in range(0, len(fits), FITS_A_TABLE):
        some = slice(first, first + FITS_A_TABLE)
        told = [label for label in known if any(label in fit for fit in found[some])]
        rows = [
            (label, f"{priors[label]:.4g}", *(fit.get(label, "-") for fit in found[some])) for label in told
        ]
        header = ("constant", "prior", *columns[some])
        if rows:
            shown.append(table(header, rows, numbers=range(1, len(header))))
    meanings = [
        (name, TIME_SPECS[name].description) for name in dict.fromkeys(names[label] for label in known)
    ]
    stayed = ", ".join(label for label in labels if label not in known)
    parts = shown
    if any("*" in value for fit in found for value in fit.values()):
        parts.append("* at the end of the range that it is given")
    parts.append(pairs([("at their prior", stayed and f"{stayed}: these runs do not determine them")], WIDTH))
    if meanings:
        parts.append(wrapped_table(("constant", "what it is"), meanings))
    return "\n\n".join(part for part in parts if part)


def _determined(fit: Fit) -> dict[str, str]:
    """The values that a fit determined, marked where they lie at the end of their range."""
    from planner.cost.constants import TIME_SPECS

    found = {}
    for index, unknown in enumerate(fit.unknowns):
        if fit.determined(index):
            value, prior = fit.values[index], TIME_SPECS[unknown.name]
            at_end = value != unknown.start and value in (prior.low, prior.high)
            found[unknown.label] = f"{value:.4g}" + "*" * at_end
    return found


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _mean_abs(values: tuple[float, ...]) -> float:
    return sum(abs(value) for value in values) / len(values)

"""`plan validate`: predicted against measured over tables of runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.calibration.validate import GroupResult, Summary, ValidatedRow, Validation
    from planner.profile.profile import Profile

WORST = 12
GROUPS_SHOWN = 40
GROUP_WORDS = (
    "tau: rank correlation of predicted with measured times; regret: what the layout predicted fastest takes "
    "more than the fastest"
)
PROGRESS_EVERY = 100


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUNS...")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file that `plan profile` or `plan calibrate` wrote. Default: the shipped profile that fits "
    "each run's device best.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page with predicted over measured, one mark a run.",
)
@json_option
def validate(runs: tuple[Path, ...], profile: Path | None, plot: Path | None, as_json: bool) -> None:
    """Predict measured runs, and say how wrong the predictions are.

    RUNS are CSV files with one run a row; rows may be partial.
    """
    from planner.calibration.runs import read_runs
    from planner.calibration.validate import validate as compare
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import encode, write_atomic
    from planner.profile.choose import check_device
    from planner.profile.profile import load_profile

    table = read_runs(runs)
    for warning in table.warnings:
        click.echo(f"warning: {warning}", err=True)
    choice, basis = _told(profile_choice(profile), profile)
    result = compare(table.runs, choice, _progress())
    if profile is not None and basis:
        check_device(load_profile(profile), sorted(basis), f"--profile {profile}", "the runs are")
    if plot is not None:
        from planner.report.scatter import scatter_page

        write_atomic(plot, scatter_page(result))
        click.echo(f"plot  {plot}", err=True)
    if as_json:
        print_json(encode(result))
    else:
        click.echo(validation_text(result, basis))


def _told(
    choice: Callable[[str], Profile | None], named: Path | None
) -> tuple[Callable[[str], Profile | None], dict[str, str]]:
    """The choice, and what it chose for each device that it was asked for, in words."""
    basis: dict[str, str] = {}

    def choose(device: str) -> Profile | None:
        found = choice(device)
        if found is None:
            basis[device] = "datasheet"
        else:
            made = "measured" if found.measured else "fitted to runs"
            basis[device] = f"profile {named or found.name}, {made} on {found.device_title}"
        return found

    return choose, basis


def profile_choice(path: Path | None) -> Callable[[str], Profile | None]:
    """Which profile counts for a device: the one named, if it was made for it, else the newest shipped.

    A named profile with samples of layers speaks for the device it was measured on; one with constants
    alone was fitted over devices and speaks for all.
    """
    from planner.profile.choose import shipped_profile, speaks_of
    from planner.profile.profile import load_profile

    if path is not None:
        named = load_profile(path)
        return lambda device: named if speaks_of(named, device) else None
    return shipped_profile


def _progress() -> Callable[[int, int], None]:
    """Writes to stderr how far it is, now and then."""

    def report(done: int, all_rows: int) -> None:
        if all_rows > PROGRESS_EVERY and (done % PROGRESS_EVERY == 0 or done == all_rows):
            print(f"{done} of {all_rows} runs", file=sys.stderr)

    return report


def validation_text(result: Validation, basis: Mapping[str, str]) -> str:
    """The result for people: all together, verdicts, groups, the worst rows, what was not predicted.

    `basis` says for each device what the predictions rest on.
    """
    parts = [_basis_text(basis), _summary_text(result), _frameworks_text(result.rows)]
    parts.append(_groups_text(result.groups))
    parts += [_worst_text(result.rows)]
    return "\n\n".join(part for part in [*parts, _unpredicted_text(result.rows)] if part)


def _basis_text(basis: Mapping[str, str]) -> str:
    from planner.commands.shared.text import WIDTH, pairs

    devices: dict[str, list[str]] = {}
    for device, words in basis.items():
        devices.setdefault(words, []).append(device)
    lines = [f"{', '.join(each)}: {words}" for words, each in devices.items()]
    return pairs([("basis", line) for line in lines], WIDTH)


def _summary_text(result: Validation) -> str:
    from planner.commands.shared.text import pairs, table

    summary, counts = result.summary, result.verdicts
    lines = [
        ("runs", f"{summary.n} predicted of {summary.rows}"),
        ("step time", _errors(summary.time_mape, summary.time_bias, summary.n_time)),
        ("in the interval", _share(summary.within_interval) if summary.n_time else None),
        ("peak memory", _errors(summary.memory_mape, summary.memory_bias, summary.n_memory)),
        ("reserved", _errors(summary.reserved_mape, summary.reserved_bias)),
        ("driver's figure", _errors(summary.device_mape, summary.device_bias)),
    ]
    matrix = table(
        ("verdict", "ran", "out of memory"),
        [(name.upper(), counts[f"{name}_ran"], counts[f"{name}_oom"]) for name in ("safe", "risky", "no")],
    )
    return pairs(lines) + "\n\n" + matrix


def _errors(mape: float | None, bias: float | None, count: int | None = None) -> str | None:
    if mape is None or bias is None:
        return None
    return f"mean error {mape:.1%}, bias {bias:+.1%}" + (f", over {count} runs" if count else "")


def _frameworks_text(rows: Sequence[ValidatedRow]) -> str:
    """Errors by framework, whose rows share what a calibration fits."""
    from planner.calibration.validate import summarise
    from planner.commands.shared.text import table

    groups: dict[str, list[ValidatedRow]] = {}
    for row in rows:
        if row.verdict is not None:
            groups.setdefault(row.framework or "not stated", []).append(row)
    if len(groups) < 2:
        return ""
    summaries = sorted(((name, summarise(members)) for name, members in groups.items()), key=_by_size)
    body = [
        (
            _cut(name, 56),
            summary.n,
            _share(summary.time_mape),
            _share(summary.time_bias, sign=True),
            _share(summary.memory_mape),
            _share(summary.memory_bias, sign=True),
        )
        for name, summary in summaries
    ]
    header = ("framework", "n", "time error", "bias", "memory error", "bias")
    return table(header, body, numbers=(1, 2, 3, 4, 5))


def _by_size(item: tuple[str, Summary]) -> int:
    return -item[1].n


def _groups_text(groups: Sequence[GroupResult]) -> str:
    """The groups with an order to judge, the largest first."""
    from planner.commands.shared.text import table

    judged = [group for group in groups if group.n > 1 and group.time_mape is not None]
    judged.sort(key=lambda group: -group.n)
    if not judged:
        return ""
    rows = [
        (
            _cut(group.group, 56),
            group.n,
            _share(group.time_mape),
            _share(group.time_bias, sign=True),
            "-" if group.kendall_tau is None else f"{group.kendall_tau:.2f}",
            _share(group.regret),
        )
        for group in judged[:GROUPS_SHOWN]
    ]
    text = table(("group", "n", "error", "bias", "tau", "regret"), rows, numbers=(1, 2, 3, 4, 5))
    left = len(judged) - GROUPS_SHOWN
    text += f"\n... and {left} more groups" if left > 0 else ""
    return f"{text}\n{GROUP_WORDS}"


def _worst_text(rows: Sequence[ValidatedRow]) -> str:
    from planner.commands.shared.text import table

    timed = sorted((row for row in rows if row.error is not None), key=lambda row: -abs(row.error or 0.0))
    if not timed:
        return ""
    body = [
        (
            _cut(row.id, 34),
            row.strategy,
            f"{row.predicted_step_time_s:.4g}",
            f"{row.step_time_s:.4g}",
            _share(row.error, sign=True),
            row.verdict,
        )
        for row in timed[:WORST]
    ]
    header = ("furthest off", "strategy", "predicted s", "measured s", "error", "verdict")
    return table(header, body, numbers=(2, 3, 4))


def _unpredicted_text(rows: Sequence[ValidatedRow]) -> str:
    from collections import Counter

    from planner.commands.shared.text import wrapped_table

    reasons = Counter(row.reason for row in rows if row.reason)
    if not reasons:
        return ""
    body = [(count, reason) for reason, count in reasons.most_common(WORST)]
    left = len(reasons) - WORST
    text = wrapped_table(("runs", "not predicted, because"), body)
    return text + (f"\n... and {left} more reasons" if left > 0 else "")


def _share(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if sign else f"{value:.1%}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."

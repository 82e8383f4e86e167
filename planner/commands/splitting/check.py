"""`plan check`: what can be checked of a plan without devices."""

from __future__ import annotations

from pathlib import Path

import click

from planner.commands.shared.options import json_option
from planner.commands.shared.text import print_json, table


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@json_option
def check(plan_file: Path, as_json: bool) -> None:
    """Check a plan as far as it can be without devices.

    Its rules, rank grid, stages, schedule table, sums, certificate and digests of inputs. Exit code 4 if
    one of them does not hold.
    """
    from planner.foundation.errors import CheckError
    from planner.strategy.engines.native import not_executed, offload_not_executed
    from planner.strategy.plan import load_plan
    from planner.strategy.plan_check import check_plan

    plan = load_plan(plan_file)
    missing = not_executed(plan.model) + offload_not_executed(plan.strategy)
    checks = check_plan(plan)
    if as_json:
        print_json(
            {
                "ok": all(item.holds for item in checks),
                "not_executed": missing,
                "checks": [
                    {"name": item.name, "ok": item.holds, "faults": list(item.faults)} for item in checks
                ],
            }
        )
    else:
        click.echo(
            table(
                ("check", "result"), [(c.name, "holds" if c.holds else "; ".join(c.faults)) for c in checks]
            )
        )
        if missing:
            click.echo(f"\n`plan train` of this version cannot execute the model: {'; '.join(missing)}.")
    failed = [item.name for item in checks if not item.holds]
    if failed:
        raise CheckError(f"{plan_file}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")

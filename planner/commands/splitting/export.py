"""`plan export`: a plan as the configuration of another engine, or the job of a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.commands.shared.options import json_option
from planner.commands.splitting.estimate import BROKEN_RULE_EXIT

if TYPE_CHECKING:
    from planner.export.artifact import Export, ExportFile
    from planner.strategy.estimate import Rejected
    from planner.strategy.plan import Plan

TO = ("deepspeed", "megatron", "torchtitan", "accelerate", "slurm", "kubernetes", "skypilot")


@click.command("export")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(TO), help="The engine or the scheduler.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new or empty folder, or that of an earlier export. Default: print the files.",
)
@json_option
def export(plan_file: Path, to: str, output: Path | None, as_json: bool) -> int:
    """Write a plan as the configuration of another engine, or as the job of a scheduler.

    What the engine cannot run of the plan is named by its rule, and nothing is written (exit code 3). A
    scheduler runs the plan with the engine that it was made for (`plan solve --engine`), else with
    `plan train`.
    """
    from planner.commands.shared.text import print_json
    from planner.export.artifact import readme, write_export
    from planner.export.targets import TARGETS, refusals
    from planner.foundation.decode import encode
    from planner.strategy.plan import load_plan
    from planner.strategy.plan_check import check_sound

    plan = load_plan(plan_file)
    check_sound(plan)
    violations = refusals(plan, to)
    if violations:
        if as_json:
            print_json({"violations": [encode(violation) for violation in violations]})
        else:
            click.echo(_refused(plan, to, violations), err=True)
        return BROKEN_RULE_EXIT
    made = TARGETS[to].export(plan)
    files = (*made.files, readme(plan, made))
    if output is not None:
        write_export(made, files, output)
        click.echo(f"wrote {len(files)} files to {output}", err=True)
    if as_json:
        print_json(
            {**encode(made), "files": encode(files), "folder": None if output is None else str(output)}
        )
    else:
        click.echo(_printed(files) if output is None else _summary(made, files))
    return 0


def _refused(plan: Plan, to: str, violations: list[Rejected]) -> str:
    from planner.commands.splitting.estimate import violations_text
    from planner.export.targets import TARGETS

    target = TARGETS[to]
    engine = target.engine or plan.engine or ("native" if target.schedules else None)
    beside = {rejected.rule for rejected in target.refusals(plan)}  # what a search does not know of
    known = engine is not None and not any(violation.rule in beside for violation in violations)
    cure = f"`plan solve --engine {engine}` makes only plans that it runs." if known else ""
    text = f"{to} cannot run this plan as it is:\n{violations_text(violations)}"
    return f"{text}\n{cure}".rstrip()


def _printed(files: tuple[ExportFile, ...]) -> str:
    """Every file under its name."""
    return "\n".join(f"==> {file.name} <==\n{file.text}" for file in files)


def _summary(made: Export, files: tuple[ExportFile, ...]) -> str:
    from planner.commands.shared.text import WIDTH, pairs

    return pairs(
        [
            ("for", made.release),
            ("files", ", ".join(file.name for file in files)),
            ("start", made.start),
            ("decided by the engine", "; ".join(made.decides)),
            ("for you to say", "; ".join(made.yours)),
        ],
        WIDTH,
    )

"""The command `plan`: a table of commands, each imported when it is called, and the exit codes.

To add a command, write `planner/commands/NAME.py` with a `click.Command` in it and a line in COMMANDS.
A command returns None (exit code 0) or an exit code, and raises PlannerError for the user's faults.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import click

from planner.foundation.errors import PlannerError

INTERNAL_ERROR = 1
INTERRUPTED = 130
DEBUG_VARIABLE = "SHARDWISE_DEBUG"
ENDS = "ends"
"""The object of a command's context where its process ends with it."""

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "demo": (
            "planner.commands.running.demo:demo",
            "The main job on this machine: profile, solve, train.",
        ),
        "list": (
            "planner.commands.hardware.catalog:list_command",
            "List the catalog: models, devices, instances.",
        ),
        "show": (
            "planner.commands.hardware.catalog:show_command",
            "Show one entry of the catalog with its sources.",
        ),
        "napkin": (
            "planner.commands.hardware.napkin:napkin",
            "First principles: bytes, 6ND, days, with formulas.",
        ),
        "scaling": (
            "planner.commands.hardware.scaling:scaling",
            "Compute-optimal size and tokens for a budget.",
        ),
        "profile": (
            "planner.commands.running.profile:profile",
            "Measure layers, collectives, memory: a profile.",
        ),
        "trace": (
            "planner.commands.running.trace:trace",
            "A torch module of one's own as a model, to plan it.",
        ),
        "estimate": (
            "planner.commands.splitting.estimate:estimate",
            "Time, memory and verdict of a given strategy.",
        ),
        "solve": (
            "planner.commands.splitting.solve:solve",
            "The best plan, with a certificate; writes plan.json.",
        ),
        "size": ("planner.commands.hardware.size:size", "The smallest and the cheapest cluster for a run."),
        "compare": (
            "planner.commands.hardware.compare:compare",
            "Hardware choices: dollars against days, one page.",
        ),
        "explain": (
            "planner.commands.splitting.explain:explain",
            "Why this plan; what any other choice would cost.",
        ),
        "diff": (
            "planner.commands.splitting.diff:diff",
            "Two plans side by side, and which is faster by what.",
        ),
        "rehearse": (
            "planner.commands.running.rehearse:rehearse",
            "Single ranks of a plan on one device, measured.",
        ),
        "train": (
            "planner.commands.running.train:train",
            "Execute a plan on real ranks; checkpoint, log, resume.",
        ),
        "replan": (
            "planner.commands.running.replan:replan",
            "A new plan for what is left of a run's cluster.",
        ),
        "export": (
            "planner.commands.splitting.export:export",
            "A plan as another engine's or scheduler's files.",
        ),
        "import": (
            "planner.commands.splitting.import_config:import_config",
            "A strategy from an engine's files, estimated.",
        ),
        "export-weights": (
            "planner.commands.running.export_weights:export_weights",
            "A run's weights as a Hugging Face folder.",
        ),
        "web": (
            "planner.commands.hardware.web:web",
            "The page of hardware choices with its inputs, on 127.0.0.1.",
        ),
        "report": ("planner.commands.running.report:report", "One offline HTML page and a Perfetto trace."),
        "calibrate": (
            "planner.commands.accuracy.calibrate:calibrate",
            "Fit the cost model to measured runs; a profile.",
        ),
        "validate": (
            "planner.commands.accuracy.validate:validate",
            "Predicted against measured over runs.csv.",
        ),
        "check": (
            "planner.commands.splitting.check:check",
            "Check a plan as far as it can be without devices.",
        ),
        "doctor": (
            "planner.commands.running.doctor:doctor",
            "Report versions, devices, and what is missing.",
        ),
    }
)
"""Name of a command: where its click object is (`module:attribute`), and its line in `plan --help`."""


class PlanGroup(click.Group):
    """A group that imports a command only when it is called, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else f" Legal here: {', '.join(COMMANDS)}."
        raise click.UsageError(f"no command '{name}'.{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs a command line and exits with its code: 0, 2 to 5 of the contract, 1 or 130."""
        try:
            code = super().main(args, prog_name or "plan", complete_var, standalone_mode=False, **extra)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _report(error)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Writes an error to stderr as its reader can use it. Returns the exit code."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    if isinstance(error, PlannerError):
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return error.exit_code
    if isinstance(error, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    text = " ".join(str(error).split()) or "no message"
    click.echo(
        f"internal error: {type(error).__name__}: {text[:300]} (set {DEBUG_VARIABLE}=1 for the traceback)",
        err=True,
    )
    return INTERNAL_ERROR


@click.group(cls=PlanGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Plan the training of a language model, run the plan, and see how right it was.

    Exit codes: 0 done; 2 wrong use or bad input; 3 no feasible plan; 4 a check failed; 5 the time limit
    ended the search with an incumbent.
    """


def main() -> NoReturn:
    """The entry point of the command `plan`."""
    try:
        cli.main(obj=ENDS)
    finally:
        gc.freeze()  # the process ends: what is left need not be searched for cycles


if __name__ == "__main__":
    main()

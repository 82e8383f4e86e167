"""The options that say what a job does between its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from planner.commands.options import ProblemOptions
    from planner.errors import Problem
    from planner.upkeep import Upkeep


def upkeep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; each counts something between steps that is otherwise listed as not modelled."""
    options = [
        click.option(
            "--data-rate", metavar="TOKENS/S",
            help="Tokens a second of all data loaders together, such as 5M.",
        ),
        click.option(
            "--checkpoint-every", type=click.IntRange(min=1), metavar="STEPS",
            help="Steps between checkpoints; counts what failures lose, and with --storage the writing.",
        ),
        click.option(
            "--storage", metavar="RATE",
            help="Rate at which storage takes a whole checkpoint, such as 40GB/s.",
        ),
        click.option(
            "--checkpoint-async", is_flag=True,
            help="Checkpoints are written behind the steps, which wait for the copy to host memory alone.",
        ),
        click.option(
            "--device-spread", type=click.FloatRange(min=0, max=1), metavar="SHARE",
            help="Standard deviation of a device's compute time over its mean, such as 0.02: steps wait "
            "for the slowest.",
        ),
        click.option(
            "--failures", type=click.FloatRange(min=0), metavar="RATE",
            help="Failures in 1000 node-days. Default: 3.8, as published for Llama 3.",
        ),
        click.option(
            "--restart", metavar="TIME",
            help="What a failure costs besides lost steps, such as 15min. Default: 1000s.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def read_upkeep(options: ProblemOptions, problems: list[Problem]) -> Upkeep:
    """What the options say; faults are added to `problems`."""
    from planner.errors import InputError
    from planner.errors import Problem as Fault
    from planner.units import parse_bytes_per_s, parse_count, parse_duration
    from planner.upkeep import FAILURES_PER_1000_NODE_DAYS, RESTART_S, Upkeep

    def read(
        parse: Callable[[str, str], float], text: str | None, flag: str, *, zero: bool = False
    ) -> float | None:
        try:
            value = None if text is None else parse(text, flag)
        except InputError as error:
            problems.extend(error.problems)
            return None
        if value == 0 and not zero:
            problems.append(Fault(where=flag, fault=f"'{text}' is no rate at all.", legal="above 0"))
            return None
        return value

    rate = options.data_rate.strip().removesuffix("/s") if options.data_rate else None
    data = read(parse_count, rate, "--data-rate")
    storage = read(parse_bytes_per_s, options.storage, "--storage")
    restart_s = read(parse_duration, options.restart, "--restart", zero=True)
    problems.extend(_incomplete(options))
    rate_of_failures = options.failures
    return Upkeep(
        data_tokens_per_s=data,
        storage_bytes_per_s=storage,
        checkpoint_every=options.checkpoint_every,
        checkpoint_async=options.checkpoint_async,
        device_spread=options.device_spread,
        failures_per_1000_node_days=(
            FAILURES_PER_1000_NODE_DAYS if rate_of_failures is None else rate_of_failures
        ),
        restart_s=RESTART_S if restart_s is None else restart_s,
    )


def _incomplete(options: ProblemOptions) -> list[Problem]:
    """Options that say nothing without another."""
    from planner.errors import Problem as Fault

    found = []
    needs = (
        ("--storage", options.storage, "--checkpoint-every", options.checkpoint_every),
        ("--checkpoint-async", options.checkpoint_async or None, "--storage", options.storage),
        ("--failures", options.failures, "--checkpoint-every", options.checkpoint_every),
        ("--restart", options.restart, "--checkpoint-every", options.checkpoint_every),
    )
    for flag, value, other, present in needs:
        if value is not None and present is None:
            found.append(Fault(where=flag, fault=f"says nothing without {other}.", fix=f"add {other}"))
    return found

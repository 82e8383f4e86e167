"""The options that say what a job does between its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from planner.commands.shared.options import ProblemOptions
    from planner.foundation.errors import Problem
    from planner.job.problem import JobOverheads

SPOT = "spot"
"""`--preemptions spot`: as often as nodes at a spot price are usually taken back."""


def upkeep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; each counts something between steps that is otherwise listed as not modelled."""
    options = [*_between_steps(), *_checkpoints(), *_interruptions()]
    for option in reversed(options):
        command = option(command)
    return command


def _between_steps() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--data-rate", metavar="TOKENS/S",
            help="Tokens a second of all data loaders together, such as 5M.",
        ),
        click.option(
            "--device-spread", type=click.FloatRange(min=0, max=1), metavar="SHARE",
            help="Standard deviation of a device's compute time over its mean, such as 0.02: steps wait "
            "for the slowest.",
        ),
        click.option(
            "--eval-every", type=click.IntRange(min=1), metavar="STEPS",
            help="Steps between evaluations. With --eval-time.",
        ),
        click.option("--eval-time", metavar="TIME", help="What one evaluation takes, such as 5min."),
        click.option(
            "--ramp-up", metavar="TIME",
            help="Before the first step: starting the job, compiling, warming up; again at each restart, "
            "unless --restart says what that takes.",
        ),
    ]  # fmt: skip


def _checkpoints() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--checkpoint-every", metavar="STEPS|best",
            help="Steps between checkpoints, or best: as many as lose least (with --storage). Counts what "
            "failures lose, and with --storage the writing.",
        ),
        click.option(
            "--storage", metavar="RATE",
            help="Rate at which storage takes a whole checkpoint, and gives it back, such as 40GB/s.",
        ),
        click.option(
            "--checkpoint-async", is_flag=True,
            help="Checkpoints are written behind the steps, which wait for the copy to host memory alone.",
        ),
    ]  # fmt: skip


def _interruptions() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--failures", type=click.FloatRange(min=0), metavar="RATE",
            help="Failures in 1000 days of a node of 8 devices; others count by their devices. "
            "Default: as published for the device (profiles/failures.toml), 4 where nothing is.",
        ),
        click.option(
            "--restart", metavar="TIME",
            help="What a failure costs besides lost steps, such as 15min. Default: 11min, the loading of the "
            "checkpoint at --storage, and --ramp-up.",
        ),
        click.option(
            "--repair", metavar="TIME",
            help="For how long a failed node is out. The job waits for it, unless one of --spares stands in. "
            "Default: it is replaced while the job restarts.",
        ),
        click.option(
            "--spares", type=click.IntRange(min=0), metavar="N",
            help="Idle nodes, paid like the others. With --repair.",
        ),
        click.option(
            "--preemptions", metavar="RATE|spot",
            help="Nodes that the provider takes back in 1000 node-days, or spot for the usual: 100.",
        ),
        click.option(
            "--preemption-notice", metavar="TIME",
            help="How long before it says so: steps are saved where that lasts. Default: 30s.",
        ),
        click.option(
            "--preemption-restart", metavar="TIME",
            help="What a preemption costs besides lost steps. Default: 20min until there is a node, and "
            "a restart.",
        ),
    ]  # fmt: skip


def read_overheads(
    options: ProblemOptions, problems: list[Problem], *, completed: bool = False
) -> JobOverheads:
    """What the options say; faults are added to `problems`.

    `completed`: what is not said will be filled in with what is usual (planner.sizing.usual_overheads), so
    that
    options count which otherwise say nothing without others.
    """
    from planner.job.problem import JobOverheads

    said = _Reader(problems)
    overheads = JobOverheads(
        data_tokens_per_s=said.count(options.data_rate, "--data-rate"),
        storage_bytes_per_s=said.rate(options.storage, "--storage"),
        checkpoint_every=said.interval(options.checkpoint_every),
        checkpoint_async=options.checkpoint_async,
        device_spread=options.device_spread,
        failures_per_1000_node_days=options.failures,
        restart_s=said.time(options.restart, "--restart"),
        repair_s=said.time(options.repair, "--repair"),
        spares=options.spares or 0,
        preemptions_per_1000_node_days=said.preemptions(options.preemptions),
        preemption_notice_s=said.time(options.preemption_notice, "--preemption-notice"),
        preemption_restart_s=said.time(options.preemption_restart, "--preemption-restart"),
        ramp_up_s=said.time(options.ramp_up, "--ramp-up"),
        eval_every=options.eval_every,
        eval_s=said.time(options.eval_time, "--eval-time"),
    )
    problems.extend(_incomplete(options, completed))
    return overheads


class _Reader:
    """Reads texts and keeps every fault; what could not be read is None."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems

    def _read(
        self, parse: Callable[[str, str], float], text: str | None, flag: str, *, zero: bool
    ) -> float | None:
        from planner.foundation.errors import InputError

        try:
            value = None if text is None else parse(text, flag)
        except InputError as error:
            self.problems.extend(error.problems)
            return None
        if value == 0 and not zero:
            self._refuse(flag, f"'{text}' is no rate at all.", "above 0")
            return None
        return value

    def _refuse(self, flag: str, fault: str, legal: str) -> None:
        from planner.foundation.errors import Problem

        self.problems.append(Problem(where=flag, fault=fault, legal=legal))

    def count(self, text: str | None, flag: str) -> float | None:
        from planner.foundation.units import parse_count

        return self._read(parse_count, text.strip().removesuffix("/s") if text else None, flag, zero=False)

    def rate(self, text: str | None, flag: str) -> float | None:
        from planner.foundation.units import parse_bytes_per_s

        return self._read(parse_bytes_per_s, text, flag, zero=False)

    def time(self, text: str | None, flag: str) -> float | None:
        from planner.foundation.units import parse_duration

        return self._read(parse_duration, text, flag, zero=True)

    def interval(self, text: str | None) -> int | Literal["best"] | None:
        """`200`, or `best`."""
        from planner.job.problem import BEST

        word = "" if text is None else text.strip().lower()
        if text is None or word == BEST:
            return None if text is None else BEST
        if word.isascii() and word.isdigit() and 1 <= len(word) <= 15 and int(word) > 0:
            return int(word)
        legal = "a whole number of steps from 1, or best"
        self._refuse("--checkpoint-every", f"'{text[:40]}' is no interval.", legal)
        return None

    def preemptions(self, text: str | None) -> float | None:
        """`250`, or `spot`."""
        from planner.commands.shared.quantities import read_number
        from planner.foundation.errors import InputError
        from planner.hardware.failures import failure_file

        if text is None:
            return None
        if text.strip().lower() == SPOT:
            return failure_file().spot.per_1000_node_days
        if text.strip() == "0":
            return 0.0
        try:
            return read_number(text, "--preemptions", 0.0, 1e6, "100, or spot")
        except InputError as error:
            self.problems.extend(error.problems)
            return None


def _incomplete(options: ProblemOptions, completed: bool) -> list[Problem]:
    """Options that say nothing without another."""
    from planner.foundation.errors import Problem as Fault

    every, storage = options.checkpoint_every, options.storage
    best = (every or "").strip().lower() == "best" or None
    counted = (
        ("--storage", storage, "--checkpoint-every", every),
        ("--checkpoint-async", options.checkpoint_async or None, "--storage", storage),
        ("--checkpoint-every best", best, "--storage", storage),
        ("--failures", options.failures, "--checkpoint-every", every),
        ("--restart", options.restart, "--checkpoint-every", every),
        ("--repair", options.repair, "--checkpoint-every", every),
        ("--preemptions", options.preemptions, "--checkpoint-every", every),
        ("--preemption-notice", options.preemption_notice, "--preemptions", options.preemptions),
        ("--preemption-restart", options.preemption_restart, "--preemptions", options.preemptions),
        ("--ramp-up", options.ramp_up, "--tokens", options.tokens or every),
    )
    always = (
        ("--spares", options.spares or None, "--repair", options.repair),
        ("--eval-every", options.eval_every, "--eval-time", options.eval_time),
        ("--eval-time", options.eval_time, "--eval-every", options.eval_every),
    )
    needs = always if completed else (*counted, *always)
    return [
        Fault(where=flag, fault=f"says nothing without {other}.", fix=f"add {other}")
        for flag, value, other, present in needs
        if value is not None and present is None
    ]

"""The bars of the page of hardware choices: memory, a step's time, and what a job's time goes to."""

from __future__ import annotations

from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.report import options_words as words
from planner.report.charts import CAUSE_COLOURS
from planner.report.words import Table, percent
from planner.sizing.comparison import Option
from planner.strategy.estimate import TIME_CAUSES, JobFigures

LOSS_COLOURS = {
    "kept steps": "compute",
    "waiting for data": "host",
    "stragglers": "bubble",
    "evaluation": "optimizer",
    "checkpoints": "transient",
    "failures": "dp_comm",
    "preemptions": "ep_comm",
    "waiting for a node": "pp_comm",
    "ramp-up": "recompute",
    "other": "allocator",
}
KEPT = "kept steps"
LEAST_SHARE = 1e-6
"""Less than this is what numbers were rounded by."""


@frozen
class Piece:
    """A part of a bar; `share` is of the bar's full length."""

    colour: str
    title: str
    share: float
    tip: str


@frozen
class BarRow:
    """A stacked bar with its name; `pieces` follow each other from the left."""

    title: str
    detail: str
    pieces: tuple[Piece, ...]


@frozen
class Bars:
    """Bars with their legend (colour, title) and the same numbers as a table."""

    rows: tuple[BarRow, ...]
    legend: tuple[tuple[str, str], ...]
    table: Table


@frozen
class Meter:
    """A quantity against its limit."""

    title: str
    detail: str
    share: float
    text: str
    verdict: str


def memory_meters(chosen: Sequence[tuple[str, Option]]) -> tuple[Meter, ...]:
    return tuple(
        Meter(
            title=option.name,
            detail=why,
            share=option.plan.peak_memory_bytes / option.plan.memory_limit_bytes,
            text=words.memory_words(option),
            verdict=str(option.plan.verdict),
        )
        for why, option in chosen
        if option.plan.memory_limit_bytes
    )


def step_bars(chosen: Sequence[tuple[str, Option]]) -> Bars | None:
    """Where a step's time goes; each bar is one step, whole."""
    used = [cause for cause in TIME_CAUSES if any(getattr(o.plan.breakdown, cause) for _, o in chosen)]
    rows, lines = [], []
    for why, option in chosen:
        parts = {cause: getattr(option.plan.breakdown, cause) for cause in used}
        whole = sum(parts.values())
        if whole <= 0:
            continue
        rows.append(
            BarRow(
                title=option.name,
                detail=f"{why}; step {format_seconds(option.step_time_s)}",
                pieces=tuple(
                    _piece(CAUSE_COLOURS[cause].name, CAUSE_COLOURS[cause].title, seconds / whole,
                           format_seconds(seconds))
                    for cause, seconds in parts.items()
                    if seconds > 0
                ),
            )
        )  # fmt: skip
        lines.append((option.name, *(percent(parts[cause] / whole) for cause in used)))
    if not rows:
        return None
    legend = tuple((CAUSE_COLOURS[cause].name, CAUSE_COLOURS[cause].title) for cause in used)
    return Bars(
        rows=tuple(rows),
        legend=legend,
        table=Table(header=("option", *(title for _, title in legend)), rows=tuple(lines)),
    )


def _piece(colour: str, title: str, share: float, amount: str) -> Piece:
    tip = f"{title}: {percent(share)}" + (f" ({amount})" if amount else "")
    return Piece(colour=colour, title=title, share=share, tip=tip)


def loss_shares(option: Option) -> dict[str, float] | None:
    """Shares of a job's time by what it goes to; they sum to 1. None where nothing is counted.

    With a step of t seconds and goodput g, a stall of s seconds a step takes g s / t. Failures, preemptions
    and the wait for nodes take their shares of what is left of the time after the ramp-up, which is
    g (t + all stalls) / t / (1 - these shares); what is missing to the whole is the ramp-up.
    """
    losses = option.losses
    if losses is None:
        return None
    each_s = option.goodput / option.step_time_s
    shares = {KEPT: option.goodput, **{name: each_s * s for name, s in _stalls(losses).items()}}
    lost = {
        "failures": losses.failure_share,
        "preemptions": losses.preemption_share,
        "waiting for a node": losses.waiting_share,
    }
    running = 1 - sum(lost.values())
    after_ramp_up = min(1.0, sum(shares.values()) / running) if running > 0 else 1.0
    shares |= {name: share * after_ramp_up for name, share in lost.items()}
    missing = max(0.0, 1 - sum(shares.values()))
    if missing > LEAST_SHARE:
        shares["ramp-up" if losses.ramp_up_s > 0 else "other"] = missing
    return shares


def _stalls(losses: JobFigures) -> dict[str, float]:
    return {
        "waiting for data": losses.data_stall_s,
        "stragglers": losses.straggler_s,
        "evaluation": losses.evaluation_s,
        "checkpoints": losses.checkpoint_stall_s,
    }


def loss_bars(chosen: Sequence[tuple[str, Option]]) -> Bars | None:
    """What goodput is lost to; each bar is all of the job's time."""
    known = [(why, option, shares) for why, option in chosen if (shares := loss_shares(option)) is not None]
    if not known:
        return None
    used = [name for name in LOSS_COLOURS if any(shares.get(name, 0) > 0 for _, _, shares in known)]
    rows = tuple(
        BarRow(
            title=option.name,
            detail=f"{why}; goodput {percent(option.goodput)}{_failures_words(option.losses)}",
            pieces=tuple(
                _piece(LOSS_COLOURS[name], name, shares[name], "") for name in used if shares.get(name, 0) > 0
            ),
        )
        for why, option, shares in known
    )
    table = Table(
        header=("option", *used, "checkpoint", "one every", "spare nodes"),
        rows=tuple(
            (
                option.name,
                *(percent(shares.get(name, 0.0)) for name in used),
                format_bytes(option.losses.checkpoint_bytes) if option.losses else "",
                _interval_words(option),
                f"{option.losses.spares:,}" if option.losses else "",
            )
            for _, option, shares in known
        ),
    )
    return Bars(rows=rows, legend=tuple((LOSS_COLOURS[name], name) for name in used), table=table)


def _failures_words(losses: JobFigures | None) -> str:
    if losses is None:
        return ""
    words_of = (("a failure", losses.between_failures_s), ("a preemption", losses.between_preemptions_s))
    return "".join(f", {what} every {format_seconds(s)}" for what, s in words_of if s is not None)


def _interval_words(option: Option) -> str:
    losses = option.losses
    every = None if losses is None else losses.checkpoint_every or losses.best_checkpoint_every
    return words.UNKNOWN if every is None else f"{every:,} steps"

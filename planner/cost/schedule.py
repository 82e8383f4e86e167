"""Pipeline schedules as tables of actions, one row a pipeline rank.

An action is printed as stage, kind, micro-batch: `2F0` is the forward of micro-batch 0 on stage 2, `2B0`
its whole backward. The same table is simulated, written into plan.json and executed.

Sources: GPipe (arXiv 1811.06965); 1F1B (PipeDream-flush, arXiv 2006.09503); interleaved 1F1B (Megatron-LM,
arXiv 2104.04473).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from planner.errors import InputError, Problem
from planner.strategy import Schedule


class ActionKind(StrEnum):
    """What an action does with its micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    stage: int
    kind: ActionKind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Row = tuple[Action, ...]
Table = tuple[Row, ...]

_ACTION = re.compile(r"^(\d{1,6})([FB])(\d{1,6})$")


def parse_action(text: str) -> Action:
    """The action that prints as `text`. Raises InputError on any other text."""
    match = _ACTION.match(text)
    if match is None:
        raise InputError(
            Problem(
                where=f"schedule action '{text[:40]}'",
                fault="cannot be read.",
                legal="stage, F or B, micro-batch, such as 2F0",
            )
        )
    return Action(int(match.group(1)), ActionKind(match.group(2)), int(match.group(3)))


def parse_table(rows: tuple[tuple[str, ...], ...]) -> Table:
    """The table whose actions print as `rows`."""
    return tuple(tuple(parse_action(text) for text in row) for row in rows)


def print_table(table: Table) -> tuple[tuple[str, ...], ...]:
    """The table as text, one tuple a pipeline rank."""
    return tuple(tuple(str(action) for action in row) for row in table)


def build_table(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int) -> Table:
    """The table of `schedule` for `pp` pipeline ranks with `chunks` stages each.

    Stage s lives on pipeline rank s mod pp. Interleaved needs num_micro_batches to be a multiple of pp.
    """
    if pp < 1 or chunks < 1 or num_micro_batches < 1:
        raise ValueError(f"pp={pp}, chunks={chunks} and micro-batches={num_micro_batches} must be positive")
    if chunks > 1 and schedule is not Schedule.INTERLEAVED:
        raise ValueError(f"{schedule} holds one stage a rank, not {chunks}")
    if schedule is Schedule.INTERLEAVED and num_micro_batches % pp:
        raise ValueError(f"interleaved needs a multiple of {pp} micro-batches, not {num_micro_batches}")
    row = _ROWS[schedule]
    return tuple(row(rank, pp, chunks, num_micro_batches) for rank in range(pp))


def _gpipe_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Row:
    forwards = [Action(rank, ActionKind.FORWARD, mb) for mb in range(num_micro_batches)]
    backwards = [Action(rank, ActionKind.BACKWARD, mb) for mb in range(num_micro_batches)]
    return tuple(forwards + backwards)


def _one_f_one_b_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Row:
    """Rank i of p runs p - 1 - i forwards ahead, then alternates, so it keeps min(m, p - i) alive."""
    forwards = [Action(rank, ActionKind.FORWARD, mb) for mb in range(num_micro_batches)]
    backwards = [Action(rank, ActionKind.BACKWARD, mb) for mb in range(num_micro_batches)]
    return _alternate(forwards, backwards, warmup=pp - 1 - rank)


def _interleaved_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Row:
    """Micro-batches go through the chunks in rounds of p; (p - 1 - i) * 2 + (v - 1) * p run ahead."""
    total = num_micro_batches * chunks
    forwards, backwards = [], []
    for step in range(total):
        within, micro_batch = step % (pp * chunks), step // (pp * chunks) * pp + step % pp
        chunk = within // pp
        forwards.append(Action(chunk * pp + rank, ActionKind.FORWARD, micro_batch))
        backwards.append(Action((chunks - 1 - chunk) * pp + rank, ActionKind.BACKWARD, micro_batch))
    return _alternate(forwards, backwards, warmup=(pp - 1 - rank) * 2 + (chunks - 1) * pp)


def _alternate(forwards: list[Action], backwards: list[Action], *, warmup: int) -> Row:
    warmup = min(warmup, len(forwards))
    row = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        row += [forward, backward]
    return tuple(row + backwards[len(forwards) - warmup :])


_ROWS: dict[Schedule, Callable[[int, int, int, int], Row]] = {
    Schedule.GPIPE: _gpipe_row,
    Schedule.ONE_F_ONE_B: _one_f_one_b_row,
    Schedule.INTERLEAVED: _interleaved_row,
}


def peak_in_flight(row: Row) -> dict[int, int]:
    """For every stage of a row, the most micro-batches that are forwarded and not yet backwarded."""
    alive: dict[int, int] = {}
    peak: dict[int, int] = {}
    for action in row:
        change = 1 if action.kind is ActionKind.FORWARD else -1
        alive[action.stage] = alive.get(action.stage, 0) + change
        peak[action.stage] = max(peak.get(action.stage, 0), alive[action.stage])
    return peak


def table_faults(table: Table, stages: int, num_micro_batches: int) -> list[str]:
    """What is wrong with a table: every (stage, micro-batch) needs one forward, then one backward."""
    faults: list[str] = []
    seen: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(table):
        for action in row:
            if action.stage % len(table) != rank or action.stage >= stages:
                faults.append(f"{action} stands in row {rank}, which does not hold that stage")
            key = (action.stage, action.micro_batch)
            expected = 0 if action.kind is ActionKind.FORWARD else 1
            if seen.get(key, 0) != expected:
                faults.append(f"{action} in row {rank} is out of order or repeated")
            seen[key] = seen.get(key, 0) + 1
    missing = [
        f"{stage}/{mb}"
        for stage in range(stages)
        for mb in range(num_micro_batches)
        if seen.get((stage, mb), 0) != 2
    ]
    if missing:
        faults.append(f"stage/micro-batch without forward and backward: {', '.join(missing[:5])}")
    return faults

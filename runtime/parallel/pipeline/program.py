"""Lowering of a schedule table: for each pipeline rank, its actions with the messages between them.

The table is run in rounds: in each, every rank whose next action has its inputs does it; then what was made
goes out. A message is sent right after the action (or pair) that makes it, and its receiver opens a buffer
for it after its own action of the same round: no earlier than needed, and in one order for both ends of every
pair of ranks, so that a transport that keeps the order between two ranks (NCCL) cannot wait in a circle.

A sender keeps a message's tensor until it knows that it arrived: until something comes back that the receiver
sent after it had taken the message. Then the plan's bound on what is alive holds for messages too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.strategy.schedule.schedules import Action, ActionKind, Row, Table


class Message(NamedTuple):
    """Hidden states of one micro-batch from a stage to the next, or their gradient to the one before."""

    sender: int
    receiver: int
    micro_batch: int


class Run(NamedTuple):
    """One action of the row. What a pair of them makes leaves at its end."""

    action: Action


class Send(NamedTuple):
    """Starts sending to pipeline rank `peer`."""

    message: Message
    peer: int


class Receive(NamedTuple):
    """Opens a buffer for what pipeline rank `peer` sends."""

    message: Message
    peer: int


class Await(NamedTuple):
    """Waits until a message is there."""

    message: Message


class Release(NamedTuple):
    """Lets go of a sent tensor, which is known to have arrived."""

    message: Message


Step = Run | Send | Receive | Await | Release
Program = tuple[Step, ...]


def needed_message(action: Action, stages: int) -> Message | None:
    """What must be there before an action can run."""
    forward = action.kind is ActionKind.FORWARD
    sender = action.stage - 1 if forward else action.stage + 1
    if action.kind is ActionKind.WEIGHT_GRAD or not 0 <= sender < stages:
        return None
    return Message(sender, action.stage, action.micro_batch)


def made_message(action: Action, stages: int) -> Message | None:
    """What an action makes for another stage."""
    forward = action.kind is ActionKind.FORWARD
    receiver = action.stage + 1 if forward else action.stage - 1
    if action.kind is ActionKind.WEIGHT_GRAD or not 0 <= receiver < stages:
        return None
    return Message(action.stage, receiver, action.micro_batch)


def lower(table: Table, stages: int, rank_of: Callable[[int], int]) -> tuple[Program, ...]:
    """The program of each pipeline rank; `rank_of` is the rank that holds a stage.

    Raises ValueError where the table waits for itself.
    """
    rows = [_slots(row) for row in table]
    programs: list[list[Step]] = [[] for _ in rows]
    positions = [0] * len(rows)
    made: set[Message] = set()
    while any(position < len(row) for position, row in zip(positions, rows, strict=True)):
        ready = [rank for rank, row in enumerate(rows) if _can_run(row, positions[rank], made, stages)]
        if not ready:
            raise ValueError("the schedule table waits for itself")
        leaving = []
        for rank in ready:
            slot = rows[rank][positions[rank]]
            positions[rank] += 1
            for action in slot:
                need = needed_message(action, stages)
                if need is not None and rank_of(need.sender) != rank:
                    programs[rank].append(Await(need))
                programs[rank].append(Run(action))
            leaving += [m for action in slot if (m := made_message(action, stages)) is not None]
        made.update(leaving)
        for message in leaving:
            source, target = rank_of(message.sender), rank_of(message.receiver)
            if source != target:
                programs[source].append(Send(message, target))
                programs[target].append(Receive(message, source))
    return _with_releases(programs, rank_of)


def _slots(row: Row) -> list[tuple[Action, ...]]:
    """The actions of a row, each alone or as a pair."""
    slots: list[tuple[Action, ...]] = []
    for action in row:
        if slots and slots[-1][-1].paired:
            slots[-1] = (*slots[-1], action)
        else:
            slots.append((action,))
    return slots


def _can_run(row: list[tuple[Action, ...]], position: int, made: set[Message], stages: int) -> bool:
    if position == len(row):
        return False
    needs = (needed_message(action, stages) for action in row[position])
    return all(need is None or need in made for need in needs)


def _with_releases(programs: list[list[Step]], rank_of: Callable[[int], int]) -> tuple[Program, ...]:
    """The programs with a release of each message at the first proof of its arrival, if one comes."""
    proven: dict[Message, list[Message]] = {}
    for program in programs:
        taken: dict[int, list[Message]] = {}
        for step in program:
            if isinstance(step, Await):
                taken.setdefault(rank_of(step.message.sender), []).append(step.message)
            elif isinstance(step, Send):
                proven[step.message] = taken.pop(step.peer, [])
    lowered = []
    for program in programs:
        steps: list[Step] = []
        for step in program:
            steps.append(step)
            if isinstance(step, Await):
                steps += [Release(message) for message in proven[step.message]]
        lowered.append(tuple(steps))
    return tuple(lowered)

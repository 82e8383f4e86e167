"""Executes the plan's own schedule table: every action in its order, and nothing else.

Lowering of a schedule table: for each pipeline rank, its actions with the messages between them.

The table is run in rounds: in each, every rank whose next action has its inputs does it; then what was made
goes out. A message is sent right after the action (or pair) that makes it, and its receiver opens a buffer
for it after its own action of the same round: no earlier than needed, and in one order for both ends of every
pair of ranks, so that a transport that keeps the order between two ranks (NCCL) cannot wait in a circle.

A sender keeps a message's tensor until it knows that it arrived: until something comes back that the receiver
sent after it had taken the message. Then the plan's bound on what is alive holds for messages too.

Messages between the stages of a pipeline: between ranks by send and receive, within a rank by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Action, ActionKind, Row, Table
from runtime.model.transformer import Borders
from runtime.parallel.collectives import is_fake
from runtime.parallel.meshes import Meshes
from runtime.parallel.pipeline.stage import StageModule, StagePasses, hidden_dtype, hidden_shape


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


class Mailbox:
    """What is under way to and from this rank, all of one shape and number format.

    A received tensor is handed out once; a sent one is kept until it is released or the step ends.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._shape, self._dtype, self._device, self._group = shape, dtype, device, group
        self._coming: dict[Message, tuple[Tensor, dist.Work]] = {}
        self._arrived: dict[Message, Tensor] = {}
        self._leaving: dict[Message, tuple[Tensor, dist.Work]] = {}

    def receive(self, message: Message, peer: int) -> None:
        """Opens a buffer for a message of pipeline rank `peer`."""
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if is_fake(self._group):
            buffer.normal_()
        work = dist.irecv(buffer, group=self._group, group_src=peer)
        assert work is not None
        self._coming[message] = buffer, work

    def wait(self, message: Message) -> None:
        """Waits until a message is there."""
        buffer, work = self._coming.pop(message)
        work.wait()
        self._arrived[message] = buffer

    def put(self, message: Message, tensor: Tensor) -> None:
        """Leaves what another stage of this rank will take, or `send` will send."""
        self._arrived[message] = tensor

    def take(self, message: Message) -> Tensor:
        """Hands a message out."""
        return self._arrived.pop(message)

    def send(self, message: Message, peer: int) -> None:
        """Starts sending what was put here to pipeline rank `peer`."""
        tensor = self._arrived.pop(message).contiguous()
        work = dist.isend(tensor, group=self._group, group_dst=peer)
        assert work is not None
        self._leaving[message] = tensor, work

    def release(self, message: Message) -> None:
        """Lets go of a sent tensor. It has arrived, so this does not wait."""
        self._leaving.pop(message)[1].wait()

    def finish(self) -> None:
        """Waits for what is still being sent at a step's end."""
        for message in list(self._leaving):
            self.release(message)
        assert not self._coming and not self._arrived, (self._coming.keys(), self._arrived.keys())

    @property
    def held(self) -> tuple[int, int]:
        """How many buffers of messages to this rank it holds, and how many sent tensors."""
        return len(self._coming) + len(self._arrived), len(self._leaving)


class Pipeline:
    """This rank's stages and its program: its row of the schedule table, with messages."""

    def __init__(self, plan: Plan, modules: Sequence[StageModule], meshes: Meshes, device: torch.device):
        degrees = plan.strategy.degrees
        self.modules = list(modules)
        self.record = modules[0].record
        self._num_micro_batches, self._stages = degrees.num_micro_batches, degrees.stages
        table, rank = plan.table, meshes.pp.get_local_rank()
        self.program = lower(table, degrees.stages, degrees.pp_rank_of_stage)[rank]
        self.passes = {
            module.index: StagePasses(module, table[rank], degrees.num_micro_batches) for module in modules
        }
        self.mailbox = Mailbox(hidden_shape(plan), hidden_dtype(plan), device, meshes.pp.get_group())

    def run(self, inputs: Tensor, targets: Tensor, borders: Borders | None = None) -> Tensor:
        """Forward and backward of every micro-batch; the mean loss here, 0 without the last stage.

        Every stage has the borders of documents from its own reading of the data.
        """
        self.record.clear()
        parts = self._num_micro_batches
        within = [None] * parts if borders is None else borders.chunk(parts)
        batch = _Batch(inputs.chunk(parts), targets.chunk(parts), within)
        with warnings.catch_warnings():
            # The embedding's output is a view of a DTensor; nothing in the model writes to it in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            # torch.compile looks whether a block's input has one, each time it compiles.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            for step in self.program:
                self._do(step, batch)
            self.mailbox.finish()
        total = torch.zeros((), dtype=torch.float32, device=inputs.device)
        return total + sum(batch.losses)

    def _do(self, step: Step, batch: _Batch) -> None:
        match step:
            case Run(action):
                self._run(action, batch)
            case Send(message, peer):
                self.mailbox.send(message, peer)
            case Receive(message, peer):
                self.mailbox.receive(message, peer)
            case Await(message):
                self.mailbox.wait(message)
            case Release(message):
                self.mailbox.release(message)

    def _run(self, action: Action, batch: _Batch) -> None:
        """One action: takes what it needs from the mailbox, and puts there what it makes."""
        passes, last = self.passes[action.stage], action.stage == self._stages - 1
        need, makes = needed_message(action, self._stages), made_message(action, self._stages)
        taken = None if need is None else self.mailbox.take(need)
        made: Tensor | None = None
        match action.kind:
            case ActionKind.FORWARD:
                x = batch.inputs[action.micro_batch] if taken is None else taken
                targets = batch.targets[action.micro_batch] if last else None
                made = passes.forward(action, x, targets, batch.borders[action.micro_batch])
                if last:
                    batch.losses.append(made)
            case ActionKind.BACKWARD | ActionKind.INPUT_GRAD:
                made = passes.backward(action, taken)
            case ActionKind.WEIGHT_GRAD:
                passes.weight_gradients(action)
        if makes is not None:
            assert made is not None
            self.mailbox.put(makes, made)


class _Batch:
    """One step's micro-batches, and the losses that came of them."""

    def __init__(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], borders: Sequence[Borders | None]
    ) -> None:
        self.inputs, self.targets, self.borders = inputs, targets, borders
        self.losses: list[Tensor] = []

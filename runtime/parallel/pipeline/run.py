"""Executes the plan's own schedule table: every action in its order, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Action, ActionKind, parse_table
from runtime.model.borders import Borders
from runtime.parallel.meshes import Meshes
from runtime.parallel.pipeline.mailbox import Mailbox
from runtime.parallel.pipeline.program import (
    Await,
    Receive,
    Release,
    Run,
    Send,
    Step,
    lower,
    made_message,
    needed_message,
)
from runtime.parallel.pipeline.stage import StageModule, StagePasses, hidden_dtype, hidden_shape


class Pipeline:
    """This rank's stages and its program: its row of the schedule table, with messages."""

    def __init__(self, plan: Plan, modules: Sequence[StageModule], meshes: Meshes, device: torch.device):
        degrees = plan.strategy.degrees
        self.modules = list(modules)
        self.record = modules[0].record
        self._num_micro_batches, self._stages = degrees.num_micro_batches, degrees.stages
        table, rank = parse_table(plan.schedule_table), meshes.pp.get_local_rank()
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

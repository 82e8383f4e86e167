"""One stage of a pipeline on this rank: its model, and the passes of its micro-batches.

When each unit of data parallelism of a stage reduces its gradients, and frees its gathered parameters.

A unit's gradients of a micro-batch are complete after the pass that computes the last of them: after B or I,
and after B or W in a block whose weight gradients are deferred. ZeRO 2 and 3 reduce a unit in every pass that
completes it, so that whole gradients never outlive a micro-batch; ZeRO 0 and 1 in the last one of a step. All
but ZeRO 3 keep gathered parameters until the last pass of a step that reads them, which is no W.

What a rank really did in its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from planner.model.attention import CpExchange
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Action, ActionKind, Row
from planner.strategy.strategy import Zero
from runtime.model.precision import compute_dtype
from runtime.model.transformer import Borders, Transformer
from runtime.parallel.context import ContextCore
from runtime.parallel.data import end_backward, end_unit, groups_of, set_unit, units_of
from runtime.parallel.deferred_gradients import Deferred, deferred_of


class GradientUnits:
    """The units of one stage, whose actions in a step are `actions`."""

    def __init__(self, model: Transformer, actions: Sequence[Action]) -> None:
        self.model = model
        self._last_read = _last(actions, ActionKind.BACKWARD, ActionKind.INPUT_GRAD)
        self._last_weights = _last(actions, ActionKind.BACKWARD, ActionKind.WEIGHT_GRAD)
        self._deferred: list[tuple[nn.Module, Deferred]] = []
        for block in model.layers.values():
            if (deferred := deferred_of(block)) is not None:
                self._deferred.append((block, deferred))
        blocks = {id(block) for block, _ in self._deferred}
        self._deferring = [unit for unit in units_of(model) if id(unit) in blocks]
        self._whole = [unit for unit in units_of(model) if id(unit) not in blocks]

    def prepare(self, action: Action, zero: Zero) -> list[bool]:
        """Makes ready for a backward pass or its parts.

        Returns whether the units that it completes will reduce, read from FSDP's own state; nothing where
        it completes none.
        """
        kind = action.kind
        reads, weights = kind is not ActionKind.WEIGHT_GRAD, kind is not ActionKind.INPUT_GRAD
        reshard = zero is Zero.PARAMETERS or action == self._last_read
        always = zero >= Zero.GRADIENTS
        for unit in self._whole:
            set_unit(unit, reduce=reads and (always or action == self._last_read), reshard=reshard)
        for unit in self._deferring:
            set_unit(unit, reduce=weights and (always or action == self._last_weights), reshard=reshard)
        for _, deferred in self._deferred:
            deferred.micro_batch = None if weights else action.micro_batch
        completed = (self._whole if reads else []) + (self._deferring if weights else [])
        groups = [group for unit in completed for group in groups_of(unit)]
        return [all(group.reduce_grads for group in groups)] if groups else []

    def add_deferred(self, micro_batch: int) -> None:
        """Computes the gradients that wait for a micro-batch, block by block as a backward pass does."""
        for block, deferred in reversed(self._deferred):
            deferred.add_gradients(micro_batch)
            if isinstance(block, FSDPModule):
                end_unit(block)
        end_backward(self.model)

    @property
    def waiting(self) -> int:
        """Of how many micro-batches weight gradients wait."""
        return max((deferred.waiting for _, deferred in self._deferred), default=0)


def _last(actions: Sequence[Action], *kinds: ActionKind) -> Action:
    return [action for action in actions if action.kind in kinds][-1]


@dataclass
class Record:
    """What a rank did in its last step: its actions, and whether gradients were reduced when complete.

    `exchanges` are the attentions over a sequence that ranks share out: how, and among how many.
    `spans` has the name, begin and end of each action and part of the step, if `clock` is set. It is set
    for one step of a run; on CUDA it waits for the device, so that step is slower than others.
    """

    actions: list[Action] = field(default_factory=list)
    reduced: list[bool] = field(default_factory=list)
    exchanges: list[tuple[CpExchange, int]] = field(default_factory=list)
    clock: Callable[[], float] | None = None
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str | None = None) -> Iterator[None]:
        """Notes how long the body takes, under `name` or as the last action."""
        if self.clock is None:
            yield
            return
        begin = self.clock()
        yield
        self.spans.append((name or str(self.actions[-1]), begin, self.clock()))

    def clear(self) -> None:
        self.actions.clear()
        self.reduced.clear()
        self.exchanges.clear()
        self.spans.clear()


class StageModule(nn.Module):
    """A stage's model with a record of what it did in the last step."""

    def __init__(self, model: Transformer, index: int, zero: Zero, record: Record) -> None:
        super().__init__()
        self.model, self.index, self.zero, self.record = model, index, zero, record
        self.hidden_shape: tuple[int, ...] | None = None
        for layer in list(model.layers.values())[:1]:
            layer.register_forward_pre_hook(self._see_hidden)
        for part in model.modules():
            if isinstance(part, ContextCore):
                # What grows with every pass is no input of a compiled block.
                eager = torch.compiler.disable(self._see_exchange)  # type: ignore[no-untyped-call]
                part.register_forward_pre_hook(eager)

    def _see_hidden(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.hidden_shape = tuple(args[0].shape)

    def _see_exchange(self, core: nn.Module, _args: tuple[Any, ...]) -> None:
        assert isinstance(core, ContextCore)
        self.record.exchanges.append((core.exchange, core.ranks))

    def forward(self, x: Tensor, targets: Tensor | None, borders: Borders | None = None) -> Tensor:
        """Hidden states; on the last stage the mean loss of the targets."""
        within = {} if borders is None else {"borders": borders}
        out: Tensor = self.model(x, **within) if targets is None else self.model(x, targets, **within)
        return out


class StagePasses:
    """Runs the actions of a stage and holds, of each micro-batch alive, its input and its graph.

    The output's values are not held: the next stage has them.
    """

    def __init__(self, module: StageModule, row: Row, num_micro_batches: int) -> None:
        self.module, self.record, self._share = module, module.record, 1 / num_micro_batches
        self._units = GradientUnits(module.model, [a for a in row if a.stage == module.index])
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[int, GradientEdge] = {}

    def forward(
        self, action: Action, x: Tensor, targets: Tensor | None, borders: Borders | None = None
    ) -> Tensor:
        """The output of a micro-batch, or its part of the step's mean loss; cut from the graph."""
        if x.is_floating_point():
            x = x.detach().requires_grad_()
            self._inputs[action.micro_batch] = x
        self.record.actions.append(action)
        with self.record.span():
            out = self.module(x, targets, borders)
            if targets is not None:
                out = out * self._share
        self._graphs[action.micro_batch] = get_gradient_edge(out)
        cut: Tensor = out.detach()
        return cut

    def backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        """A whole backward pass or its input part: the gradient of the stage's input, if it has one.

        `gradient` is that of the output; None for a loss.
        """
        graph, x = self._graphs.pop(action.micro_batch), self._inputs.pop(action.micro_batch, None)
        self._prepare(action)
        with self.record.span():
            torch.autograd.backward((graph,), None if gradient is None else (gradient,))
        return None if x is None else x.grad

    def weight_gradients(self, action: Action) -> None:
        """The weight gradients that the micro-batch's input pass left."""
        self._prepare(action)
        with self.record.span():
            self._units.add_deferred(action.micro_batch)

    def _prepare(self, action: Action) -> None:
        self.record.actions.append(action)
        self.record.reduced += self._units.prepare(action, self.module.zero)

    @property
    def alive(self) -> int:
        """How many micro-batches' activations it holds."""
        return len(self._graphs)

    @property
    def deferred(self) -> int:
        """Of how many micro-batches weight gradients wait."""
        return self._units.waiting


def hidden_shape(plan: Plan) -> tuple[int, int, int]:
    """The hidden states of one micro-batch that one rank holds between parts: [B, S/cp or S/cp/tp, H]."""
    degrees = plan.strategy.degrees
    seq = plan.workload.seq // degrees.cp // (degrees.tp if degrees.sequence_parallel else 1)
    return degrees.micro_batch, seq, plan.model.hidden


def hidden_dtype(plan: Plan) -> torch.dtype:
    """The number format of hidden states."""
    return compute_dtype(plan.workload.precision)

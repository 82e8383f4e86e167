"""One stage of a pipeline on this rank: its model, and the passes of its micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Action, Row
from planner.strategy.strategy import Zero
from runtime.model.borders import Borders
from runtime.model.precision import compute_dtype
from runtime.model.transformer import Transformer
from runtime.parallel.context import ContextCore
from runtime.parallel.pipeline.gradient_units import GradientUnits
from runtime.parallel.pipeline.record import Record


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

"""When each unit of data parallelism of a stage reduces its gradients, and frees its gathered parameters.

A unit's gradients of a micro-batch are complete after the pass that computes the last of them: after B or I,
and after B or W in a block whose weight gradients are deferred. ZeRO 2 and 3 reduce a unit in every pass that
completes it, so that whole gradients never outlive a micro-batch; ZeRO 0 and 1 in the last one of a step. All
but ZeRO 3 keep gathered parameters until the last pass of a step that reads them, which is no W.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from planner.strategy.schedule.schedules import Action, ActionKind
from planner.strategy.strategy import Zero
from runtime.model.transformer import Transformer
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

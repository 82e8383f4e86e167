"""What shapes of one model share: costs of layers by kind, and messages of units by their sharding."""

from __future__ import annotations

from typing import NamedTuple

from planner.cost.compute import LayerModel
from planner.cost.kind_layers import Kind, KindLayers, kind_of
from planner.cost.messages import Messages
from planner.cost.passes import Pass, Unit
from planner.cost.wrapped import Units


class UnitMessages(NamedTuple):
    """What data parallelism sends of each unit: to gather all of it or what is updated, and to reduce it."""

    gathers: dict[Unit, Pass]
    updates: dict[Unit, Pass]
    reduces: dict[Unit, Pass]


class SharedCosts:
    """Costs that many shapes of one problem have in common, made where one asks for them."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, KindLayers] = {}
        self._sent: dict[tuple[object, ...], UnitMessages] = {}

    def layers(self, messages: Messages, model: LayerModel) -> KindLayers:
        """The layers of a shape."""
        kind = kind_of(messages.degrees)
        if kind not in self._kinds:
            self._kinds[kind] = KindLayers(messages.problem, messages.degrees, model, messages)
        return self._kinds[kind]

    def sent(self, messages: Messages, units: Units) -> UnitMessages:
        """The messages of a shape's units."""
        d = messages.degrees
        key = d.tp, d.pp, d.cp, d.ep, d.etp, d.dp_shard, d.dp_replicate, d.zero
        if key not in self._sent:
            each = units.all()
            gathers = {unit: messages.gather(unit.dense_params, unit.routed_params) for unit in each}
            updates = gathers
            if messages.problem.workload.adapters is not None:
                updates = {unit: messages.gather(unit.trained) for unit in each}
            self._sent[key] = UnitMessages(gathers, updates, {unit: messages.reduce(unit) for unit in each})
        return self._sent[key]

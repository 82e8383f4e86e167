"""What shapes of one model share: costs of layers by kind, and messages of units by their sharding."""

from __future__ import annotations

from functools import cached_property

from planner.cost.communication.messages import Messages
from planner.cost.passes import Pass, Unit
from planner.cost.stage.fsdp_units import Units
from planner.cost.stage.kind_layers import Kind, KindLayers, kind_of
from planner.cost.stage.layer_cost import LayerModel


class UnitMessages:
    """What data parallelism sends of each unit, worked out where it is asked for."""

    def __init__(self, messages: Messages, units: Units) -> None:
        self._messages, self._units = messages, units.all()

    @cached_property
    def gathers(self) -> dict[Unit, Pass]:
        """To gather all of a unit."""
        gather = self._messages.gather
        return {unit: gather(unit.dense_params, unit.routed_params) for unit in self._units}

    @cached_property
    def updates(self) -> dict[Unit, Pass]:
        """To gather what an update changes: all, or beside frozen weights what is trained."""
        if self._messages.problem.workload.adapters is None:
            return self.gathers
        return {unit: self._messages.gather(unit.trained) for unit in self._units}

    @cached_property
    def reduces(self) -> dict[Unit, Pass]:
        """To reduce its gradients."""
        return {unit: self._messages.reduce(unit) for unit in self._units}


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
            self._sent[key] = UnitMessages(messages, units)
        return self._sent[key]

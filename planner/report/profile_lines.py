"""The cost model's own answers beside a profile's samples: by the samples, and from first principles."""

from __future__ import annotations

import dataclasses

from planner.cost.communication.collectives import CommModel, Group
from planner.cost.constants import problem_time_constants
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.hardware.catalog import device_names, load_device, load_model
from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link, unknown_device
from planner.job.engine_settings import EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.profile.profile import CommSample, LayerKind, LayerSample, Profile

ANY_MODEL = "shardwise-demo"
"""Collectives do not depend on the model of the problem that they are part of."""

FREE = Link(name="not shown", latency_s=0.0, bytes_per_s=None)


class ProfileLines:
    """What plans on one profile's device are charged for a layer or a collective."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.device = profile, device_of(profile)
        self._layers: dict[tuple[str, Precision, int, bool, bool], LayerModel] = {}
        problem = self._problem(load_model(ANY_MODEL), Precision.FP32, 1, profile)
        self._comms = CommModel(problem)

    def cost(
        self, model: ModelSpec, sample: LayerSample, micro_batch: float, *, sampled: bool = True
    ) -> LayerCost | None:
        """The cost of a sample's layer at some micro-batch; without any samples where `sampled` is not.

        None where there are no samples and the device's rates are not known.
        """
        found = self._layer_model(model, sample, sampled)
        if not sampled and found.rates is None:
            return None
        return found.cost(shape_of(model, sample, micro_batch))

    def comm_s(self, sample: CommSample, size_bytes: float) -> float:
        """Seconds of a sample's collective at some size."""
        group = Group(
            ranks=sample.ranks,
            groups=sample.groups,
            spans_nodes=sample.nodes > 1,
            nodes=sample.nodes if sample.nodes > 1 else None,
            stride=sample.stride,
        )
        return self._comms.cost(sample.op, size_bytes, group).seconds

    def _layer_model(self, model: ModelSpec, sample: LayerSample, sampled: bool) -> LayerModel:
        key = model.name, sample.precision, sample.seq, sample.compiled, sampled
        if key not in self._layers:
            profile = self.profile if sampled else dataclasses.replace(self.profile, layers=())
            problem = self._problem(model, sample.precision, sample.seq, profile)
            problem = dataclasses.replace(problem, engine_settings=EngineSettings(compiled=sample.compiled))
            self._layers[key] = LayerModel(problem, problem_time_constants(problem))
        return self._layers[key]

    def _problem(self, model: ModelSpec, precision: Precision, seq: int, profile: Profile) -> PlanningProblem:
        return PlanningProblem(
            model=model,
            workload=Workload(seq=seq, batch=1, precision=precision),
            cluster=_node(self.device, profile),
            profile=profile,
            memory_limit_bytes=self.device.usable_memory_bytes,
        )


def shape_of(model: ModelSpec, sample: LayerSample, micro_batch: float) -> LayerShape:
    """A sample's layer at another micro-batch."""
    return LayerShape(
        kind=sample.kind,
        tp=sample.tp,
        sequence_parallel=sample.sequence_parallel,
        micro_batch=micro_batch,
        seq=sample.seq,
        precision=sample.precision,
        recompute=sample.recompute,
        block=sample.shape_key if sample.kind is LayerKind.BLOCK else "",
        rotary=model.rotary,
        cp=sample.cp,
        cp_exchange=sample.cp_exchange or CpExchange.RING,
        ep=sample.ep,
        etp=sample.etp,
    )


def device_of(profile: Profile) -> Device:
    """The device of the catalog that a profile was measured on; one of unknown peaks where it has none."""
    if profile.device in device_names():
        return load_device(profile.device).device()
    return unknown_device(profile.device, profile.device_title)


def _node(device: Device, profile: Profile) -> ClusterSpec:
    group = DeviceGroup(
        device=device,
        nodes=1,
        devices_per_node=profile.devices_per_node,
        slots_per_node=profile.slots_per_node,
    )
    return ClusterSpec(
        name=f"1x{profile.devices_per_node}:{device.name}", groups=(group,), intra=FREE, inter=FREE
    )

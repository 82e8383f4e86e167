"""One change of a planning problem at a time: more nodes, faster links, another batch, another optimizer.

Every function takes a problem and returns another, or None where the change has no meaning for it.

Single changes after which an engine no longer refuses a problem: precision, method, or another engine.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from planner.calibration.software import settings_for_engine
from planner.cost.communication.collectives import CommModel, Group
from planner.cost.constants import problem_time_constants
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision
from planner.profile.profile import PROFILE_SCHEMA, Constant, Op, OperatorSample, Profile
from planner.strategy.engines.engine_rules import problem_refused
from planner.strategy.strategy import Degrees

LORA_RANK = 16
"""Rank of adapters where LoRA is tried: the default of `--lora-rank`."""
_NODES = re.compile(r"^([0-9]+)(\s*[x*].*)$")


@frozen
class Change:
    """A changed problem, what was changed in words, and the flag that does it."""

    change: str
    flag: str
    problem: PlanningProblem


def with_limit(problem: PlanningProblem, limit_bytes: int) -> PlanningProblem:
    """The same devices with another memory limit; where kinds have their own, each as much more or less."""
    more = limit_bytes - problem.memory_limit_bytes
    each = tuple((name, own + more) for name, own in problem.device_limits_bytes)
    return dataclasses.replace(problem, memory_limit_bytes=limit_bytes, device_limits_bytes=each)


def with_workload(problem: PlanningProblem, **values: object) -> PlanningProblem:
    """The same problem with other values of the workload."""
    return dataclasses.replace(
        problem,
        workload=dataclasses.replace(problem.workload, **values),  # type: ignore[arg-type]
    )


def nodes_of(cluster: ClusterSpec) -> int | None:
    """Nodes of a cluster that can have more of the same; None: mixed, or this machine."""
    if cluster.local or len(cluster.groups) != 1:
        return None
    return cluster.groups[0].nodes


def with_nodes(problem: PlanningProblem, nodes: int) -> PlanningProblem | None:
    """The same kind of nodes, more or fewer of them, at the same price a node."""
    cluster = problem.cluster
    now = nodes_of(cluster)
    if now is None or nodes < 1:
        return None
    if nodes == now:
        return problem
    price = cluster.price_usd_per_hour
    changed = _grown(cluster, nodes / now)
    if changed is None:
        return None
    changed = dataclasses.replace(
        changed,
        price_usd_per_hour=None if price is None else price * nodes / now,
        price_sources=cluster.price_sources,
    )
    return dataclasses.replace(problem, cluster=changed)


def _grown(cluster: ClusterSpec, factor: float) -> ClusterSpec | None:
    """A cluster by its name with so many times the nodes; where a file describes it, its group with more.

    Reading the name again gives a network that joins nodes where one node has none of its own, and counts
    domains of devices anew. None where no network between nodes is known.
    """
    from planner.hardware.cluster_text import parse_cluster

    match = _NODES.match(cluster.name)
    if match:
        typed = int(match.group(1))
        try:
            if dataclasses.replace(parse_cluster(cluster.name), price_usd_per_hour=None).groups == (
                cluster.groups
            ):
                return parse_cluster(f"{round(typed * factor)}{match.group(2)}")
        except InputError:
            return None
    group = cluster.groups[0]
    nodes = round(group.nodes * factor)
    if nodes > 1 and cluster.inter == cluster.intra and cluster.inter.bytes_per_s is not None:
        return None
    return dataclasses.replace(
        cluster,
        name=f"{cluster.name} with {nodes} nodes",
        groups=(dataclasses.replace(group, nodes=nodes),),
    )


def faster_network(problem: PlanningProblem, factor: float) -> PlanningProblem | None:
    """The network between nodes at so many times its rate; its latency stays."""
    cluster = problem.cluster
    if sum(group.nodes for group in cluster.groups) == 1 or cluster.inter.bytes_per_s is None:
        return None
    link = dataclasses.replace(cluster.inter, bytes_per_s=cluster.inter.bytes_per_s * factor)
    return dataclasses.replace(problem, cluster=dataclasses.replace(cluster, inter=link))


ON_ONE_NODE = ("tp_scale", "dp_scale", "pp_scale", "cp_scale", "ep_scale")
"""Constants that scale messages which stay in a node where there is one node."""
LARGE_BYTES = float(1 << 34)
FAR = 1e3
"""A message whose latency does not count, and how much a link is changed to see what the other bounds."""


def faster_links(problem: PlanningProblem, factor: float, degrees: Degrees) -> PlanningProblem | None:
    """Messages that stay in a node take 1/factor of their time, measured or not.

    On several nodes these are the tensor-parallel ones, which never leave one (the loss's small ones stay),
    and data-parallel ones as far as the ring of these degrees is bound by the links in nodes; that share is
    taken for other degrees too.
    """
    cluster = problem.cluster
    if cluster.intra.bytes_per_s is None or cluster.devices_per_node == 1:
        return None
    constants = problem_time_constants(problem)
    if sum(group.nodes for group in cluster.groups) == 1:
        gains = dict.fromkeys(ON_ONE_NODE, factor)
    else:
        gains = {"tp_scale": factor, "dp_scale": _ring_gain(problem, factor, degrees)}
    return _with_constants(problem, {name: getattr(constants, name) / gain for name, gain in gains.items()})


def _ring_gain(problem: PlanningProblem, factor: float, degrees: Degrees) -> float:
    """How much faster the data-parallel ring of these degrees is with so much faster links in nodes.

    Its time is the longer of what either level takes: with the other made FAR faster or slower, each shows.
    """
    span = degrees.tp * degrees.replicas
    per_node = problem.cluster.devices_per_node
    if degrees.replicas == 1 or span <= per_node or problem.cluster.inter.bytes_per_s is None:
        return factor
    nodes = math.ceil(span / per_node)
    group = Group(ranks=degrees.replicas, groups=1, spans_nodes=True, nodes=min(nodes, degrees.replicas))

    def seconds(network: float) -> float:
        changed = faster_network(problem, network)
        assert changed is not None, "several nodes, whose messages take time"
        return CommModel(changed).cost(Op.ALL_GATHER, LARGE_BYTES, group).seconds

    inside_s, between_s = seconds(FAR), seconds(1 / FAR) / FAR
    return min(factor, max(1.0, seconds(1.0) / max(inside_s / factor, between_s)))


def _with_constants(problem: PlanningProblem, values: dict[str, float]) -> PlanningProblem:
    """Constants that hold for this problem alone, before all others of its profile."""
    settings = problem.engine_settings
    own = tuple(
        Constant(
            name=name,
            value=value,
            origin="asked",
            device=problem.device.name,
            framework=settings.framework,
            kernels=settings.kernels,
            engine=settings.engine.family,
            network=problem.cluster.network,
        )
        for name, value in values.items()
    )
    profile = problem.profile or _empty_profile(problem)
    return dataclasses.replace(
        problem, profile=dataclasses.replace(profile, constants=(*own, *profile.constants))
    )


def _empty_profile(problem: PlanningProblem) -> Profile:
    device = problem.device
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name="asked",
        device=device.name,
        device_title=device.title,
        backend="",
        created="",
        versions={},
        devices_per_node=problem.cluster.devices_per_node,
        slots_per_node=None,
        layers=(),
        comms=(),
        contention=(),
        constants=(),
    )


PEAKS = ("peak_fp32_flops", "peak_bf16_flops", "peak_fp16_flops", "peak_fp8_flops")


def faster_devices(problem: PlanningProblem, factor: float) -> PlanningProblem:
    """Devices whose matrix units and memory are so many times as fast; host and links stay."""

    def faster(device: Device) -> Device:
        rates = {name: getattr(device, name) for name in (*PEAKS, "memory_bandwidth_bytes_per_s")}
        return dataclasses.replace(
            device, **{name: rate * factor for name, rate in rates.items() if rate is not None}
        )

    groups = tuple(dataclasses.replace(g, device=faster(g.device)) for g in problem.cluster.groups)
    changed = dataclasses.replace(problem, cluster=dataclasses.replace(problem.cluster, groups=groups))
    profile = problem.profile
    if profile is None:
        return changed
    layers = tuple(
        dataclasses.replace(s, forward_s=s.forward_s / factor, backward_s=s.backward_s / factor)
        for s in profile.layers
    )
    constants = tuple(
        dataclasses.replace(c, value=c.value * factor) if c.name in MEASURED_RATES else c
        for c in profile.constants
    )
    rates = tuple(_faster(sample, factor) for sample in profile.rates)
    return dataclasses.replace(
        changed, profile=dataclasses.replace(profile, layers=layers, constants=constants, rates=rates)
    )


def _faster(sample: OperatorSample, factor: float) -> OperatorSample:
    """An operator on a device that is faster by a factor."""
    backward_s = None if sample.backward_s is None else sample.backward_s / factor
    return dataclasses.replace(sample, forward_s=sample.forward_s / factor, backward_s=backward_s)


MEASURED_RATES = ("gemm_flops", "memory_bytes_per_s")
"""Constants of a measured profile that stand for the device's own rates."""


def other_optimizers(problem: PlanningProblem) -> Iterable[Change]:
    """Each optimizer that keeps less state."""
    now = problem.workload.optimizer
    for optimizer in (Optimizer.MUON, Optimizer.ADAFACTOR, Optimizer.SGD):
        if optimizer is not now and optimizer.state_bytes <= now.state_bytes:
            yield Change(
                change=f"optimizer {optimizer} instead of {now}",
                flag=f"--optimizer {optimizer}",
                problem=with_workload(problem, optimizer=optimizer),
            )


def lora(problem: PlanningProblem) -> Iterable[Change]:
    """Adapters beside frozen weights, where all weights are trained."""
    if problem.workload.method is not Method.LORA:
        adapters = Adapters(rank=LORA_RANK, modules=AdapterModules.ALL)
        yield Change(
            change=f"train adapters of rank {LORA_RANK} (LoRA) instead of all weights",
            flag="--method lora",
            problem=with_workload(problem, method=Method.LORA, adapters=adapters),
        )


def narrower(problem: PlanningProblem) -> Iterable[Change]:
    """bf16 where fp32 is asked for and every device has a rate for it."""
    devices = [group.device for group in problem.cluster.groups]
    if problem.workload.precision is Precision.FP32 and all(d.peak_bf16_flops for d in devices):
        yield Change(
            change="precision bf16 instead of fp32",
            flag="--precision bf16",
            problem=with_workload(problem, precision=Precision.BF16),
        )


def accepted(problem: PlanningProblem) -> Iterator[Change]:
    """Changes that an engine's rules of problems accept; none where they refuse nothing."""
    if not problem_refused(problem):
        return
    changes = (*_workloads(problem), *_engines(problem))
    yield from (change for change in changes if not problem_refused(change.problem))


def _workloads(problem: PlanningProblem) -> Iterator[Change]:
    workload = problem.workload
    devices = [group.device for group in problem.cluster.groups]
    if workload.precision is not Precision.BF16 and all(d.peak_bf16_flops for d in devices):
        changed = with_workload(problem, precision=Precision.BF16)
        words = f"precision bf16 instead of {workload.precision}"
        yield Change(change=words, flag="--precision bf16", problem=changed)
    if workload.method is Method.LORA:
        changed = with_workload(problem, method=Method.FINETUNE, adapters=None)
        words = "train all weights instead of adapters"
        yield Change(change=words, flag="--method finetune", problem=changed)
    if workload.optimizer is not Optimizer.ADAMW:
        changed = with_workload(problem, optimizer=Optimizer.ADAMW)
        words = f"optimizer adamw instead of {workload.optimizer}"
        yield Change(change=words, flag="--optimizer adamw", problem=changed)


def _engines(problem: PlanningProblem) -> Iterator[Change]:
    """The other engines, each at its own prices."""
    limits = problem.limits
    for engine in Engine:
        if engine is not limits.engine:
            yield Change(
                change=f"{engine} instead of {limits.engine}",
                flag=f"--engine {engine}",
                problem=dataclasses.replace(
                    problem,
                    limits=dataclasses.replace(limits, engine=engine),
                    engine_settings=settings_for_engine(engine, problem.profile, problem.cluster),
                ),
            )

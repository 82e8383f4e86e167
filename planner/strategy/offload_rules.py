"""The rules of offloading: what a strategy keeps in host memory, and where that is possible."""

from __future__ import annotations

import math

from planner.foundation.units import GIB
from planner.job.problem import PlanningProblem
from planner.model.workload import Optimizer
from planner.strategy.estimate import Rejected
from planner.strategy.placement import seen_from, stage_groups
from planner.strategy.strategy import Offload, OffloadCounts, Stage, Strategy


def offload_possible(problem: PlanningProblem, strategy: Strategy) -> list[Rejected]:
    """What is offloaded crosses a link of known rate to a memory of the node's own, and fits there."""
    if not strategy.offloads:
        return _offload_counts(strategy)
    return [
        *_link_known(problem, strategy),
        *_updated_by_elements(problem, strategy),
        *_offload_counts(strategy),
        *_host_memory(problem, strategy),
    ]


def _offloading(problem: PlanningProblem, strategy: Strategy) -> list[tuple[Stage, PlanningProblem]]:
    """The stages that offload something, with the problem as their pipeline rank meets it."""
    placed = stage_groups(problem.cluster, strategy.degrees, len(strategy.stages))
    return [
        (stage, seen_from(problem, groups))
        for stage, groups in zip(strategy.stages, placed, strict=True)
        if stage.offload != OffloadCounts()
    ]


def _link_known(problem: PlanningProblem, strategy: Strategy) -> list[Rejected]:
    groups = [group for _, seen in _offloading(problem, strategy) for group in seen.cluster.groups]
    devices = dict.fromkeys(group.device for group in groups)
    unknown = [device.name for device in devices if not device.host_link_bytes_per_s]
    if not unknown:
        return []
    why = f"the rate between {', '.join(unknown)} and the memory of its node is not known"
    if problem.cluster.local:
        why = "processes on a CPU have no memory but the host's"
    return [
        Rejected(
            rule="offload_link_known",
            detail=f"offload={'+'.join(strategy.offloads)}: {why}.",
            legal="offload=none, or a device whose file has [pcie]",
            fix="--fix offload=none",
        )
    ]


def _updated_by_elements(problem: PlanningProblem, strategy: Strategy) -> list[Rejected]:
    workload = problem.workload
    if Offload.OPTIMIZER not in strategy.offloads:
        return []
    if workload.adapters is None and workload.optimizer is not Optimizer.MUON:
        return []
    why = "muon multiplies matrices" if workload.adapters is None else "an adapter's state is small and stays"
    return [
        Rejected(
            rule="offload_optimizer",
            detail=f"offload=optimizer updates element by element on the node's processors; {why}.",
            legal="offload=none or activations, or --optimizer adamw, sgd or adafactor without adapters",
            fix="--fix offload=none",
        )
    ]


def _offload_counts(strategy: Strategy) -> list[Rejected]:
    return [
        Rejected(
            rule="offload_counts",
            detail=f"stage {index} holds {stage.layers} layers and offloads the optimizer state of "
            f"{stage.offload.optimizer}, the activations of {stage.offload.activations}.",
            legal=f"0 to {stage.layers} each",
        )
        for index, stage in enumerate(strategy.stages)
        if min(stage.offload.optimizer, stage.offload.activations) < 0
        or max(stage.offload.optimizer, stage.offload.activations) > stage.layers
    ]


def _host_memory(problem: PlanningProblem, strategy: Strategy) -> list[Rejected]:
    """Masters and state alone: 4 bytes and the optimizer's for each parameter that a stage offloads."""
    found = [_too_full(seen, strategy, stage) for stage, seen in _offloading(problem, strategy)]
    return [max(full, key=lambda each: each[0])[1]] if (full := [each for each in found if each]) else []


def _too_full(problem: PlanningProblem, strategy: Strategy, stage: Stage) -> tuple[float, Rejected] | None:
    """By how much a stage's state is over a device's share of host memory, and that in words."""
    share, degrees, model = problem.cluster.host_memory_bytes_per_device, strategy.degrees, problem.model
    dense = (model.params_blocks - model.params_routed) / degrees.tp / degrees.weight_shards
    routed = model.params_routed / degrees.expert_ranks / degrees.expert_shards
    params = (dense + routed) / model.layers * stage.offload.optimizer
    needed = params * (4 + problem.workload.optimizer.state_bytes)
    if share is None or needed <= share:
        return None
    devices, shards = problem.cluster.devices_per_node, degrees.weight_shards * needed / share
    return needed / share, Rejected(
        rule="offload_fits_host",
        detail=f"offload=optimizer puts {needed * devices / GIB:.0f} GiB into the memory of a node, "
        f"which has {share * devices / GIB:.0f} GiB.",
        legal=f"{math.ceil(shards)} or more shards of the optimizer's state (zero 1 to 3 over dp), or "
        "offload=none",
        fix="--fix zero= or tp=, pp=",
    )

"""The cost model's own answer beside the napkin: the least devices that hold the training, and their speed.

Only sharded data parallelism and tensor parallelism inside a node are tried, with every recompute option:
what a first run uses. `plan solve` searches the whole space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planner.cost.evaluate import CostModel, Evaluation
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_grammar import join, shaped_part
from planner.hardware.prices import Market
from planner.job.engine_settings import own_stack
from planner.job.problem import PlanningProblem
from planner.model.saved_tensors import Recompute
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.strategy.estimate import MemoryBreakdown, Verdict
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

STEP_TOKENS = 2**22
"""Tokens of a global step: 4 Mi, as GPT-3 (3.2M) and Llama 2 (4M) took. It sets how often weights are
gathered and gradients reduced, and does not change memory."""

MOST_MICRO_BATCHES = 256
"""Micro-batches of a step at most: more change no memory and hardly the speed, and take long to replay."""

DEVICES_PER_NODE = 8
MOST_DEVICES = 2**17
TP_DEGREES = (1, 2, 4, 8)
RANK = {Verdict.SAFE: 0, Verdict.RISKY: 1, Verdict.NO: 2}


@frozen
class OwnEstimate:
    """The fastest safe strategy on `devices`, or the best of what does not fit, with its verdict.

    `work_bytes` is what a device holds beside weights, gradients and optimizer state (activations of one
    sequence, logits, buffers), by recompute option, under the same degrees.
    """

    devices: int
    cluster: str
    label: str
    recompute: str
    precision: str
    seq: int
    batch: int
    verdict: str
    peak_memory_bytes: int
    memory_limit_bytes: int
    memory: MemoryBreakdown
    work_bytes: dict[str, int]
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    tokens_per_s: float
    mfu: float | None


def node_shape(devices: int) -> tuple[int, int]:
    """Nodes and devices a node: the largest node of at most 8 that divides the count."""
    per_node = max(size for size in range(1, DEVICES_PER_NODE + 1) if devices % size == 0)
    return devices // per_node, per_node


def own_estimate(
    model: ModelSpec, device: str, precision: Precision, seq: int, devices: int | None
) -> OwnEstimate | None:
    """The estimate on `devices`, or on the least power of two that is safe; None where none up to 2^17 is.

    Raises InputError where the cost model cannot cost the model or the device's peak is unknown.
    """
    if devices is not None:
        found = _best(model, cluster_of(devices, device), precision, seq)
        return None if found is None else found[1]
    usable = cluster_of(1, device).groups[0].device.usable_memory_bytes
    count = 1
    while count * usable < 16 * model.params_total:  # weights, gradients and state alone, at 16 bytes
        count *= 2
    while count <= MOST_DEVICES:
        found = _best(model, cluster_of(count, device), precision, seq)
        if found is not None and found[1].verdict == Verdict.SAFE:
            return found[1]
        count *= 2
    return None


def activations_bytes(model: ModelSpec, device: str, precision: Precision, seq: int) -> dict[str, int]:
    """Activations of one sequence on one device that are kept for the backward pass, by recompute option."""
    options = evaluated(model, cluster_of(1, device), precision, seq, tp=1)
    return {str(each.recompute): each.evaluation.stages[0].memory.activations_bytes for each in options}


def cluster_of(devices: int, device: str) -> ClusterSpec:
    nodes, per_node = node_shape(devices)
    part = shaped_part(nodes, per_node, device, None, "--device", Market(instances=()))
    return join(part.name, [part], "--device")


def _best(
    model: ModelSpec, cluster: ClusterSpec, precision: Precision, seq: int
) -> tuple[tuple[float, float], OwnEstimate] | None:
    """The best strategy on a cluster: by verdict, then by time (memory where nothing fits)."""
    found = []
    for tp in TP_DEGREES:
        if cluster.devices_per_node % tp == 0:
            options = list(evaluated(model, cluster, precision, seq, tp))
            found += [(_order(each), _answer(each, options)) for each in options]
    return min(found, key=lambda item: item[0], default=None)


class Option(NamedTuple):
    """One evaluated strategy of a problem."""

    problem: PlanningProblem
    recompute: Recompute
    evaluation: Evaluation


def evaluated(
    model: ModelSpec, cluster: ClusterSpec, precision: Precision, seq: int, tp: int
) -> Iterator[Option]:
    dp = cluster.devices // tp
    accumulated = min(max(1, STEP_TOKENS // (seq * dp)), MOST_MICRO_BATCHES)
    problem = PlanningProblem(
        model=model,
        workload=Workload(seq=seq, batch=dp * accumulated, precision=precision),
        cluster=cluster,
        profile=None,
        memory_limit_bytes=cluster.groups[0].device.usable_memory_bytes,
        stack=own_stack(cluster),
    )
    costs = CostModel(problem)
    degrees = Degrees(
        tp=tp,
        dp_shard=dp,
        zero=Zero.PARAMETERS if dp > 1 else Zero.NONE,
        num_micro_batches=accumulated,
        sequence_parallel=tp > 1,
    )
    for recompute in Recompute:
        strategy = Strategy(degrees=degrees, stages=even_stages(model.layers, 1, recompute))
        if not broken_rules(problem, strategy):
            yield Option(problem, recompute, costs.evaluate(strategy))


def _order(option: Option) -> tuple[float, float]:
    """By verdict, then the fastest: by tokens, since steps of different splits differ in size."""
    estimate = option.evaluation.estimate
    rank = RANK[estimate.verdict]
    return rank, estimate.peak_memory_bytes if rank == 2 else 1 / estimate.tokens_per_s


def _answer(option: Option, options: list[Option]) -> OwnEstimate:
    estimate, workload = option.evaluation.estimate, option.problem.workload
    memories = {str(each.recompute): each.evaluation.stages[0].memory for each in options}
    return OwnEstimate(
        devices=option.problem.cluster.devices,
        cluster=option.problem.cluster.name,
        label=option.evaluation.strategy.degrees.label(),
        recompute=str(option.recompute),
        precision=str(workload.precision),
        seq=workload.seq,
        batch=workload.batch,
        verdict=str(estimate.verdict),
        peak_memory_bytes=estimate.peak_memory_bytes,
        memory_limit_bytes=estimate.memory_limit_bytes,
        memory=option.evaluation.stages[0].memory,
        work_bytes={
            name: memory.activations_bytes + memory.transient_bytes + memory.runtime_bytes
            for name, memory in memories.items()
        },
        step_time_s=estimate.step_time_s,
        step_time_interval_s=estimate.step_time_interval_s,
        tokens_per_s=estimate.tokens_per_s,
        mfu=estimate.mfu,
    )

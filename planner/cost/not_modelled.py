"""What an estimate leaves out, as short phrases: each has a predicate of the problem and the strategy."""

from __future__ import annotations

from collections.abc import Callable

from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Experts
from planner.model.traced_layer import TracedLayer
from planner.model.workload import Optimizer, Precision
from planner.strategy.placement import device_names, rank_groups
from planner.strategy.strategy import Strategy

TAKEN_BACK = "nodes that the provider takes back (--preemptions)"

Predicate = Callable[[PlanningProblem, Strategy], bool]


def not_modelled(problem: PlanningProblem, strategy: Strategy) -> tuple[str, ...]:
    """What the estimate of a strategy does not count, in a fixed order."""
    return tuple(phrase for phrase, holds in _PHRASES if holds(problem, strategy))


def _communicates(problem: PlanningProblem, strategy: Strategy) -> bool:
    return strategy.degrees.world > 1


def _between_nodes(problem: PlanningProblem, strategy: Strategy) -> bool:
    shared = strategy.degrees.world > problem.cluster.devices_per_node
    return shared and problem.cluster.inter.bytes_per_s is not None


def _free_messages(problem: PlanningProblem, strategy: Strategy) -> bool:
    return _communicates(problem, strategy) and problem.cluster.intra.bytes_per_s is None


def _accelerators(problem: PlanningProblem) -> bool:
    return all(group.slots_per_node is None for group in problem.cluster.groups)


def _straddles(problem: PlanningProblem, strategy: Strategy) -> bool:
    ranks = set(rank_groups(problem.cluster, strategy.degrees))
    return any("+" in device_names(problem.cluster, groups) for groups in ranks)


def _one_profile(problem: PlanningProblem, strategy: Strategy) -> bool:
    devices = {group.device.name for group in problem.cluster.groups}
    return problem.profile is not None and not problem.device_profiles and len(devices) > 1


def _known_unequally(problem: PlanningProblem, strategy: Strategy) -> bool:
    several = len({group.device.name for group in problem.cluster.groups}) > 1
    return several and len({profile is None for _, profile in problem.device_profiles}) > 1


def _faster_hops(problem: PlanningProblem, strategy: Strategy) -> bool:
    return strategy.degrees.pp > 1 and any(group.inter for group in problem.cluster.groups)


def _uneven_experts(problem: PlanningProblem) -> bool:
    mlps = (block.mlp for block in problem.model.transformer_blocks())
    fitted = problem.profile is not None and any(
        constant.name == "expert_imbalance" for constant in problem.profile.constants
    )
    return not fitted and any(isinstance(mlp, Experts) for mlp in mlps)


def _traced(problem: PlanningProblem) -> bool:
    return any(isinstance(layer, TracedLayer) for layer in problem.model.classes().values())


def _recomputes(strategy: Strategy) -> bool:
    return any(stage.recompute.selective for stage in strategy.stages)


_PHRASES: tuple[tuple[str, Predicate], ...] = (
    ("data loading (--data-rate)", lambda p, s: p.overheads.data_tokens_per_s is None),
    (
        "checkpoints and what failures lose (--checkpoint-every)",
        lambda p, s: p.overheads.checkpoint_every is None,
    ),
    (
        "the writing of checkpoints (--storage)",
        lambda p, s: p.overheads.checkpoint_every is not None and p.overheads.storage_bytes_per_s is None,
    ),
    (
        "devices slower than others (--device-spread)",
        lambda p, s: _communicates(p, s) and p.overheads.device_spread is None,
    ),
    (
        "what the writing of checkpoints takes from the steps that run meanwhile",
        lambda p, s: p.overheads.checkpoint_every is not None and p.overheads.checkpoint_async,
    ),
    (
        "the repair of failed nodes: they are replaced while the job restarts (--repair, --spares)",
        lambda p, s: p.overheads.checkpoint_every is not None and p.overheads.repair_s is None,
    ),
    (
        TAKEN_BACK,
        lambda p, s: p.overheads.checkpoint_every is not None
        and p.overheads.preemptions_per_1000_node_days is None,
    ),
    (
        "evaluation between steps (--eval-every, --eval-time)",
        lambda p, s: p.overheads.eval_every is None or p.overheads.eval_s is None,
    ),
    (
        "the start of the job and its first steps, which compile and warm up (--ramp-up)",
        lambda p, s: p.overheads.ramp_up_s is None,
    ),
    ("traffic of other jobs on the network", _between_nodes),
    ("communication, which was said to take no time", _free_messages),
    ("clocks that fall with heat or a cap on power", lambda p, s: _accelerators(p)),
    ("other programs on this machine", lambda p, s: not _accelerators(p)),
    ("devices of several kinds in one stage: all compute like the slowest", _straddles),
    ("what sets kinds of devices apart besides datasheets: one profile speaks for all", _one_profile),
    ("what runs would tell of the kinds that are known by datasheet alone, beside those known by runs",
     _known_unequally),
    ("faster links between some stages: each message takes what it takes over the slowest", _faster_hops),
    ("how unevenly tokens meet experts, which no run fitted", lambda p, s: _uneven_experts(p)),
    ("loss scaling, and steps that overflow", lambda p, s: p.workload.precision is Precision.FP16),
    (
        "the optimizer's own arithmetic: its step is timed as AdamW's",
        lambda p, s: p.workload.optimizer is not Optimizer.ADAMW,
    ),
    (
        "what tensor parallelism sends for adapters",
        lambda p, s: p.workload.adapters is not None and s.degrees.tp > 1,
    ),
    (
        "what frozen weights spare in traced layers",
        lambda p, s: p.workload.adapters is not None and _traced(p),
    ),
    (
        "how devices of a node share its host links and memory: each copies as if alone",
        lambda p, s: bool(s.offloads),
    ),
    (
        "whether the memory of a node holds what is offloaded: its size is not known",
        lambda p, s: bool(s.offloads) and p.cluster.host_memory_bytes_per_device is None,
    ),
    (
        "selective recomputation of traced layers: costed like none",
        lambda p, s: _traced(p) and _recomputes(s),
    ),
)  # fmt: skip

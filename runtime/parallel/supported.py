"""What of a plan the runtime refuses to execute, before it builds anything."""

from __future__ import annotations

from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from planner.model.workload import Optimizer
from planner.strategy.engines.runtime_support import (
    WORKLOADS_EXECUTED,
    check_executed_offload,
    context_not_executed,
    not_executed_workload,
    products_not_executed,
    vocabulary_not_executed,
)
from planner.strategy.parallel_rules import (
    context_divides,
    context_heads,
    experts_divide,
    experts_need_sequence_parallel,
    experts_within_replicas,
)
from planner.strategy.plan import Plan
from planner.strategy.schedule_check import check_schedule_table
from planner.strategy.strategy import AXES, Degrees, Zero

MOST_TP = 64
"""Larger tensor-parallel degrees are not named as legal."""
EXPERT_RULES = (experts_divide, experts_within_replicas, experts_need_sequence_parallel)


def check_supported(plan: Plan) -> None:
    """Raises InputError with every part of the plan that this runtime cannot execute."""
    degrees = plan.strategy.degrees
    check_schedule_table(plan)
    check_executed_offload(plan.strategy)
    problems = [*_degree_problems(plan, degrees), *_tensor_problems(plan.model, plan.workload.seq, degrees)]
    problems += _context_problems(plan)
    if problems:
        raise InputError(*problems)


def _degree_problems(plan: Plan, degrees: Degrees) -> list[Problem]:
    found = []
    found += [
        Problem(where="workload", fault=f"cannot be trained: {fault}.", legal=WORKLOADS_EXECUTED)
        for fault in (
            *not_executed_workload(plan.model, plan.workload),
            *products_not_executed(plan.model, plan.workload, degrees),
        )
    ]
    found += _offload_problems(plan)
    shards = degrees.dp_shard if degrees.zero is Zero.NONE else degrees.weight_shards
    if (degrees.zero is Zero.NONE) != (shards == 1):
        found.append(
            Problem(
                where="strategy.zero",
                fault=f"is {int(degrees.zero)} with dp_shard={degrees.dp_shard} and cp={degrees.cp}: a ZeRO "
                "stage shares out over dp_shard x cp ranks, and dp_shard ranks share something out.",
                legal="zero=0 with dp_shard=1, zero=1, 2 or 3 with dp_shard x cp over 1",
            )
        )
    broken = (rule(plan.problem, degrees) for rule in EXPERT_RULES)
    found += [
        Problem(where="strategy", fault=each.detail, legal=each.legal, fix=each.fix)
        for each in broken
        if each is not None
    ]
    if degrees.chunks > 1 and degrees.pp == 1:
        fault = f"is {degrees.chunks} with pp=1: chunks of one rank would be one stage."
        found.append(Problem(where="strategy.chunks", fault=fault, legal="1"))
    if plan.rank_axes != AXES or plan.rank_grid_shape != degrees.grid_shape():
        fault = f"is {plan.rank_axes} {plan.rank_grid_shape}, not the strategy's {degrees.grid_shape()}."
        found.append(Problem(where="ranks", fault=fault, legal=f"axes {AXES}"))
    if degrees.batch != plan.workload.batch:
        found.append(
            Problem(
                where="workload.batch",
                fault=f"is {plan.workload.batch}, but micro_batch x num_micro_batches x dp is "
                f"{degrees.micro_batch} x {degrees.num_micro_batches} x {degrees.dp}.",
                legal=str(degrees.batch),
            )
        )
    return found


def _context_problems(plan: Plan) -> list[Problem]:
    """What context parallelism must divide: the sequence, and heads where they are traded for it."""
    broken = (rule(plan.problem, plan.strategy.degrees) for rule in (context_divides, context_heads))
    problems = [
        Problem(where="strategy.cp", fault=rejected.detail, legal=rejected.legal, fix=rejected.fix)
        for rejected in broken
        if rejected is not None
    ]
    met = context_not_executed(plan.model, plan.strategy.degrees)
    return problems + [
        Problem(
            where="strategy.cp_exchange",
            fault=f"is {plan.strategy.degrees.cp_exchange}: keys are met block by block, and {fault}.",
            legal="all_to_all",
        )
        for fault in met
    ]


def _offload_problems(plan: Plan) -> list[Problem]:
    """Offload that no plan of the planner has, but one edited by hand may."""
    found = [
        Problem(
            where=f"stages[{index}].offload",
            fault=f"is {stage.offload}, and the stage holds {stage.layers} layers.",
            legal=f"0 to {stage.layers} each",
        )
        for index, stage in enumerate(plan.strategy.stages)
        if min(stage.offload.optimizer, stage.offload.activations) < 0
        or max(stage.offload.optimizer, stage.offload.activations) > stage.layers
    ]
    by_elements = plan.workload.optimizer is not Optimizer.MUON and plan.workload.adapters is None
    if any(stage.offload.optimizer for stage in plan.strategy.stages) and not by_elements:
        fault = (
            "keeps optimizer state in host memory, where updates are element by element: no muon, no LoRA."
        )
        found.append(Problem(where="stages.offload", fault=fault, legal="optimizer=0"))
    return found


def _tensor_problems(model: ModelSpec, seq: int, degrees: Degrees) -> list[Problem]:
    """What tensor parallelism must divide: whole heads, columns, and the sequence; and the vocabulary."""
    sizes = {what: size for size, what in model.widths_split}
    if degrees.sequence_parallel:
        sizes["the sequence" if degrees.cp == 1 else "a context-parallel rank's tokens"] = seq // degrees.cp
    found = [
        (name, size, [n for n in range(1, min(size, MOST_TP) + 1) if size % n == 0])
        for name, size in sizes.items()
        if size % degrees.tp
    ]
    found += [
        (heads.what, heads.count, [n for n in range(1, MOST_TP + 1) if heads.split_over(n)])
        for heads in model.heads_split
        if not heads.split_over(degrees.tp)
    ]
    where = f"strategy.tp={degrees.tp}"
    vocabulary = [
        Problem(where=where, fault=f"cannot split the vocabulary of {model.vocab}: {fault}.")
        for fault in vocabulary_not_executed(model, degrees)
    ]
    return vocabulary + [
        Problem(
            where=where,
            fault=f"cannot split {name} of {size}: each rank needs an equal part.",
            legal=f"tp of {', '.join(map(str, legal))}",
        )
        for name, size, legal in found
    ]

"""What this project's own runtime runs (`plan train`): planner.strategy.engines.runtime_support knows it."""

from __future__ import annotations

import dataclasses

from planner.foundation.divisors import legal_values
from planner.job.problem import PlanningProblem
from planner.strategy.engines.runtime_support import (
    EXECUTED_TYPES,
    WORKLOADS_EXECUTED,
    context_not_executed,
    not_executed,
    not_executed_workload,
    offload_not_executed,
    products_not_executed,
    vocabulary_not_executed,
)
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Strategy

MOST_TP = 64
"""Larger tensor-parallel degrees are not named as legal: no node has as many devices."""


def native_context(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Ranks that share out a sequence meet keys block by block."""
    faults = context_not_executed(problem.model, degrees)
    if not faults:
        return None
    return Rejected(
        rule="native_context",
        detail=f"cp={degrees.cp} by {degrees.cp_exchange} meets keys block by block in the native "
        f"runtime, and {'; '.join(faults)}.",
        legal="cp=1, or cp_exchange=all_to_all",
        fix="--fix cp_exchange=all_to_all",
    )


def native_vocabulary(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Each rank has some rows of embedding and head; of unequal parts data ranks share out the columns."""
    faults = vocabulary_not_executed(problem.model, degrees)
    if not faults:
        return None
    model, ways = problem.model, range(1, MOST_TP + 1)
    legal = [tp for tp in ways if not vocabulary_not_executed(model, dataclasses.replace(degrees, tp=tp))]
    return Rejected(
        rule="native_vocabulary",
        detail=f"tp={degrees.tp} cannot split the vocabulary of {model.vocab} in the native runtime: "
        f"{'; '.join(faults)}.",
        legal=legal_values(legal, degrees.tp),
        fix="--fix tp= or dp_shard=",
    )


def native_workload(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Products in fp8 that kernels have, and adapters beside what the trainer knows."""
    faults = not_executed_workload(problem.model, problem.workload)
    faults += products_not_executed(problem.model, problem.workload, degrees)
    if not faults:
        return None
    return Rejected(
        rule="native_workload",
        detail=f"the native runtime cannot train this workload: {'; '.join(faults)}.",
        legal=WORKLOADS_EXECUTED,
        fix="--precision, --method",
    )


def native_model(problem: PlanningProblem) -> Rejected | None:
    """Blocks that the runtime builds."""
    faults = not_executed(problem.model)
    if not faults:
        return None
    return Rejected(
        rule="native_model",
        detail=f"the native runtime cannot build {problem.model.name}: {'; '.join(faults)}.",
        legal=f"decoders of the families {', '.join(EXECUTED_TYPES)}",
        fix="--model, or another --engine",
    )


def native_offload(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """Selective recomputation keeps results where the runtime cannot send them to host memory."""
    faults = offload_not_executed(strategy)
    if not faults:
        return None
    return Rejected(
        rule="native_offload",
        detail=f"the native runtime cannot offload so: {'; '.join(faults)}.",
        legal="offload=none or optimizer, or recompute=none or full",
        fix="--fix offload=none or --fix recompute=full",
    )


NATIVE_PROBLEM_RULES = (native_model,)
NATIVE_RULES = (native_context, native_vocabulary, native_workload)
NATIVE_STRATEGY_RULES = (native_offload,)

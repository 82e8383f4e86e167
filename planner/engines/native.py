"""What this project's own runtime runs (`plan train`): planner.execution knows it."""

from __future__ import annotations

from planner.divisors import divisors, legal_values
from planner.estimate import Rejected
from planner.execution import (
    EXECUTED_OPTIMIZERS,
    EXECUTED_PRECISIONS,
    EXECUTED_TYPES,
    context_not_executed,
    not_executed,
    not_executed_workload,
    offload_not_executed,
)
from planner.problem import PlanningProblem
from planner.strategy import Degrees, Strategy

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
    """Tables of embedding and head are split into equal parts; other engines pad them."""
    vocab = problem.model.vocab
    if vocab % degrees.tp == 0:
        return None
    return Rejected(
        rule="native_vocabulary",
        detail=f"tp={degrees.tp} cannot split the vocabulary of {vocab} into equal shards, and the native "
        "runtime does not pad it.",
        legal=legal_values((d for d in divisors(vocab) if d <= MOST_TP), degrees.tp),
        fix="--fix tp=, or a model with a padded vocabulary",
    )


def native_workload(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Precisions, optimizers and methods that the trainer has."""
    faults = not_executed_workload(problem.workload)
    if not faults:
        return None
    return Rejected(
        rule="native_workload",
        detail=f"the native runtime cannot train this workload: {'; '.join(faults)}.",
        legal=f"--precision {' or '.join(EXECUTED_PRECISIONS)}, --optimizer "
        f"{' or '.join(EXECUTED_OPTIMIZERS)}, --method pretrain or finetune",
        fix="--precision, --optimizer, --method",
    )


def native_model(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
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
    """The runtime keeps everything on the device."""
    faults = offload_not_executed(strategy)
    if not faults:
        return None
    return Rejected(
        rule="native_offload",
        detail=f"the native runtime keeps everything on the device, and the strategy offloads: "
        f"{'; '.join(faults)}.",
        legal="offload=none",
        fix="--fix offload=none",
    )


NATIVE_RULES = (native_context, native_vocabulary, native_workload, native_model)
NATIVE_STRATEGY_RULES = (native_offload,)

"""Recipes that engines can express: what all blocks recompute, by one setting for the whole run.

A family is a list of recipes from least to most recomputation: the first of it that fits is the fastest.

What an engine does where nothing is said: defaults that complete a strategy.

Key-value heads that are fewer than tensor-parallel ranks: engines that have no copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from planner.foundation.suggest import divisors, nearest_values
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, even_stages, sized_stages

Stages = tuple[Stage, ...]
Family = list[Stages]


def recipe_families(engine: Engine, degrees: Degrees, sizes: Sequence[int]) -> list[Family]:
    """What an engine can make of stages of these sizes. Stages that it cannot have are made even first."""
    return _FAMILIES[engine](degrees, sizes)


def stages_of_ranks(degrees: Degrees) -> list[list[int]]:
    """The stages of each pipeline rank, in their order."""
    held: list[list[int]] = [[] for _ in range(degrees.pp)]
    for stage in range(degrees.stages):
        held[degrees.pp_rank_of_stage(stage)].append(stage)
    return held


def first_of_each(sizes: Sequence[int], full: int) -> Stages:
    """The first `full` blocks of every stage recompute in full, the others nothing."""
    return _with_full(sizes, [min(full, size) for size in sizes])


def every_kth(degrees: Degrees, sizes: Sequence[int], k: int) -> Stages:
    """Every k-th block of the blocks that a rank holds recomputes in full, the others nothing."""
    full = [0] * len(sizes)
    for own in stages_of_ranks(degrees):
        before = 0
        for stage in own:
            full[stage] = (before + sizes[stage]) // k - before // k
            before += sizes[stage]
    return _with_full(sizes, full)


def most_on_a_rank(degrees: Degrees, sizes: Sequence[int]) -> int:
    """Blocks of the pipeline rank that holds most."""
    return max(sum(sizes[stage] for stage in own) for own in stages_of_ranks(degrees))


def _with_full(sizes: Sequence[int], full: Sequence[int]) -> Stages:
    result, first = [], 0
    for size, again in zip(sizes, full, strict=True):
        counts = RecomputeCounts(none=size - again, full=again)
        result.append(Stage(first=first, end=first + size, recompute=counts))
        first += size
    return tuple(result)


UNIFORM: Mapping[Engine, tuple[Recompute, ...]] = MappingProxyType(
    {Engine.DEEPSPEED: (Recompute.NONE, Recompute.FULL)}
)
"""Engines in which all blocks share one option, and which options those are."""


def _native(degrees: Degrees, sizes: Sequence[int]) -> list[Family]:
    return [[sized_stages(sizes, option)] for option in Recompute]


def _torchtitan(degrees: Degrees, sizes: Sequence[int]) -> list[Family]:
    kth = [every_kth(degrees, sizes, k) for k in range(most_on_a_rank(degrees, sizes) + 1, 0, -1)]
    return [list(dict.fromkeys(kth)), [sized_stages(sizes, Recompute.SELECTIVE)]]


def _megatron(degrees: Degrees, sizes: Sequence[int]) -> list[Family]:
    blocks = [first_of_each(sizes, full) for full in range(max(sizes) + 1)]
    return [blocks, [sized_stages(sizes, Recompute.SELECTIVE)]]


def _deepspeed(degrees: Degrees, sizes: Sequence[int]) -> list[Family]:
    layers = sum(sizes)
    return [[even_stages(layers, len(sizes), option) for option in (Recompute.NONE, Recompute.FULL)]]


_FAMILIES: Mapping[Engine, Callable[[Degrees, Sequence[int]], list[Family]]] = {
    Engine.NATIVE: _native,
    Engine.TORCHTITAN: _torchtitan,
    Engine.MEGATRON: _megatron,
    Engine.DEEPSPEED: _deepspeed,
}


USUAL_EXCHANGE: Mapping[Engine, CpExchange] = MappingProxyType(
    {
        Engine.MEGATRON: CpExchange.RING,
        Engine.DEEPSPEED: CpExchange.ALL_TO_ALL,
        Engine.TORCHTITAN: CpExchange.GATHER,
        Engine.NATIVE: CpExchange.GATHER,
    }
)
"""Megatron-LM's cp_comm_type is p2p, DeepSpeed's way is Ulysses, torch's context_parallel gathers."""


def usual_exchange(engine: Engine | None) -> CpExchange:
    """How context-parallel ranks exchange keys and values unless told otherwise."""
    return Degrees().cp_exchange if engine is None else USUAL_EXCHANGE[engine]


def usual_sequence_parallel(engine: Engine | None, tp: int) -> bool:
    """Whether tensor parallelism shards the sequence unless told otherwise: torchtitan's always does."""
    return engine is Engine.TORCHTITAN and tp > 1


def without_copies(problem: PlanningProblem, degrees: Degrees, engine: str, why: str) -> Rejected | None:
    """The rule of an engine where tp must divide key-value heads, named by the engine; `why` it must."""
    few = [heads for heads in problem.model.heads_split if heads.repeated and heads.count % degrees.tp]
    if not few:
        return None
    heads = few[0]
    return Rejected(
        rule=f"{engine.lower().split('-')[0]}_heads",
        detail=f"tp={degrees.tp} over {heads.count} {heads.what}: {engine} {why}.",
        legal=nearest_values(divisors(heads.count), degrees.tp),
        fix="--fix tp=",
    )

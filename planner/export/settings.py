"""Settings: a strategy and its workload in words that engines have keys for, one value each.

Exports write settings of a plan by an engine's table of keys, imports read the same table backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.model.attention import CpExchange
from planner.model.saved_tensors import Recompute
from planner.model.spec import ModelSpec
from planner.model.workload import Adapters, Method, Optimizer, Precision, Workload
from planner.strategy.engines.defaults import usual_exchange
from planner.strategy.engines.recipes import every_kth, first_of_each, most_on_a_rank
from planner.strategy.strategy import (
    Degrees,
    OffloadCounts,
    RecomputeCounts,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
    sized_stages,
)


class Recipe(StrEnum):
    """What all blocks recompute: one option, the first N of a stage, every N-th of a rank, or a mix."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    FIRST = "first"
    EVERY = "every"
    MIXED = "mixed"


@frozen
class Settings:
    """What a configuration says. None: it does not say.

    `dp_shard` None fills the devices. `sizes` are the blocks of each stage in order, () as the engine splits
    them. `recompute_number` goes with FIRST and EVERY. `offload_activations` counts the blocks of a stage,
    the first ones; -1 stands for all.
    """

    tp: int = 1
    pp: int = 1
    chunks: int = 1
    schedule: Schedule | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int = 1
    cp_exchange: CpExchange | None = None
    ep: int = 1
    etp: int | None = None
    zero: Zero = Zero.NONE
    micro_batch: int | None = None
    num_micro_batches: int | None = None
    sequence_parallel: bool | None = None
    sizes: tuple[int, ...] = ()
    recompute: Recipe = Recipe.NONE
    recompute_number: int = 0
    offload_optimizer: bool = False
    offload_activations: int = 0
    seq: int | None = None
    batch: int | None = None
    precision: Precision | None = None
    optimizer: Optimizer | None = None
    method: Method | None = None


def settings_of(strategy: Strategy, workload: Workload, mixes: Sequence[Recipe] = ()) -> Settings:
    """The settings of a strategy. A mix of options that is none of the `mixes` of an engine is MIXED."""
    degrees, stages = strategy.degrees, strategy.stages
    recipe, number = recipe_of(strategy, mixes)
    kept = {stage.offload.activations for stage in stages}
    whole = all(stage.offload.activations == stage.layers for stage in stages)
    return Settings(
        tp=degrees.tp,
        pp=degrees.pp,
        chunks=degrees.chunks,
        schedule=degrees.schedule if degrees.pp > 1 else None,
        dp_replicate=degrees.dp_replicate,
        dp_shard=degrees.dp_shard,
        cp=degrees.cp,
        cp_exchange=degrees.cp_exchange if degrees.cp > 1 else None,
        ep=degrees.ep,
        etp=degrees.expert_tp if degrees.spreads_experts else None,
        zero=degrees.zero,
        micro_batch=degrees.micro_batch,
        num_micro_batches=degrees.num_micro_batches,
        sequence_parallel=degrees.sequence_parallel,
        sizes=tuple(stage.layers for stage in stages),
        recompute=recipe,
        recompute_number=number,
        offload_optimizer=any(stage.offload.optimizer for stage in stages),
        offload_activations=-1 if whole else max(kept),
        seq=workload.seq,
        batch=workload.batch,
        precision=workload.precision,
        optimizer=workload.optimizer,
        method=workload.method,
    )


def recipe_of(strategy: Strategy, mixes: Sequence[Recipe]) -> tuple[Recipe, int]:
    """The one recipe that all stages keep to, and its number of blocks (0 where it has none).

    Of recipes that mix options, those in `mixes` are tried: several may say the same.
    """
    counts = [stage.recompute for stage in strategy.stages]
    sizes = [stage.layers for stage in strategy.stages]
    for recipe, option in _UNIFORM.items():
        if counts == _counts(sized_stages(sizes, option)):
            return recipe, 0
    most = max(count.full for count in counts)
    if Recipe.FIRST in mixes and counts == _counts(first_of_each(sizes, most)):
        return Recipe.FIRST, most
    for k in range(2, most_on_a_rank(strategy.degrees, sizes) + 1) if Recipe.EVERY in mixes else ():
        if counts == _counts(every_kth(strategy.degrees, sizes, k)):
            return Recipe.EVERY, k
    return Recipe.MIXED, 0


_UNIFORM = {
    Recipe.NONE: Recompute.NONE,
    Recipe.SELECTIVE: Recompute.SELECTIVE,
    Recipe.FULL: Recompute.FULL,
}


def _counts(stages: Sequence[Stage]) -> list[RecomputeCounts]:
    return [stage.recompute for stage in stages]


def strategy_from(
    settings: Settings, model: ModelSpec, batch: int, devices: int, engine: Engine | None
) -> Strategy:
    """The strategy of settings on so many devices: what they leave open follows from the rest, or the engine.

    Degrees that do not fit the devices or the batch are kept as said: rules tell what is wrong with them.
    What is shared out over one rank, or split over one, is not: engines let that pass.
    """
    replicate, shard = _data_ranks(settings, devices)
    micro = settings.micro_batch or 1
    degrees = Degrees(
        tp=settings.tp,
        pp=settings.pp,
        chunks=settings.chunks,
        schedule=settings.schedule or Schedule.ONE_F_ONE_B,
        dp_replicate=replicate,
        dp_shard=shard,
        cp=settings.cp,
        cp_exchange=settings.cp_exchange or usual_exchange(engine),
        ep=settings.ep,
        etp=None if settings.etp == settings.tp else settings.etp,
        zero=settings.zero if shard * settings.cp > 1 else Zero.NONE,
        micro_batch=micro,
        num_micro_batches=settings.num_micro_batches or max(1, batch // (replicate * shard * micro)),
        sequence_parallel=bool(settings.sequence_parallel) and settings.tp > 1,
    )
    return Strategy(degrees=degrees, stages=_stages(settings, degrees, model.layers))


def _data_ranks(settings: Settings, devices: int) -> tuple[int, int]:
    """dp_replicate and dp_shard."""
    dp = max(1, devices // (settings.tp * settings.pp * settings.cp))
    if settings.dp_shard is not None:
        return settings.dp_replicate or max(1, dp // settings.dp_shard), settings.dp_shard
    if settings.zero is Zero.NONE:
        return settings.dp_replicate or dp, 1
    replicate = settings.dp_replicate or 1
    return replicate, max(1, dp // replicate)


def _stages(settings: Settings, degrees: Degrees, layers: int) -> tuple[Stage, ...]:
    sizes = settings.sizes or tuple(s.layers for s in even_stages(layers, degrees.stages))
    if settings.recompute is Recipe.FIRST:
        stages = first_of_each(sizes, settings.recompute_number)
    elif settings.recompute is Recipe.EVERY:
        stages = every_kth(degrees, sizes, settings.recompute_number)
    else:
        stages = sized_stages(sizes, _UNIFORM.get(settings.recompute, Recompute.NONE))
    return tuple(_offloaded(stage, settings) for stage in stages)


def _offloaded(stage: Stage, settings: Settings) -> Stage:
    kept = settings.offload_activations
    offload = OffloadCounts(
        optimizer=stage.layers if settings.offload_optimizer else 0,
        activations=stage.layers if kept < 0 else min(kept, stage.layers),
    )
    return Stage(first=stage.first, end=stage.end, recompute=stage.recompute, offload=offload)


def workload_words(workload: Workload) -> str:
    """What is trained, in a line."""
    adapters: Adapters | None = workload.adapters
    lora = f", adapters of rank {adapters.rank} beside {adapters.modules}" if adapters else ""
    return (
        f"{workload.batch} x {workload.seq} tokens a step, {workload.precision}, {workload.optimizer}, "
        f"{workload.method}{lora}"
    )

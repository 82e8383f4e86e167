"""Settings: a strategy and its workload in words that engines have keys for, one value each.

Exports write settings of a plan by an engine's table of keys, imports read the same table backwards.

Key: one setting of an engine and what of a plan it says. Tables of keys are written and read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from planner.foundation.errors import Problem
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Adapters, Method, Optimizer, Precision, Workload
from planner.strategy.engines.recipes import every_kth, first_of_each, most_on_a_rank, usual_exchange
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


@frozen
class Key:
    """A setting by the engine's own name: a flag, or a dotted path in a file.

    `field` is that of Settings. `words` are the engine's value for ours, where these differ: a value without
    one is not written. `write` and `read` convert where words do not do. `source` is the file of the engine
    that reads the setting. A key that only follows from others is not read (`reads` False). What is
    priced as it is written is `strict`: another value is told as not read.
    """

    name: str
    field: str
    source: str
    words: Mapping[Any, Any] | None = None
    write: Callable[[Settings], Any] | None = None
    read: Callable[[Any], Any] | None = None
    reads: bool = True
    strict: bool = False

    def written(self, settings: Settings) -> Any:
        """The engine's value for settings; None: the key is left out."""
        if self.write is not None:
            return self.write(settings)
        value = getattr(settings, self.field)
        return value if self.words is None else self.words.get(value)


def written(keys: Iterable[Key], settings: Settings) -> dict[str, Any]:
    """Every key that settings have a value for, in the table's order."""
    found = {key.name: key.written(settings) for key in keys}
    return {name: value for name, value in found.items() if value is not None}


def read_back(
    keys: Iterable[Key], found: Mapping[str, Any], source: str, problems: list[Problem]
) -> dict[str, Any]:
    """Fields of Settings that a file says; a value that no plan has a word for becomes a problem."""
    fields: dict[str, Any] = {}
    for key in keys:
        if not key.reads or found.get(key.name) is None:
            continue
        value = found[key.name]
        try:
            fields[key.field] = _ours(key, value)
        except (ValueError, TypeError, KeyError, AttributeError):
            problems.append(
                Problem(
                    where=f"{source}: {key.name}",
                    fault=f"is {value!r}, which no plan has a word for.",
                    legal=_legal(key),
                )
            )
    return fields


def _ours(key: Key, value: Any) -> Any:
    if key.read is not None:
        return key.read(value)
    if key.words is not None:
        return {str(word).lower(): ours for ours, word in key.words.items()}[str(value).lower()]
    default = Settings.__dataclass_fields__[key.field].default
    return _flag(value) if isinstance(default, bool) or key.field in _FLAGS else whole(value)


_FLAGS = ("sequence_parallel",)


def whole(value: Any) -> int:
    """A whole number above 0. Raises ValueError."""
    number = int(value)
    if isinstance(value, bool) or number != float(value) or number < 1:
        raise ValueError(value)
    return number


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _legal(key: Key) -> str:
    if key.words is not None:
        return ", ".join(str(word) for word in key.words.values())
    return "a whole number above 0" if key.read is None else ""


def unread(
    found: Mapping[str, Any], keys: Iterable[Key], inert: Iterable[str], settings: Settings
) -> tuple[str, ...]:
    """Settings of a file that are neither read nor known to change no time and no memory.

    So are those of strict keys that say otherwise than an export of the same settings.
    """
    known, still = {key.name: key for key in keys}, tuple(inert)
    return tuple(
        name
        for name, value in found.items()
        if (name in known and known[name].strict and not _same(known[name].written(settings), value))
        or (name not in known and not any(_under(name, other) for other in still))
    )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, int) and isinstance(theirs, float):  # 5e8
        return ours == theirs
    return str(ours).lower() == str(theirs).lower()


def _under(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")

"""The rules that a strategy must keep, each a named predicate with its reason.

A rule looks at a problem and degrees (or a whole strategy) and returns None, or Rejected with the numbers,
the nearest legal values and the flag to change. Nothing here is an exception: infeasible is data.

The rules of offloading: what a strategy keeps in host memory, and where that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from planner.foundation.suggest import divisors, nearest_values
from planner.foundation.units import GIB
from planner.job.problem import PlanningProblem
from planner.model.traced_layer import TracedLayer
from planner.model.workload import Optimizer
from planner.strategy.engines.engine_rules import engine_rules, engine_strategy_rules, problem_refused
from planner.strategy.estimate import Rejected
from planner.strategy.parallel_rules import (
    SPREAD_RULES,
    context_attends,
    context_divides,
    context_heads,
    experts_divide,
    experts_need_sequence_parallel,
)
from planner.strategy.placement import seen_from, stage_groups
from planner.strategy.strategy import Degrees, Offload, OffloadCounts, Schedule, Stage, Strategy, Zero


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


DegreesRule = Callable[[PlanningProblem, Degrees], Rejected | None]


def world_matches(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Every device belongs to exactly one place of the grid."""
    devices = problem.cluster.devices
    if degrees.world == devices:
        return None
    return Rejected(
        rule="world_size",
        detail=f"tp={degrees.tp} x pp={degrees.pp} x dp={degrees.dp} x cp={degrees.cp} makes "
        f"{degrees.world} devices, the cluster {problem.cluster.name} has {devices}: each device holds "
        "one place of the grid.",
        legal=f"degrees whose product is {devices}",
        fix=f"--fix dp={devices // (degrees.tp * degrees.pp * degrees.cp)}"
        if devices % (degrees.tp * degrees.pp * degrees.cp) == 0
        else f"divisors of {devices}: {nearest_values(divisors(devices), degrees.tp * degrees.pp)}",
    )


def batch_divides(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Every data rank runs as many equal micro-batches."""
    batch = problem.workload.batch
    if degrees.batch == batch:
        return None
    unit = degrees.dp * degrees.micro_batch
    nearest = sorted({max(1, batch // unit) * unit, (batch // unit + 1) * unit})
    return Rejected(
        rule="batch_divides",
        detail=f"dp={degrees.dp} x micro_batch={degrees.micro_batch} x "
        f"{degrees.num_micro_batches} micro-batches makes {degrees.batch} sequences, the batch has "
        f"{batch}: every data rank runs equal micro-batches.",
        legal="--batch " + " or ".join(str(value) for value in nearest),
        fix=f"--fix micro_batch= one of {nearest_values(divisors(batch // degrees.dp), degrees.micro_batch)}"
        if batch % degrees.dp == 0
        else f"--fix dp= one of {nearest_values(divisors(batch), degrees.dp)}",
    )


def heads_divide(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """A tensor-parallel rank holds whole query heads and whole key-value heads, or a copy of one of these."""
    split = problem.model.heads_split
    for heads in split:
        if not heads.split_over(degrees.tp):
            ways = range(1, max(each.count for each in split) + 1)
            more = ", or tp a multiple of their number, with copies of each" if heads.repeated else ""
            return Rejected(
                rule="tp_divides_heads",
                detail=f"tp={degrees.tp} cannot split {heads.count} {heads.what}: each rank needs whole "
                f"heads{more}.",
                legal=nearest_values((tp for tp in ways if all(h.split_over(tp) for h in split)), degrees.tp),
                fix="--fix tp=",
            )
    return None


def traced_layers_whole(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Tracing finds no way to split a layer: it runs whole, on samples of the length it was traced with."""
    for layer in problem.model.classes().values():
        if isinstance(layer, TracedLayer) and degrees.tp > 1:
            return Rejected(
                rule="traced_layers_whole",
                detail=f"tp={degrees.tp} cannot split the traced layers of {problem.model.name}.",
                legal="tp=1",
                fix="--fix tp=1",
            )
        if isinstance(layer, TracedLayer) and problem.workload.seq != layer.tokens:
            return Rejected(
                rule="traced_length",
                detail=f"{problem.model.name} was traced with samples of {layer.tokens} tokens, the "
                f"workload has {problem.workload.seq}.",
                legal=f"--seq {layer.tokens}",
                fix="--seq",
            )
    return None


def widths_divide(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Shards of the MLP are equal. Of the vocabulary they are padded: see ModelSpec.vocab_shard."""
    for width, what in problem.model.widths_split:
        if width % degrees.tp:
            return Rejected(
                rule="tp_divides_widths",
                detail=f"tp={degrees.tp} cannot split {what} of {width} into equal shards.",
                legal=nearest_values((d for d in divisors(width) if d <= 64), degrees.tp),
                fix="--fix tp=",
            )
    return None


def tp_within_node(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Tensor parallelism communicates in every layer: it stays on the fast link of a node, of every group."""
    sizes = sorted({group.devices_per_node for group in problem.cluster.groups})
    if degrees.tp == 1 or all(size % degrees.tp == 0 for size in sizes):
        return None
    return Rejected(
        rule="tp_within_node",
        detail=f"tp={degrees.tp} does not fit into nodes of {' and '.join(map(str, sizes))} devices; every "
        "layer communicates over this group.",
        legal=nearest_values(divisors(math.gcd(*sizes)), degrees.tp),
        fix="--fix tp=",
    )


def tp_within_limit(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """--max-tp: the largest tensor-parallel degree that was asked for."""
    most = problem.limits.max_tp
    if most is None or degrees.tp <= most:
        return None
    within = [tp for tp in divisors(problem.cluster.devices_per_node) if tp <= most]
    return Rejected(
        rule="max_tp",
        detail=f"tp={degrees.tp} is above the --max-tp {most} that was asked for.",
        legal=nearest_values(within, degrees.tp),
        fix=f"--max-tp {degrees.tp}, or --fix tp=",
    )


def groups_ordered(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Ranks are laid over each group of the cluster once."""
    groups = problem.cluster.groups
    if not degrees.device_order or sorted(degrees.device_order) == list(range(len(groups))):
        return None
    listed = ", ".join(f"{index} ({group.device.name})" for index, group in enumerate(groups))
    return Rejected(
        rule="device_order",
        detail=f"device_order={','.join(map(str, degrees.device_order))} is no order of the {len(groups)} "
        f"groups of {problem.cluster.name}: each device holds one place of the grid.",
        legal=f"each of {listed} once",
        fix="--fix device_order=",
    )


def sequence_parallel_needs_tp(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Sequence parallelism splits the sequence over the tensor-parallel group."""
    if not degrees.sequence_parallel:
        return None
    if degrees.tp == 1:
        return Rejected(
            rule="sequence_parallel_needs_tp",
            detail="sequence_parallel=true splits the sequence over tensor-parallel ranks, and tp=1.",
            legal="sequence_parallel=false, or tp above 1",
        )
    own = problem.workload.seq // degrees.cp
    if own % degrees.tp:
        part = f"a sequence of {own} tokens" + (f", of cp={degrees.cp} parts one," if degrees.cp > 1 else "")
        return Rejected(
            rule="sequence_parallel_divides",
            detail=f"{part} does not divide by tp={degrees.tp}.",
            legal=nearest_values(divisors(own), degrees.tp),
            fix="--seq",
        )
    return None


def stages_fit(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Every stage holds at least one block."""
    layers = problem.model.layers
    if degrees.stages <= layers:
        return None
    return Rejected(
        rule="stages_within_layers",
        detail=f"pp={degrees.pp} x chunks={degrees.chunks} makes {degrees.stages} stages of "
        f"{layers} layers: each stage holds at least one.",
        legal=f"pp x chunks up to {layers}",
        fix="--fix pp=",
    )


def schedule_legal(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Stages a rank: one, two as a V, several when interleaved, which deals micro-batches in rounds of pp."""
    if degrees.schedule.v_shaped:
        return _v_legal(degrees)
    if degrees.schedule is not Schedule.INTERLEAVED:
        if degrees.chunks == 1:
            return None
        return Rejected(
            rule="chunks_need_interleaving",
            detail=f"{degrees.schedule} holds one stage a rank, chunks={degrees.chunks}.",
            legal="chunks=1, or schedule=interleaved",
        )
    if degrees.pp == 1 or degrees.chunks == 1:
        return Rejected(
            rule="interleaving_needs_stages",
            detail=f"interleaved needs pp and chunks above 1, not pp={degrees.pp}, chunks={degrees.chunks}.",
            legal="pp >= 2 and chunks >= 2, or schedule=1f1b",
        )
    if degrees.num_micro_batches % degrees.pp:
        return Rejected(
            rule="interleaving_rounds",
            detail=f"interleaved deals micro-batches in rounds of pp={degrees.pp}; "
            f"{degrees.num_micro_batches} are not whole rounds.",
            legal=f"multiples of {degrees.pp}",
            fix="--fix micro_batch=",
        )
    return None


def _v_legal(degrees: Degrees) -> Rejected | None:
    if degrees.pp == 1 or degrees.chunks != 2:
        return Rejected(
            rule="v_needs_two_stages",
            detail=f"{degrees.schedule} places two stages on each of several ranks, not pp={degrees.pp}, "
            f"chunks={degrees.chunks}.",
            legal="pp >= 2 and chunks=2",
            fix="--fix chunks=2",
        )
    if degrees.schedule is Schedule.DUALPIPEV and degrees.num_micro_batches < degrees.stages:
        return Rejected(
            rule="dualpipev_micro_batches",
            detail=f"dualpipev fills its {degrees.stages} stages with a micro-batch each before it turns; "
            f"there are {degrees.num_micro_batches}.",
            legal=f"{degrees.stages} micro-batches or more",
            fix="--fix micro_batch= (smaller) or pp= (smaller)",
        )
    return None


def zero_matches_shards(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """ZeRO 1 to 3 share state over dp_shard ranks; ZeRO 0 replicates."""
    if degrees.zero is Zero.NONE and degrees.dp_shard > 1:
        return Rejected(
            rule="zero_matches_shards",
            detail=f"zero=0 shares nothing, and dp_shard={degrees.dp_shard}.",
            legal="dp_shard=1, or zero 1, 2 or 3",
        )
    if degrees.zero is not Zero.NONE and degrees.weight_shards == 1:
        return Rejected(
            rule="zero_matches_shards",
            detail=f"zero={int(degrees.zero)} shares state over data ranks, and there is one (dp_shard=1).",
            legal="zero=0, or dp or cp above 1",
        )
    return None


def positions_cover(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """A learned position table bounds the sequence."""
    learned, seq = problem.model.learned_positions, problem.workload.seq
    if not learned or seq <= learned:
        return None
    return Rejected(
        rule="positions_cover_sequence",
        detail=f"{problem.model.name} has a table of {learned} positions, the sequence {seq} tokens.",
        legal=f"--seq up to {learned}",
        fix="--seq",
    )


DEGREES_RULES: tuple[DegreesRule, ...] = (
    world_matches,
    traced_layers_whole,
    heads_divide,
    widths_divide,
    tp_within_node,
    tp_within_limit,
    groups_ordered,
    sequence_parallel_needs_tp,
    positions_cover,
    stages_fit,
    zero_matches_shards,
    batch_divides,
    schedule_legal,
    *SPREAD_RULES,
)


LAYER_RULES: tuple[DegreesRule, ...] = (
    traced_layers_whole,
    heads_divide,
    widths_divide,
    tp_within_node,
    tp_within_limit,
    positions_cover,
)
"""Those of the tensor-parallel degree alone."""
SEQUENCE_RULES = (sequence_parallel_needs_tp, context_attends, context_divides, context_heads)
"""Those of how a sequence is split, given tp."""
EXPERT_RULES = (experts_divide, experts_need_sequence_parallel)
"""Those of ep and etp, given these."""
PIPELINE_RULES = (stages_fit, schedule_legal)
"""Those of the schedule, given pp and the micro-batches."""


def _rules_of(problem: PlanningProblem) -> tuple[DegreesRule, ...]:
    return DEGREES_RULES + engine_rules(problem.limits.engine)


def broken_rule(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """The first rule that the degrees break, or None."""
    refused = problem_refused(problem)
    if refused:
        return refused[0]
    for rule in _rules_of(problem):
        rejected = rule(problem, degrees)
        if rejected is not None:
            return rejected
    return None


def broken_rules(problem: PlanningProblem, strategy: Strategy) -> list[Rejected]:
    """Every rule that a strategy breaks, its stages included."""
    degrees = strategy.degrees
    rules = _rules_of(problem)
    found = problem_refused(problem)
    found += [rejected for rule in rules if (rejected := rule(problem, degrees)) is not None]
    stages = strategy.stages
    bounds = [0, *(stage.end for stage in stages)]
    covers = all(stage.first == bound for stage, bound in zip(stages, bounds, strict=False))
    if not covers or bounds[-1] != problem.model.layers or len(stages) != degrees.stages:
        found.append(
            Rejected(
                rule="stages_cover_layers",
                detail=f"{len(stages)} stages end at {bounds[1:]}; {degrees.stages} stages must hold the "
                f"{problem.model.layers} layers in order, each once.",
            )
        )
    for index, stage in enumerate(stages):
        if stage.recompute.layers != stage.layers or stage.layers < 1:
            found.append(
                Rejected(
                    rule="recompute_counts",
                    detail=f"stage {index} holds {stage.layers} layers and options for "
                    f"{stage.recompute.layers}.",
                )
            )
    held = engine_strategy_rules(problem.limits.engine) if problem.limits.whole and not found else ()
    found += [rejected for rule in held if (rejected := rule(problem, strategy)) is not None]
    return found + offload_possible(problem, strategy)

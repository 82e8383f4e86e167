"""What a running model really executes, read from its modules, shards and records, not from the plan.

Each figure has its witness: degrees from the meshes that parameters live on and from what passed through
the first block; context parallelism from the exchanges that attention made and the groups that it made them
in; the ZeRO stage from FSDP's units and from which backward passes reduced gradients;
recomputation from the wrappers; stages from the blocks that each rank holds; the schedule table from the
record of the last step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch.distributed._composable.replicate_with_fsdp import ReplicateModule
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from planner.foundation.decode import decode, encode
from planner.foundation.frozen import frozen
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import ActionKind, Table, build_table, parse_table, print_table
from planner.strategy.strategy import Degrees, OffloadCounts, RecomputeCounts, Schedule, Stage, Strategy, Zero
from runtime.launch.process_group import gather_json
from runtime.model.transformer import Transformer
from runtime.parallel import recompute
from runtime.parallel.data import unit_groups
from runtime.parallel.meshes import mesh_axes
from runtime.parallel.pipeline import Pipeline, Record, StageModule


@frozen
class Executed:
    """The strategy and schedule table that the ranks of a run executed in their last step."""

    strategy: Strategy
    schedule_table: tuple[tuple[str, ...], ...]

    def differences(self, plan: Plan) -> tuple[str, ...]:
        """What is not as the plan says, one line each."""
        found = [
            f"{name} is {mine}, the plan says {theirs}"
            for name, mine in encode(self.strategy.degrees).items()
            if mine != (theirs := encode(plan.strategy.degrees)[name])
        ]
        if self.strategy.stages != plan.strategy.stages:
            found.append(f"stages are {self.strategy.stages}, the plan says {plan.strategy.stages}")
        if self.schedule_table != plan.schedule_table:
            found.append(f"schedule is {self.schedule_table}, the plan says {plan.schedule_table}")
        return tuple(found)


@frozen
class _RankReport:
    """What one rank reads from its own modules and record."""

    stages: dict[str, Stage]
    row: tuple[str, ...]
    axes: dict[str, int]
    cp: int
    cp_exchange: CpExchange
    zero: int
    micro_batch: int
    local_seq: int


def read_executed(pipeline: Pipeline, plan: Plan, hosted: Collection[int] = ()) -> Executed:
    """What all ranks executed in their last step. Collective. The plan gives only the world's shape:
    the sequence length that slices are compared with, and a name for tables that several schedules share.
    `hosted` are this rank's blocks whose optimizer updates host memory.
    """
    report = _report(pipeline, hosted)
    reports = [
        decode(_RankReport, value, source=f"rank {rank}")
        for rank, value in enumerate(gather_json(encode(report)))
    ]
    held = [sorted(int(index) for index in report.stages) for report in reports]
    # The pipeline axis is the outermost: neighbouring ranks hold the same stages and ran the same row.
    firsts = [rank for rank, own in enumerate(held) if rank == 0 or own != held[rank - 1]]
    assert all(held.count(held[rank]) == len(held) // len(firsts) for rank in firsts), held
    table = tuple(reports[rank].row for rank in firsts)
    assert all(report.row in table for report in reports), reports
    stages = {int(index): stage for report in reports for index, stage in report.stages.items()}
    return Executed(
        strategy=Strategy(
            degrees=_degrees(reports, table, plan),
            stages=tuple(stages[index] for index in sorted(stages)),
        ),
        schedule_table=table,
    )


def _report(pipeline: Pipeline, hosted: Collection[int]) -> _RankReport:
    modules, record = pipeline.modules, pipeline.record
    shape = next(module.hidden_shape for module in modules if module.hidden_shape is not None)
    cp_exchange, cp = read_exchange(modules, record)
    return _RankReport(
        stages={str(module.index): read_stage(module.model, hosted) for module in modules},
        row=print_table(Table.of([tuple(record.actions)]))[0],
        axes=_axes(modules),
        cp=cp,
        cp_exchange=cp_exchange,
        zero=int(read_zero([module.model for module in modules], record)),
        micro_batch=shape[0],
        local_seq=shape[1],
    )


def read_stage(model: Transformer, hosted: Collection[int] = ()) -> Stage:
    """The blocks that a model holds, what each recomputes, and what of each went to host memory."""
    layers = [int(index) for index, _ in model.layers.items()]
    options = [recompute.read(layer) for layer in model.layers.values()]
    counts = {str(option): options.count(option) for option in Recompute}
    sent = model.offload.sent_bytes if model.offload is not None else {}
    offload = OffloadCounts(
        optimizer=_leading(layers, hosted), activations=_leading(layers, [i for i, n in sent.items() if n])
    )
    stage = Stage(first=layers[0], end=layers[-1] + 1, recompute=RecomputeCounts(**counts), offload=offload)
    assert layers == list(range(stage.first, stage.end)), layers
    assert tuple(options) == stage.recompute.options(), options
    return stage


def read_exchange(modules: list[StageModule], record: Record) -> tuple[CpExchange, int]:
    """How attention exchanged keys and values, and over how many ranks: 1 where some block did not."""
    forwards = {module.index: 0 for module in modules}
    for action in record.actions:
        forwards[action.stage] += action.kind is ActionKind.FORWARD
    attentions = sum(forwards[module.index] * len(module.model.layers) for module in modules)
    kinds = set(record.exchanges)
    if len(record.exchanges) < attentions or len(kinds) != 1:
        return CpExchange.RING, 1
    return kinds.pop()


def _leading(layers: list[int], chosen: Collection[int]) -> int:
    """How many of a stage's first blocks are chosen; no other may be."""
    own = [layer for layer in layers if layer in chosen]
    assert own == layers[: len(own)], (layers, own)
    return len(own)


def read_zero(models: list[Transformer], record: Record) -> Zero:
    """The ZeRO stage, from FSDP's units and from which passes that completed gradients reduced them.

    With one micro-batch, stages 1 and 2 do the same: both reduce in the only pass, and read as 1.
    """
    units = [module for model in models for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or all(isinstance(unit, ReplicateModule) for unit in units):
        return Zero.NONE
    groups = [group for model in models for group in unit_groups(model)]
    if all(group.post_forward_mesh_info is not None for group in groups):
        return Zero.PARAMETERS
    several = len({action.micro_batch for action in record.actions}) > 1
    return Zero.GRADIENTS if several and all(record.reduced) else Zero.OPTIMIZER


def _axes(modules: list[StageModule]) -> dict[str, int]:
    """Sizes of the axes that some parameter or unit of this rank is spread over."""
    sizes: dict[str, int] = {}
    for parameter in (p for module in modules for p in module.parameters()):
        if isinstance(parameter, DTensor):
            sizes |= dict(zip(mesh_axes(parameter), parameter.device_mesh.shape, strict=True))
    for group in (group for module in modules for group in unit_groups(module)):
        mesh = group.mesh_info.mesh
        sizes |= dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
    return sizes


def _degrees(reports: list[_RankReport], table: tuple[tuple[str, ...], ...], plan: Plan) -> Degrees:
    """One set of degrees from all ranks' reports, which must agree but for the rows of the schedule."""
    first = reports[0]
    for report in reports:
        assert replace(report, stages=first.stages, row=first.row) == first, (first, report)
    replicate, shard = _data_axes(first.axes, first.cp)
    actions = parse_table(table)
    micro_batches = {action.micro_batch for row in actions for action in row}
    chunks = {len({action.stage for action in row}) for row in actions}
    assert len(chunks) == 1, chunks
    return Degrees(
        tp=first.axes.get("tp", 1),
        pp=len(table),
        chunks=chunks.pop(),
        schedule=_schedule(actions, len(micro_batches), plan.strategy.degrees.schedule),
        dp_replicate=replicate,
        dp_shard=shard,
        cp=first.cp,
        cp_exchange=_exchange_of(first, plan.strategy.degrees.cp_exchange),
        ep=first.axes.get("ep", 1),
        etp=_expert_tp(first.axes, plan.strategy.degrees),
        zero=_zero_of(first.zero, len(micro_batches), plan.strategy.degrees.zero),
        micro_batch=first.micro_batch,
        num_micro_batches=len(micro_batches),
        sequence_parallel=first.local_seq * first.cp < plan.workload.seq,
    )


def _data_axes(axes: dict[str, int], cp: int) -> tuple[int, int]:
    """dp_replicate and dp_shard: the data axes that weights are on, without cp, which is folded into one."""
    sizes = {axis: axes.get(axis, 1) for axis in ("dp_replicate", "dp_shard")}
    folded = [axis for axis in sizes if f"{axis}_cp" in axes]
    assert len(folded) == (cp > 1), (axes, cp)
    sizes |= {axis: axes[f"{axis}_cp"] // cp for axis in folded}
    return sizes["dp_replicate"], sizes["dp_shard"]


def _exchange_of(report: _RankReport, expected: CpExchange) -> CpExchange:
    """The exchange read; on one rank, which exchanges nothing, the expected one."""
    return expected if report.cp == 1 else report.cp_exchange


def _expert_tp(axes: dict[str, int], expected: Degrees) -> int | None:
    """The ranks that share out one expert: those of tp without a mesh of their own. None is tp as well."""
    found = axes.get("etp", axes.get("tp", 1))
    return expected.etp if found == expected.expert_tp else found


def _zero_of(zero: int, micro_batches: int, expected: Zero) -> Zero:
    """The stage read; where 1 and 2 cannot be told apart (one micro-batch), the expected one of them."""
    if zero == Zero.OPTIMIZER and micro_batches == 1 and expected is Zero.GRADIENTS:
        return expected
    return Zero(zero)


def _schedule(table: Table, micro_batches: int, expected: Schedule) -> Schedule:
    """The schedule that has this table; the expected one first, as small tables can be of several.

    A table that is of none is a custom one, which only the placement of its stages ties to a schedule's name.
    """
    pp, chunks = len(table), len({action.stage for action in table[0]})
    candidates: tuple[Schedule, ...] = (expected, *Schedule)
    for schedule in candidates:
        try:
            named = build_table(schedule, pp, chunks, micro_batches) == table
        except ValueError:  # it has none of this size
            continue
        if named:
            return schedule
    v_shaped = pp > 1 and chunks == 2 and 2 * pp - 1 in table.stages_of(0)
    if expected.v_shaped == v_shaped:
        return expected
    others = Schedule.INTERLEAVED if chunks > 1 else Schedule.ONE_F_ONE_B
    return Schedule.ZBV if v_shaped else others

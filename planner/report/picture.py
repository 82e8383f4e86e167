"""The plan as a picture: its rank grid with every group, and its layers with their recompute marks."""

from __future__ import annotations

import itertools

from planner.foundation.frozen import frozen
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import AXES

MAX_ROWS = 32
MAX_CHIPS = 384
"""Ranks drawn in the whole picture, about; the rest are counted. More would not be looked at."""
MAX_BOXES = 32
AXIS_TITLES = {
    "pp": "pipeline",
    "dp_replicate": "replicated data",
    "dp_shard": "sharded data",
    "cp": "context",
    "ep": "expert",
    "tp": "tensor",
}


@frozen
class RankChip:
    """One rank: its number, and all its groups in words."""

    rank: int
    tip: str


@frozen
class RankBox:
    """The ranks that share one position on every axis but tp: a tensor-parallel group."""

    title: str
    chips: tuple[RankChip, ...]


@frozen
class LayerCell:
    """One block of a stage, the embedding (`E`) or the head (`H`)."""

    text: str
    mark: str
    tip: str


@frozen
class StageStrip:
    """One stage: its title, and its layers in order."""

    title: str
    cells: tuple[LayerCell, ...]
    recompute: str


@frozen
class PipelineRow:
    """One pipeline rank: the stages that it holds and the ranks that hold them."""

    title: str
    stages: tuple[StageStrip, ...]
    boxes: tuple[RankBox, ...]
    hidden_boxes: int


@frozen
class AxisGroups:
    """One axis of the grid: how long it is, and its groups of ranks in words."""

    axis: str
    title: str
    size: int
    groups: str


@frozen
class Picture:
    """All of it. `frame` says what a frame of ranks is; `hidden_rows` are pipeline ranks not drawn."""

    frame: str
    rows: tuple[PipelineRow, ...]
    hidden_rows: int
    axes: tuple[AxisGroups, ...]


def rank_of(shape: tuple[int, ...], place: tuple[int, ...]) -> int:
    """The global rank at a place of the grid, the last axis running fastest."""
    rank = 0
    for size, index in zip(shape, place, strict=True):
        rank = rank * size + index
    return rank


def groups_along(shape: tuple[int, ...], axis: int) -> list[tuple[int, ...]]:
    """Every group of ranks that differ only along one axis of the grid."""
    others = [range(1) if index == axis else range(size) for index, size in enumerate(shape)]
    return [
        tuple(rank_of(shape, (*place[:axis], index, *place[axis + 1 :])) for index in range(shape[axis]))
        for place in itertools.product(*others)
    ]


def print_ranks(ranks: tuple[int, ...]) -> str:
    """Ranks as text, runs shortened: `0-3`, `0, 4, 8`, `0, 8, ... 56`."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) > 6:
        return f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"
    return ", ".join(str(rank) for rank in ranks)


def draw_plan(plan: Plan) -> Picture:
    """The picture of a plan."""
    degrees = plan.strategy.degrees
    shown = min(degrees.pp, MAX_ROWS)
    frame = "Each frame of ranks is a tensor-parallel group."
    return Picture(
        frame=frame if degrees.tp > 1 else "Each frame is one rank: layers are not split.",
        rows=tuple(_draw_row(plan, pp_rank) for pp_rank in range(shown)),
        hidden_rows=degrees.pp - shown,
        axes=tuple(_describe_axis(degrees.grid_shape(), index) for index in _used_axes(plan)),
    )


def _used_axes(plan: Plan) -> list[int]:
    return [index for index, size in enumerate(plan.strategy.degrees.grid_shape()) if size > 1]


def _describe_axis(shape: tuple[int, ...], axis: int) -> AxisGroups:
    groups = groups_along(shape, axis)
    text = "  ".join("{" + print_ranks(group) + "}" for group in groups[:8])
    more = f" … {len(groups)} groups in all" if len(groups) > 8 else ""
    name = AXES[axis]
    return AxisGroups(axis=name, title=AXIS_TITLES[name], size=shape[axis], groups=text + more)


def _draw_row(plan: Plan, pp_rank: int) -> PipelineRow:
    degrees = plan.strategy.degrees
    held = degrees.stages_of_pp_rank(pp_rank)
    places = list(itertools.product(*(range(size) for size in degrees.grid_shape()[1:-1])))
    ranks = degrees.ranks_of_pp_rank(pp_rank)
    shown = min(MAX_BOXES, max(2, MAX_CHIPS // (min(degrees.pp, MAX_ROWS) * degrees.tp)))
    return PipelineRow(
        title=f"Pipeline rank {pp_rank}" if degrees.pp > 1 else f"Rank{'s' * (len(ranks) > 1)}",
        stages=tuple(_draw_stage(plan, index) for index in held),
        boxes=tuple(_draw_box(plan, pp_rank, place) for place in places[:shown]),
        hidden_boxes=max(0, len(places) - shown),
    )


def _draw_box(plan: Plan, pp_rank: int, place: tuple[int, ...]) -> RankBox:
    shape = plan.strategy.degrees.grid_shape()
    names = dict(zip(AXES[1:-1], place, strict=True))
    short = {"dp_replicate": "replica", "dp_shard": "shard", "cp": "cp", "ep": "ep"}
    used = [f"{short[axis]} {names[axis]}" for axis in short if shape[AXES.index(axis)] > 1]
    return RankBox(
        title=" · ".join(used),
        chips=tuple(_draw_chip(shape, (pp_rank, *place, tp)) for tp in range(shape[-1])),
    )


def _draw_chip(shape: tuple[int, ...], place: tuple[int, ...]) -> RankChip:
    rank = rank_of(shape, place)
    groups = []
    for axis, size in enumerate(shape):
        if size > 1:
            peers = tuple(rank_of(shape, (*place[:axis], i, *place[axis + 1 :])) for i in range(size))
            groups.append(f"{AXIS_TITLES[AXES[axis]]} group {print_ranks(peers)}")
    return RankChip(rank=rank, tip="; ".join([f"rank {rank}", *groups]))


def _draw_stage(plan: Plan, index: int) -> StageStrip:
    stage = plan.strategy.stages[index]
    cells = [
        LayerCell(text=str(layer), mark=str(option), tip=f"layer {layer}: {_RECOMPUTE_TIPS[option]}")
        for layer, option in zip(range(stage.first, stage.end), stage.recompute.options(), strict=True)
    ]
    if index == 0:
        cells.insert(0, LayerCell(text="E", mark="end", tip="embedding"))
    if index == len(plan.strategy.stages) - 1:
        cells.append(LayerCell(text="H", mark="end", tip="head: final norm, output projection, loss"))
    title, recompute = _stage_title(plan, index), _recompute_text(plan, index)
    return StageStrip(title=title, cells=tuple(cells), recompute=recompute)


_RECOMPUTE_TIPS = {
    Recompute.NONE: "keeps all activations",
    Recompute.SELECTIVE: "recomputes the element-wise part",
    Recompute.FULL: "keeps only its input, recomputes the rest",
}


def _stage_title(plan: Plan, index: int) -> str:
    stage = plan.strategy.stages[index]
    if stage.layers == 0:
        return f"Stage {index}: no layers"
    if stage.layers == 1:
        return f"Stage {index}: layer {stage.first}"
    return f"Stage {index}: layers {stage.first}-{stage.end - 1}"


def _recompute_text(plan: Plan, index: int) -> str:
    counts = plan.strategy.stages[index].recompute
    parts = [
        f"{count} {name}" for name, count in (("full", counts.full), ("selective", counts.selective)) if count
    ]
    return f"recompute: {', '.join(parts)} of {counts.layers}" if parts else "no recompute"

"""The planner's schedules against torch.distributed.pipelining: the same tables, and as much kept alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    _PipelineScheduleRuntime,
)

from planner.strategy.schedule.schedules import build_table, peak_in_flight, print_table
from planner.strategy.strategy import Degrees, Schedule
from tests.runtime.ranks import on_ranks

IN_TORCH: dict[Schedule, Any] = {
    Schedule.GPIPE: ScheduleGPipe,
    Schedule.ONE_F_ONE_B: Schedule1F1B,
    Schedule.INTERLEAVED: ScheduleInterleaved1F1B,
    Schedule.ZB_H1: ScheduleInterleavedZeroBubble,
    Schedule.ZBV: ScheduleZBVZeroBubble,
    Schedule.DUALPIPEV: ScheduleDualPipeV,
}
WIDTH = 4


def torch_row(schedule: Schedule, rank: int, pp: int, chunks: int, micro_batches: int) -> tuple[str, ...]:
    """The row that torch makes for a rank, without the gaps that it marks."""
    rounds = max(1, micro_batches // pp)
    made = SimpleNamespace(
        pp_group_size=pp,
        n_local_stages=chunks,
        num_stages=pp * chunks,
        _n_microbatches=micro_batches,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
    )
    row = IN_TORCH[schedule]._calculate_single_rank_operations(made, rank)
    return tuple(str(action) for action in row if action is not None)


@pytest.mark.parametrize("pp", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        (Schedule.INTERLEAVED, 2),
        (Schedule.INTERLEAVED, 3),
        (Schedule.ZB_H1, 1),
        (Schedule.ZBV, 2),
        (Schedule.DUALPIPEV, 2),
    ],
)
def test_tables_are_torchs(schedule: Schedule, chunks: int, pp: int) -> None:
    """Action by action on every rank, fewer micro-batches than stages and many more."""
    least = 2 * pp if schedule is Schedule.DUALPIPEV else 1
    for micro_batches in range(least, 4 * pp + 2):
        if schedule is Schedule.INTERLEAVED and micro_batches % pp:
            continue
        ours = print_table(build_table(schedule, pp, chunks, micro_batches))
        assert ours == tuple(torch_row(schedule, r, pp, chunks, micro_batches) for r in range(pp))


class Kept:
    """A tensor that autograd saved, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Watched(nn.Module):
    """Two layers that note, before each forward's end, how many micro-batches autograd keeps tensors of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.saved: list[weakref.WeakSet[Kept]] = []
        self.peak = 0

    def forward(self, x: Tensor) -> Tensor:
        weights = {p.untyped_storage().data_ptr() for p in self.parameters()}
        mine: weakref.WeakSet[Kept] = weakref.WeakSet()
        self.saved.append(mine)

        def pack(tensor: Tensor) -> Kept | Tensor:
            if tensor.untyped_storage().data_ptr() in weights:
                return tensor
            kept = Kept(tensor.detach())  # a result's own graph would keep itself alive
            mine.add(kept)
            return kept

        def unpack(packed: Kept | Tensor) -> Tensor:
            return packed.tensor if isinstance(packed, Kept) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out: Tensor = self.layers(x)
        self.peak = max(self.peak, sum(len(kept) > 0 for kept in self.saved))
        return out


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(output, target)


def peaks_in_torch(schedule: Schedule, degrees: Degrees) -> Callable[[int], dict[int, int]]:
    """What a rank does: two steps of torch's own schedule; by stage the most micro-batches kept."""

    def body(rank: int) -> dict[int, int]:
        held = [s for s in range(degrees.stages) if degrees.pp_rank_of_stage(s) == rank]
        modules = {s: Watched() for s in held}
        stages = [
            PipelineStage(modules[s], s, degrees.stages, torch.device("cpu"), group=dist.group.WORLD)
            for s in held
        ]
        single = schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B)
        runner = IN_TORCH[schedule](
            stages[0] if single else stages, degrees.num_micro_batches, loss_fn=loss_of
        )
        x = torch.ones(degrees.num_micro_batches, WIDTH)
        for _ in range(2):
            for module in modules.values():  # the first step runs one more forward, to learn shapes
                module.saved.clear()
                module.peak = 0
            args = (x,) if 0 in held else ()
            last = {"target": x, "losses": []} if degrees.stages - 1 in held else {}
            runner.step(*args, **last, return_outputs=False)
        assert isinstance(runner, _PipelineScheduleRuntime) or single
        return {s: module.peak for s, module in modules.items()}

    return body


@pytest.mark.parametrize(
    ("schedule", "pp", "micro_batches"),
    [
        (Schedule.GPIPE, 2, 5),
        (Schedule.ONE_F_ONE_B, 3, 5),
        (Schedule.INTERLEAVED, 2, 6),
        (Schedule.ZB_H1, 3, 6),
        (Schedule.ZBV, 2, 6),
        (Schedule.ZBV, 3, 7),
        (Schedule.DUALPIPEV, 2, 6),
    ],
)
def test_as_much_is_kept_as_in_torch(schedule: Schedule, pp: int, micro_batches: int) -> None:
    """The most micro-batches that autograd keeps tensors of, stage by stage, in torch's own run on gloo."""
    if schedule in (Schedule.ZBV, Schedule.DUALPIPEV) and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 lets a rank with two neighbouring stages send to itself, which gloo cannot")
    chunks = schedule.least_chunks
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=micro_batches)
    table = build_table(schedule, pp, chunks, micro_batches)
    expected = {stage: peak for row in table for stage, peak in peak_in_flight(row).items()}
    found: dict[int, int] = {}
    for peaks in on_ranks(peaks_in_torch(schedule, degrees), pp):
        found |= {int(stage): peak for stage, peak in peaks.items()}
    assert found == expected

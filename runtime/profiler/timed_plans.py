"""Plans that exist to be timed: chosen, not solved, so their estimates are zeros that nobody reads."""

from __future__ import annotations

from planner.hardware.cluster import ClusterSpec, DeviceGroup, Link, unknown_device
from planner.model.spec import ModelSpec
from planner.model.workload import Precision, Workload
from planner.strategy.estimate import (
    Coverage,
    Estimate,
    MemoryBreakdown,
    StageEstimate,
    TimeBreakdown,
    Verdict,
)
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import build_table, print_table
from planner.strategy.strategy import AXES, Degrees, Strategy, even_stages


def bench_plan(model: ModelSpec, degrees: Degrees, seq: int, precision: Precision) -> Plan:
    """The plan that runs `model` by these degrees with even stages and no recompute."""
    stages = even_stages(model.layers, degrees.stages)
    table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
    nothing = StageEstimate(memory=MemoryBreakdown(), time_s=0.0, forward_s=0.0, backward_s=0.0)
    return Plan(
        model=model,
        workload=Workload(seq=seq, batch=degrees.batch, precision=precision),
        cluster=_world(degrees.world),
        strategy=Strategy(degrees=degrees, stages=stages),
        stage_estimates=(nothing,) * len(stages),
        estimate=_no_estimate(),
        rank_axes=AXES,
        rank_grid_shape=degrees.grid_shape(),
        schedule_table=print_table(table),
        solver=None,
        rejected={},
        alternatives=(),
        digests={},
    )


def _world(devices: int) -> ClusterSpec:
    device = unknown_device("bench", "the device being measured")
    link = Link(name="none", latency_s=0.0, bytes_per_s=None)
    group = DeviceGroup(device=device, nodes=1, devices_per_node=devices)
    return ClusterSpec(name="bench", groups=(group,), intra=link, inter=link)


def _no_estimate() -> Estimate:
    return Estimate(
        step_time_s=0.0,
        step_time_interval_s=(0.0, 0.0),
        tokens_per_s=0.0,
        mfu=None,
        days=None,
        cost_usd=None,
        breakdown=TimeBreakdown(),
        peak_memory_bytes=0,
        memory_limit_bytes=0,
        verdict=Verdict.SAFE,
        coverage=Coverage(),
    )

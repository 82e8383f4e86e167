"""Sample plans and runs for the tests of the report.

`python -m tests.report_samples DIR` writes them as files, to look at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from planner.foundation.units import GIB, MIB
from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.report.run_record import ComparisonRow, save_comparison
from planner.strategy.estimate import (
    Coverage,
    Estimate,
    MemoryBreakdown,
    StageEstimate,
    TimeBreakdown,
    TimelineEvent,
    Verdict,
)
from planner.strategy.plan import Alternative, Certificate, Plan, save_plan
from planner.strategy.schedule.schedules import Table, build_table, print_table
from planner.strategy.strategy import (
    AXES,
    Degrees,
    RecomputeCounts,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
)


def model(name: str = "llama-demo-30m", layers: int = 12, hidden: int = 384, vocab: int = 4096) -> ModelSpec:
    block = Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=hidden // 64, kv_heads=hidden // 128, head_dim=64),
        mlp=Mlp(width=4 * hidden, gated=True, activation=Activation.SILU),
    )
    return ModelSpec(
        name=name,
        model_type="llama",
        hidden=hidden,
        vocab=vocab,
        max_positions=4096,
        learned_positions=0,
        rope_theta=10000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=False,
        segments=(Segment(block=block, count=layers),),
    )


def cluster(nodes: int = 1, per_node: int = 4, name: str = "local:4", memory: int = 6 * GIB) -> ClusterSpec:
    device = Device(
        name="cpu",
        title="a process on this CPU",
        vendor="generic",
        memory_bytes=memory,
        usable_memory_bytes=memory,
        memory_bandwidth_bytes_per_s=2e10,
        peak_fp32_flops=None,
        peak_bf16_flops=None,
        peak_fp16_flops=None,
        link_bytes_per_s=None,
    )
    link = Link(name="loopback", latency_s=1e-4, bytes_per_s=1e9)
    return ClusterSpec(
        name=name,
        groups=(DeviceGroup(device=device, nodes=nodes, devices_per_node=per_node, slots_per_node=2),),
        intra=link,
        inter=link,
    )


def memory(scale: float) -> MemoryBreakdown:
    return MemoryBreakdown(
        weights_bytes=int(64 * MIB * scale),
        grads_bytes=int(64 * MIB * scale),
        optimizer_bytes=int(128 * MIB * scale),
        activations_bytes=int(190 * MIB * scale),
        transient_bytes=int(48 * MIB * scale),
        runtime_bytes=int(16 * MIB),
        allocator_bytes=int(8 * MIB),
    )


BREAKDOWN = TimeBreakdown(
    compute_s=0.61,
    recompute_s=0.07,
    tp_comm_s=0.18,
    pp_comm_s=0.02,
    bubble_s=0.14,
    optimizer_s=0.05,
    host_s=0.04,
)
SMALL = Degrees(
    tp=2, pp=2, schedule=Schedule.ONE_F_ONE_B, micro_batch=2, num_micro_batches=8, sequence_parallel=True
)


def alternatives(layers: int) -> tuple[Alternative, ...]:
    others = (
        (
            Degrees(pp=4, micro_batch=2, num_micro_batches=8),
            1.19,
            "the bubble takes 0.31 s of the step",
        ),
        (
            Degrees(tp=4, micro_batch=4, num_micro_batches=4),
            1.62,
            "tensor-parallel communication",
        ),
        (
            Degrees(dp_shard=4, zero=Zero.PARAMETERS, micro_batch=2, num_micro_batches=2),
            1.34,
            "gathers parameters twice a micro-batch",
        ),
        (Degrees(dp_replicate=4, micro_batch=4, num_micro_batches=1), 1.05, "needs 7.1 GiB of 6 GiB"),
    )
    return tuple(
        Alternative(
            strategy=Strategy(degrees=degrees, stages=even_stages(layers, degrees.stages)),
            step_time_s=time_s,
            peak_memory_bytes=int(500 * MIB * time_s),
            verdict=Verdict.NO if "needs" in reason else Verdict.SAFE,
            reason=reason,
        )
        for degrees, time_s, reason in others
    )


def estimate(breakdown: TimeBreakdown = BREAKDOWN, limit: int = 700 * MIB, peak: int = 533 * MIB) -> Estimate:
    total_s = breakdown.total_s
    return Estimate(
        step_time_s=total_s,
        step_time_interval_s=(total_s * 0.9, total_s * 1.12),
        tokens_per_s=16 * 256 / total_s,
        mfu=None,
        days=None,
        cost_usd=None,
        breakdown=breakdown,
        peak_memory_bytes=peak,
        memory_limit_bytes=limit,
        verdict=Verdict.SAFE,
        coverage=Coverage(measured=0.72, interpolated=0.2, fitted=0.05, datasheet=0.03),
    )


def plan(
    degrees: Degrees = SMALL, name: str = "llama-demo-30m", layers: int = 12, *, solved: bool = True
) -> Plan:
    stages = stages_of(layers, degrees.stages)
    table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
    certificate = Certificate(
        status="optimal",
        objective_s=BREAKDOWN.total_s,
        lower_bound_s=BREAKDOWN.total_s * 0.998,
        gap=0.002,
        wall_s=0.84,
        shapes=96,
        pruned=71,
        milps=9,
        verified=True,
    )
    return Plan(
        model=model(name, layers),
        workload=Workload(seq=256, batch=degrees.batch, tokens=1_000_000, precision=Precision.FP32),
        cluster=cluster(name=f"local:{degrees.world}", per_node=degrees.world),
        strategy=Strategy(degrees=degrees, stages=stages),
        stage_estimates=tuple(
            StageEstimate(
                memory=memory(1 - 0.12 * index / degrees.stages), time_s=0.45, forward_s=0.02, backward_s=0.04
            )
            for index in range(degrees.stages)
        ),
        estimate=estimate(),
        rank_axes=AXES,
        rank_grid_shape=degrees.grid_shape(),
        schedule_table=print_table(table),
        timeline=replayed(table, degrees.stages - 1) if solved else (),
        solver=certificate if solved else None,
        rejected={"heads_divide": 12, "batch_divides": 31, "bound_above_incumbent": 28} if solved else {},
        alternatives=alternatives(layers) if solved else (),
        digests={"model": "sha256:" + "1a2b3c4d" * 8, "cluster": "sha256:" + "5e6f7a8b" * 8},
        not_modelled=("network congestion from other jobs", "the first step's compilation"),
    )


def stages_of(layers: int, count: int) -> tuple[Stage, ...]:
    """Uneven stages with a mix of recompute options."""
    result = []
    for stage in even_stages(layers, count, Recompute.NONE):
        full = min(1, stage.layers) if stage.first == 0 else 0
        selective = min(2, stage.layers - full)
        counts = RecomputeCounts(none=stage.layers - full - selective, selective=selective, full=full)
        result.append(Stage(first=stage.first, end=stage.end, recompute=counts))
    return tuple(result)


def replayed(
    table: Table, last_stage: int, forward_s: float = 0.02, backward_s: float = 0.042
) -> tuple[TimelineEvent, ...]:
    """A replay of a table with equal stages: enough of a simulator to draw."""
    done: dict[tuple[int, str, int], float] = {}
    cursor, clock_s = [0] * len(table), [0.0] * len(table)
    events = []
    while any(cursor[rank] < len(row) for rank, row in enumerate(table)):
        for rank, row in enumerate(table):
            while cursor[rank] < len(row):
                stage, kind, mb, _ = row[cursor[rank]]
                before = (stage - 1, "F", mb) if kind == "F" else (stage + 1, "B", mb)
                if (kind == "F" and stage == 0) or (kind == "B" and stage == last_stage):
                    before = (stage, "F", mb) if kind == "B" else None
                if before is not None and before not in done:
                    break
                start_s = max(clock_s[rank], done.get(before, 0.0))
                duration_s = forward_s if kind == "F" else backward_s
                events.append(_event(rank, str(row[cursor[rank]]), start_s, duration_s))
                clock_s[rank] = done[(stage, str(kind), mb)] = start_s + duration_s
                cursor[rank] += 1
    end_s = max(clock_s)
    return (*events, *(_event(rank, "optimizer", end_s, 0.03) for rank in range(len(table))))


def _event(rank: int, name: str, start_s: float, duration_s: float) -> TimelineEvent:
    return TimelineEvent(rank=rank, name=name, kind="", start_s=start_s, duration_s=duration_s)


def measured(sample: Plan) -> list[dict[str, object]]:
    """A timeline.json: the predicted one, a little late and uneven, on every rank of each pipeline rank."""
    degrees = sample.strategy.degrees
    return [
        {
            "rank": rank,
            "name": event.name,
            "start_s": event.start_s * 1.05 + 0.001 * (rank % 3) + 12.5,
            "duration_s": event.duration_s * (1.01 + 0.02 * (rank % 2)),
        }
        for event in sample.timeline
        for rank in degrees.ranks_of_pp_rank(event.rank)
    ]


def _row(label: str, strategy: str, seconds: tuple[float, float], mib: tuple[int, int]) -> ComparisonRow:
    return ComparisonRow(
        label=label,
        strategy=strategy,
        predicted_step_time_s=seconds[0],
        measured_step_time_s=seconds[1],
        predicted_peak_memory_bytes=mib[0] * MIB,
        measured_peak_memory_bytes=mib[1] * MIB,
        chosen=label == "chosen",
    )


COMPARISON = (
    _row("chosen", SMALL.label(), (1.11, 1.16), (533, 548)),
    _row("pipeline only", "tp1 pp4 dp1 zero0 mb2x8 1f1b", (1.19, 1.33), (480, 470)),
    _row("fully sharded", "tp1 pp1 dp4 zero3 mb2x2", (1.34, 1.52), (390, 402)),
)


def write_run(folder: Path, sample: Plan, steps: int = 40) -> Path:
    """A whole run folder, with every optional file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(sample, folder / "plan.json")
    world = sample.strategy.degrees.world
    lines = [
        {
            "step": step,
            "loss": round(8.3 * 0.95**step + 2.1 + 0.05 * (step % 5), 4),
            "grad_norm": 1.0,
            "lr": 3e-4,
            "step_time_s": 2.9 if step == 0 else 1.15 + 0.03 * (step % 4),
            "tokens_per_s": 3530.0,
            "mfu": None,
            "peak_memory_bytes": [int((548 - 9 * rank) * MIB) for rank in range(world)],
        }
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "predicted_step_time_s": sample.estimate.step_time_s,
        "measured_step_time_s": 1.16,
        "measured_peak_memory_bytes": 548 * MIB,
        "goodput": 0.97,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "timeline.json").write_text(json.dumps(measured(sample)))
    save_comparison(COMPARISON, folder / "comparison.json")
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_run(target / "run", plan())
    large = Degrees(
        tp=8, pp=8, chunks=2, schedule=Schedule.INTERLEAVED, dp_replicate=2, dp_shard=8, zero=Zero.OPTIMIZER,
        micro_batch=1, num_micro_batches=64, sequence_parallel=True,
    )  # fmt: skip
    save_plan(plan(large, "gpt-large-<b>&\"'", layers=126), target / "large.json")

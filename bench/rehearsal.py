"""Rehearsed ranks against real ones, predictions against rehearsals, and traces against an H100.

    python -m bench.rehearsal gloo          peaks of ranks alone against ranks of a real group on this CPU
    python -m bench.rehearsal traces        predicted peaks of 20 plans for H100 clusters against shapes alone
    python -m bench.rehearsal reference     shapes alone against what was measured on one H100
    python -m bench.rehearsal device        on an accelerator: memory and compute of the 20 plans, predicted
                                            against rehearsed, and plans at the limit that must not run out

Each writes bench/results/DATE-rehearsal-PART.json. The plans are fixed here, before anything is measured.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click

from planner.advice.apply_rehearsal import refine
from planner.calibration.software import settings_for_engine
from planner.commands.shared.text import table
from planner.commands.shared.with_torch import require_torch
from planner.commands.splitting.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.foundation.decode import write_atomic
from planner.foundation.units import GIB
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.choose import shipped_profile
from planner.search.solve import make_plan
from planner.strategy.equivalent_ranks import alike_ranks, shortened
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, RehearsalMode
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

RESULTS = Path(__file__).parent / "results"

GLOO: tuple[str, ...] = (
    "dp=4 zero=0 micro_batch=2",
    "dp=4 zero=1 micro_batch=2 recompute=selective",
    "dp=4 zero=2 micro_batch=2 recompute=full",
    "dp=4 zero=3 micro_batch=4",
    "dp=4 zero=3 micro_batch=2",
    "tp=4 micro_batch=8",
    "tp=4 micro_batch=4 sequence_parallel=true recompute=full",
    "tp=2 dp=2 zero=1 sequence_parallel=true micro_batch=4",
    "tp=2 dp=2 zero=3 micro_batch=2",
    "pp=4 micro_batch=2 schedule=gpipe",
    "pp=4 micro_batch=2 schedule=1f1b",
    "pp=4 micro_batch=2 schedule=zb-h1",
    "pp=4 chunks=2 micro_batch=2 schedule=interleaved",
    "pp=4 chunks=2 micro_batch=2 schedule=zbv",
    "pp=2 chunks=2 dp=2 zero=1 micro_batch=2 schedule=dualpipev",
    "pp=2 dp=2 zero=0 micro_batch=2 schedule=1f1b",
    "pp=2 dp=2 zero=2 micro_batch=2 schedule=gpipe recompute=selective",
    "tp=2 pp=2 chunks=2 schedule=interleaved micro_batch=4",
    "cp=4 micro_batch=4",
    "cp=2 dp=2 zero=3 micro_batch=4",
    "cp=2 tp=2 micro_batch=4 sequence_parallel=true",
)
"""Pins of plans of the demo model on four ranks: every axis, every schedule."""

H100: tuple[tuple[str, str, int, int, str], ...] = (
    ("llama-3.2-1b", "1x8:h100-sxm-80gb", 4096, 16, "dp=8 zero=0 micro_batch=2"),
    ("llama-3.2-1b", "1x8:h100-sxm-80gb", 8192, 8, "dp=8 zero=1 micro_batch=1"),
    ("llama-3-8b", "1x8:h100-sxm-80gb", 4096, 8, "dp=8 zero=3 micro_batch=1 recompute=selective"),
    ("llama-3-8b", "1x8:h100-sxm-80gb", 8192, 16, "dp=8 zero=3 micro_batch=1 recompute=full"),
    ("llama-3-8b", "8x8:h100-sxm-80gb", 8192, 64, "dp=64 zero=3 micro_batch=1"),
    ("llama-3-8b", "1x8:h100-sxm-80gb", 8192, 16, "tp=8 sequence_parallel=true micro_batch=1"),
    ("llama-3-8b", "2x8:h100-sxm-80gb", 8192, 32, "tp=2 pp=2 dp=4 zero=1 micro_batch=1 schedule=1f1b"),
    ("llama-3-8b", "2x8:h100-sxm-80gb", 8192, 32, "pp=4 dp=4 zero=1 micro_batch=1 schedule=zb-h1"),
    ("llama-3-8b", "4x8:h100-sxm-80gb", 32768, 8, "tp=2 cp=4 dp=4 zero=3 micro_batch=1 recompute=full"),
    ("qwen3-8b", "2x8:h100-sxm-80gb", 4096, 64, "dp=16 zero=3 micro_batch=2 recompute=selective"),
    ("llama-13b", "1x8:h100-sxm-80gb", 4096, 16, "tp=4 dp=2 zero=1 sequence_parallel=true micro_batch=1"),
    ("gpt-3-xl-1.3b", "1x8:h100-sxm-80gb", 2048, 64, "dp=8 zero=2 micro_batch=4"),
    ("gpt-neox-20b", "2x8:h100-sxm-80gb", 2048, 64, "tp=4 pp=2 dp=2 zero=1 micro_batch=2 recompute=full"),
    ("qwen3-32b", "8x8:h100-sxm-80gb", 4096, 64, "dp=64 zero=3 micro_batch=1 recompute=full"),
    ("llama-3.1-70b", "64x8:h100-sxm-80gb", 8192, 512, "tp=8 pp=4 dp=16 zero=1 sequence_parallel=true"),
    ("llama-3.1-70b", "64x8:h100-sxm-80gb", 8192, 512, "dp=512 zero=3 micro_batch=1 recompute=full"),
    ("llama-3.1-70b", "16x8:h100-sxm-80gb", 8192, 128, "tp=8 dp=16 zero=3 recompute=full"),
    (
        "mistral-large-2-123b",
        "32x8:h100-sxm-80gb",
        8192,
        256,
        "tp=8 pp=4 dp=8 zero=1 sequence_parallel=true micro_batch=1 recompute=full",
    ),
    ("mixtral-8x7b-v0.1", "8x8:h100-sxm-80gb", 4096, 64, "dp=64 ep=8 zero=3 micro_batch=1 recompute=full"),
    ("qwen3-30b-a3b", "4x8:h100-sxm-80gb", 4096, 64, "dp=32 ep=8 zero=3 micro_batch=1 recompute=full"),
)
"""Model, cluster, sequence, batch and pins of plans whose ranks fit one H100."""


class Asked(NamedTuple):
    """A plan with the problem that it answers."""

    plan: Plan
    problem: PlanningProblem


def plan_of(model: str, cluster: str, seq: int, batch: int, pins: str) -> Asked:
    """The plan of fixed pins for the own runtime, by what is shipped of its device."""
    parsed = parse_cluster(cluster)
    device = parsed.groups[0].device
    own = shipped_profile(device.name)
    problem = PlanningProblem(
        model=load_model(model),
        workload=Workload(seq=seq, batch=batch, precision=Precision.FP32 if parsed.local else Precision.BF16),
        cluster=parsed,
        profile=own,
        memory_limit_bytes=device.usable_memory_bytes,
        limits=Limits(engine=Engine.NATIVE),
    )
    problem = dataclasses.replace(problem, engine_settings=settings_for_engine(Engine.NATIVE, own, parsed))
    strategy = strategy_of(problem, parse_fixed_choices(tuple(pins.split())))
    broken = broken_rules(problem, strategy)
    assert not broken, (model, pins, broken)
    plan = make_plan(problem, CostModel(problem).evaluate(strategy), None, {}, ())
    return Asked(dataclasses.replace(plan, engine=Engine.NATIVE), problem)


def rehearsed(plan: Plan, mode: RehearsalMode, **options: Any) -> list[RankRehearsal]:
    """One rank of each kind, alone."""
    from runtime.rehearse.rehearse import RehearsalOptions, rehearse_ranks

    degrees = plan.strategy.degrees
    ranks = [(degrees.ranks_of_pp_rank(kind[0])[0], kind) for kind in alike_ranks(plan)]
    chosen = RehearsalOptions(mode=mode, **options)
    return list(rehearse_ranks(shortened(plan), ranks, chosen, lambda _: None))


def predicted_bytes(plan: Plan, rank: RankRehearsal) -> int:
    """Predicted bytes of tensors of the rank that was rehearsed."""
    return sum(plan.stage_estimates[stage].memory.allocated_bytes for stage in rank.stages)


# On this CPU, against a real group


def gloo() -> Iterator[dict[str, Any]]:
    """Peaks of all kinds of ranks of each plan, real, alone and on shapes alone, and as predicted."""
    from tests.runtime.ranks import real_peaks

    for pins in GLOO:
        asked = plan_of("shardwise-demo", "local:4", 256, 16, pins)
        peaks = real_peaks(asked.plan)
        alone = {mode: rehearsed(asked.plan, mode, steps=1) for mode in _CPU_MODES}
        errors = {
            str(mode): [(rank.allocated_bytes or 0) / peaks[rank.rank] - 1 for rank in ranks]
            for mode, ranks in alone.items()
        }
        predicted = [predicted_bytes(asked.plan, r) / peaks[r.rank] - 1 for r in next(iter(alone.values()))]
        yield {"plan": pins, "peaks_mib": [p / 2**20 for p in peaks], **errors, "predicted": predicted}


_CPU_MODES = (RehearsalMode.PROCESSOR, RehearsalMode.FAKE_TENSORS)


# Predictions for accelerators against shapes alone


def traces() -> Iterator[dict[str, Any]]:
    """Predicted bytes of tensors of every kind of rank of the 20 plans, against what shapes alone show."""
    for model, cluster, seq, batch, pins in H100:
        asked = plan_of(model, cluster, seq, batch, pins)
        began = time.monotonic()
        ranks = rehearsed(asked.plan, RehearsalMode.FAKE_TENSORS)
        errors = [predicted_bytes(asked.plan, r) / r.allocated_bytes - 1 for r in ranks if r.allocated_bytes]
        yield {
            "plan": f"{model} {cluster.partition(':')[0]} {pins}",
            "gib": [(r.allocated_bytes or 0) / GIB for r in ranks],
            "predicted": errors,
            "wall_s": time.monotonic() - began,
        }


# Shapes alone against an H100


def reference() -> Iterator[dict[str, Any]]:
    """Middle stages of the own runtime traced on shapes alone, against plain PyTorch's on one H100.

    Both hold blocks alone under tensor, sequence and ZeRO-3 data parallelism (bench/data/h100_reference.csv).
    """
    from planner.calibration.runs import read_runs

    measured = {run.id: run for run in read_runs([Path(__file__).parent / "data/h100_reference.csv"]).runs}
    for name, plan in _middle_stages():
        degrees = plan.strategy.degrees
        (rank,) = degrees.ranks_of_pp_rank(1)[:1]
        peak = measured[name].peak_memory_gib
        alone = _traced(plan, rank)
        assert peak is not None and alone.allocated_bytes is not None
        traced = alone.allocated_bytes / GIB
        yield {"run": name, "h100_gib": peak, "traced_gib": traced, "error": traced / peak - 1}


def _traced(plan: Plan, rank: int) -> RankRehearsal:
    from runtime.rehearse.rehearse import RehearsalOptions, rehearse_rank

    return rehearse_rank(plan, rank, (1,), RehearsalOptions(mode=RehearsalMode.FAKE_TENSORS))


def _middle_stages() -> Iterator[tuple[str, Plan]]:
    """The runs without embedding and head: each as the second of three stages, for the same device."""
    from bench.step import llama
    from runtime.profiler.timed_plans import bench_plan

    cases = (
        ("h100-l70-20L-tp8-fsdp4-s8k-b1-full", llama(60, 8192, 28672, 64, 8, 128256), 4, 1, 8192, True),
        ("h100-g175-4L-tp8-s2k-b2", _gpt(12, 12288, 49152, 96), 2, 2, 2048, False),
    )
    device = parse_cluster("1x8:h100-sxm-80gb").groups[0].device
    for name, model, shards, micro_batch, seq, full in cases:
        degrees = Degrees(pp=3, tp=8, sequence_parallel=True, dp_shard=shards, zero=Zero.PARAMETERS,
                          micro_batch=micro_batch)  # fmt: skip
        plan = bench_plan(model, degrees, seq, Precision.BF16)
        option = Recompute.FULL if full else Recompute.NONE
        stages = even_stages(model.layers, degrees.stages, option)
        group = dataclasses.replace(plan.cluster.groups[0], device=device)
        yield (
            name,
            dataclasses.replace(
                plan,
                strategy=Strategy(degrees=degrees, stages=stages),
                cluster=dataclasses.replace(plan.cluster, groups=(group,)),
            ),
        )


def _gpt(layers: int, hidden: int, ffn: int, heads: int) -> ModelSpec:
    """A GPT of these sizes: LayerNorm, biases, GELU."""
    from bench.step import llama

    block = Block(
        hidden=hidden,
        norm=Norm.LAYERNORM,
        mixer=Attention(heads=heads, kv_heads=heads, head_dim=hidden // heads, qkv_bias=True, out_bias=True),
        mlp=Mlp(width=ffn, gated=False, activation=Activation.GELU_TANH, bias=True),
    )
    like = llama(layers, hidden, ffn, heads, heads, 50304)
    return dataclasses.replace(
        like,
        name="gpt",
        model_type="gpt2",
        norm=Norm.LAYERNORM,
        segments=(Segment(block=block, count=layers),),
    )


# On an accelerator


NEAR_LIMIT = (0.55, 0.7, 0.85)
"""Memory limits, as shares of the device's, that plans are solved to the edge of."""
LIMIT_CASES = tuple((model, seq) for model in ("llama-3.2-1b", "llama-3-8b", "gpt-3-xl-1.3b", "qwen3-8b",
                                               "llama-2-7b") for seq in (2048, 8192))  # fmt: skip


def device() -> Iterator[dict[str, Any]]:
    """Memory and compute of the 20 plans on this accelerator, predicted and rehearsed; then limits."""
    for model, cluster, seq, batch, pins in H100:
        asked = plan_of(model, cluster, seq, batch, pins)
        began = time.monotonic()
        ranks = rehearsed(asked.plan, RehearsalMode.DEVICE, compiled=False)
        yield {
            "plan": f"{model} {cluster.partition(':')[0]} {pins}",
            "verdict": str(asked.plan.estimate.verdict),
            "ran_out": [r.ran_out for r in ranks if r.ran_out],
            "allocated": [predicted_bytes(asked.plan, r) / r.allocated_bytes - 1
                          for r in ranks if r.allocated_bytes],
            "reserved": [_predicted_reserved(asked.plan, r) / r.reserved_bytes - 1
                         for r in ranks if r.reserved_bytes],
            "compute": _compute_errors(asked, ranks),
            "idle_share": [r.idle_share for r in ranks],
            "wall_s": time.monotonic() - began,
        }  # fmt: skip
    yield from _at_limits()


def _predicted_reserved(plan: Plan, rank: RankRehearsal) -> int:
    own = [plan.stage_estimates[stage].memory for stage in rank.stages]
    return sum(m.allocated_bytes + m.allocator_bytes for m in own)


def _compute_errors(asked: Asked, ranks: Sequence[RankRehearsal]) -> list[float]:
    """Predicted over rehearsed seconds of a rank's own work in a step, less 1."""
    found = []
    for rank in ranks:
        alone = refine(asked.problem, asked.plan, [rank], RehearsalMode.DEVICE)
        own, modelled = alone.breakdown, asked.plan.estimate.breakdown
        if rank.passes:
            measured_s = own.compute_s + own.recompute_s + own.host_s
            found.append((modelled.compute_s + modelled.recompute_s + modelled.host_s) / measured_s - 1)
    return found


def _at_limits() -> Iterator[dict[str, Any]]:
    """Plans solved at a memory limit that leaves little, rehearsed with the allocator held to it."""
    from planner.foundation.errors import InfeasibleError
    from planner.search.solve import SolveOptions, solve

    for model, seq in LIMIT_CASES:
        for share in NEAR_LIMIT:
            asked = plan_of(model, "1x8:h100-sxm-80gb", seq, 64, "dp=8 zero=3 micro_batch=1 recompute=full")
            limit = round(share * asked.problem.memory_limit_bytes)
            problem = dataclasses.replace(asked.problem, memory_limit_bytes=limit)
            try:
                plan = solve(problem, SolveOptions(pins=parse_fixed_choices(()), time_limit_s=5.0, top=0))
            except InfeasibleError:
                continue
            room = limit - max(s.memory.runtime_bytes for s in plan.stage_estimates)
            ranks = rehearsed(plan, RehearsalMode.DEVICE, steps=1, room_bytes=room)
            yield {
                "plan": f"{model} {seq} at {limit / GIB:.1f} GiB: {plan.strategy.degrees.label()}",
                "verdict": str(plan.estimate.verdict),
                "ran_out": [r.ran_out for r in ranks if r.ran_out],
                "safe_but_ran_out": plan.estimate.verdict is Verdict.SAFE and any(r.ran_out for r in ranks),
            }


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "gloo": gloo,
    "traces": traces,
    "reference": reference,
    "device": device,
}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every column of errors the mean and the largest, without their signs."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("processor", "fake tensors", "predicted", "allocated", "reserved", "compute"):
                columns.setdefault(name, []).extend(map(abs, value))
            elif name == "error":
                columns.setdefault(name, []).append(abs(value))
    return {
        name: {"n": len(each), "mean": statistics.fmean(each), "worst": max(each)}
        for name, each in columns.items()
    }


@click.command()
@click.argument("part", type=click.Choice(list(PARTS)))
@click.option("--out", type=click.Path(path_type=Path), help="Where to write JSON.")
def main(part: str, out: Path | None) -> None:
    """Runs one part and prints a line for each case."""
    require_torch("rehearse")
    rows = []
    for row in PARTS[part]():
        rows.append(row)
        click.echo(json.dumps(row, default=str), err=True)
    summary = _summary(rows)
    shown = [(k, v["n"], f"{v['mean']:.2%}", f"{v['worst']:.2%}") for k, v in summary.items()]
    click.echo(table(("error of", "ranks", "mean", "worst"), shown))
    today = datetime.now(UTC).date().isoformat()
    document = {
        "date": today,
        "python": platform.python_version(),
        "command": f"python -m bench.rehearsal {part}",
        "summary": summary,
        "rows": rows,
    }
    path = out or RESULTS / f"{today}-rehearsal-{part}.json"
    write_atomic(path, json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Layers that nobody measured, predicted from sweeps of operators on this machine.

Operators alone are timed (`runtime.profiler.operators`) and constants of the host. From these the
forward and
backward of layers are predicted whose shapes no sample touched: blocks, heads and embeddings of five models,
at two micro-batches, whole and in two shards. Then the layers themselves are timed as `plan profile` does.
Beside it stands the prediction of a profile without sweeps: one rate of products, one of memory. Nothing is
fitted to layers; `llama-small` and `gpt2` were looked at while the model of parts was written, the others
not.

    python -m bench.sweeps [--out bench/results/DATE-sweeps.json] [--profile FILE]

With --profile, sweeps and constants are read from an earlier run's file instead, or written there.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from planner.cost.compute.analytic import analytic_cost, device_rates
from planner.cost.constants import problem_time_constants
from planner.cost.layer import LayerShape
from planner.foundation.decode import decode, to_json, write_atomic
from planner.foundation.frozen import frozen
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention, QkNorm
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import (
    PROFILE_SCHEMA,
    Constant,
    LayerSample,
    OperatorSample,
    Profile,
    load_profile,
)

EFFORT_S = 0.25


@frozen
class Case:
    """A model of which layers are measured, at a length of sequences; `seen` while the code was written.

    `widths` are ranks of tensor parallelism.
    """

    model: ModelSpec
    seq: int
    seen: bool
    widths: tuple[int, ...] = (1, 2)


def _model(name: str, block: Block, vocab: int, *, learned: int = 0) -> ModelSpec:
    return ModelSpec(
        name=name,
        model_type="gpt2" if learned else "llama",
        hidden=block.hidden,
        vocab=vocab,
        max_positions=4096,
        learned_positions=learned,
        rope_theta=10_000.0,
        norm=block.norm,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=False,
        segments=(Segment(block=block, count=2),),
    )


def _llama(hidden: int, heads: int, kv_heads: int, width: int, qk_norm: QkNorm = QkNorm.NONE) -> Block:
    return Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, qk_norm=qk_norm),
        mlp=Mlp(width=width, gated=True, activation=Activation.SILU),
    )


def cases() -> list[Case]:
    """Dense models of three families, and a mixture of experts."""
    gpt2 = Block(
        hidden=768,
        norm=Norm.LAYERNORM,
        mixer=Attention(heads=12, kv_heads=12, head_dim=64, qkv_bias=True, out_bias=True),
        mlp=Mlp(width=3072, gated=False, activation=Activation.GELU_TANH, bias=True),
    )
    expert = Mlp(width=448, gated=True, activation=Activation.SILU)
    mixture = dataclasses.replace(_llama(256, 4, 4, 448), mlp=Experts(count=8, topk=2, expert=expert))
    return [
        Case(model=_model("llama-small", _llama(512, 8, 4, 1408), 8192), seq=256, seen=True),
        Case(model=_model("gpt2", gpt2, 50304, learned=1024), seq=256, seen=True),
        Case(model=_model("llama-wide", _llama(1024, 16, 4, 2816), 16384), seq=384, seen=False),
        Case(model=_model("qwen-narrow", _llama(384, 6, 2, 1216, QkNorm.HEAD), 12000), seq=640, seen=False),
        Case(model=_model("mixture", mixture, 4096), seq=512, seen=False, widths=(1,)),
    ]


def take(device_type: str, precision: Precision) -> tuple[list[OperatorSample], list[Constant], float]:
    """Sweeps and constants of the host, and how long the sweeps took."""
    from runtime.profiler.host import measure_host
    from runtime.profiler.operators import rate_families
    from runtime.profiler.scope import SWEEP_EFFORT, Sweeps
    from runtime.profiler.timing import Effort

    began = time.monotonic()
    rates: list[OperatorSample] = []
    for family in rate_families(device_type, precision, SWEEP_EFFORT, Sweeps.ALL):
        for reading in family.measure(family.cases()):
            rates += [sample for sample in reading.samples if isinstance(sample, OperatorSample)]
        click.echo(f"{family.name}: {len(rates)} samples, {time.monotonic() - began:.0f} s", err=True)
    taken_s = time.monotonic() - began
    host = Effort(warmup=2, least=7, most=40, budget_s=0.15)
    groups = ("rates", "launches")
    constants = [
        decode(Constant, each, source="host")
        for message in measure_host(groups, device_type, precision, host)
        for each in message["constants"]
    ]
    return rates, constants, taken_s


def as_profile(rates: Sequence[OperatorSample], constants: Sequence[Constant], device_type: str) -> Profile:
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name="sweeps",
        device=device_type,
        device_title=device_type,
        backend="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={},
        devices_per_node=1,
        slots_per_node=None,
        layers=(),
        comms=(),
        contention=(),
        constants=tuple(constants),
        rates=tuple(rates),
    )


def measured(case: Case, device_type: str, precision: Precision) -> Iterator[LayerSample]:
    """The layers themselves, nothing recomputed."""
    from runtime.profiler.layers import layer_cases, measure_layers
    from runtime.profiler.timing import Effort

    effort = Effort(warmup=1, least=5, most=40, budget_s=EFFORT_S)
    every = layer_cases(case.model, [case.seq], case.widths, (1, 2))
    wanted = [each for each in every if each.recompute is Recompute.NONE]
    for message in measure_layers(wanted, case.model, precision, device_type, effort):
        yield decode(LayerSample, message, source="layers")


def predicted(case: Case, sample: LayerSample, profile: Profile) -> tuple[float, float]:
    """Seconds forward and backward."""
    problem = PlanningProblem(
        model=case.model,
        workload=Workload(seq=case.seq, batch=8, precision=sample.precision),
        cluster=parse_cluster("local:2"),
        profile=profile,
        memory_limit_bytes=1 << 34,
    )
    shape = LayerShape(
        kind=sample.kind,
        tp=sample.tp,
        sequence_parallel=sample.sequence_parallel,
        micro_batch=sample.micro_batch,
        seq=sample.seq,
        precision=sample.precision,
        rotary=case.model.rotary,
    )
    cost = analytic_cost(case.model, shape, device_rates(problem, problem_time_constants(problem)))
    return cost.forward_s, cost.backward_s


def rows_of(case: Case, samples: Sequence[LayerSample], profile: Profile) -> Iterator[dict[str, Any]]:
    """A row for each pass of each layer, at the speed that the machine had in the sweeps."""
    usual_s = (
        statistics.median(s.reference_s for s in profile.rates if s.reference_s) if profile.rates else 0.0
    )
    without = dataclasses.replace(profile, rates=())
    for sample in samples:
        factor = usual_s / sample.reference_s if sample.reference_s and usual_s else 1.0
        after, before = predicted(case, sample, profile), predicted(case, sample, without)
        for index, way in enumerate(("forward", "backward")):
            seconds = (sample.forward_s, sample.backward_s)[index] * factor
            yield {
                "model": case.model.name,
                "seen": case.seen,
                "layer": str(sample.kind),
                "tp": sample.tp,
                "sequence_parallel": sample.sequence_parallel,
                "micro_batch": sample.micro_batch,
                "pass": way,
                "measured_s": seconds,
                "sweeps_s": after[index],
                "one_rate_s": before[index],
                "sweeps_error": after[index] / seconds - 1,
                "one_rate_error": before[index] / seconds - 1,
                "spread": sample.spread,
            }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Absolute errors by layer, pass, width and model, of models not seen and of all: mean and median over
    rows, and what was missed of all their time."""
    groups: dict[str, list[dict[str, Any]]] = {
        "all": list(rows),
        "unseen": [r for r in rows if not r["seen"]],
    }
    for key in ("layer", "pass", "tp", "model"):
        for row in rows:
            groups.setdefault(f"{key} {row[key]}", []).append(row)
    return {name: _errors(found) for name, found in groups.items() if found}


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {"n": len(rows)}
    for name in ("sweeps", "one_rate"):
        errors = [abs(row[f"{name}_error"]) for row in rows]
        found[f"{name}_mape"], found[f"{name}_median"] = statistics.fmean(errors), statistics.median(errors)
        missed_s = sum(abs(row[f"{name}_s"] - row["measured_s"]) for row in rows)
        found[f"{name}_of_time"] = missed_s / sum(row["measured_s"] for row in rows)
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where the results go, as JSON.")
@click.option("--profile", "kept", type=click.Path(path_type=Path), help="Sweeps to read, or to write.")
@click.option("--layers", "layers", type=click.Path(path_type=Path), help="Layers to read, or to write.")
def main(out: Path | None, kept: Path | None, layers: Path | None) -> None:
    """Predicts layers from sweeps and compares."""
    import torch

    on_cuda = torch.cuda.is_available()
    device_type, precision = ("cuda", Precision.BF16) if on_cuda else ("cpu", Precision.FP32)
    taken_s: float | None = None
    if kept is not None and kept.exists():
        profile = load_profile(kept)
    else:
        rates, constants, taken_s = take(device_type, precision)
        profile = as_profile(rates, constants, device_type)
        if kept is not None:
            write_atomic(kept, to_json(profile))
    rows = []
    held: dict[str, list[Any]] = json.loads(layers.read_text()) if layers and layers.exists() else {}
    for case in cases():
        if case.model.name not in held:
            samples = list(measured(case, device_type, precision))
            held[case.model.name] = [json.loads(to_json(sample)) for sample in samples]
            if layers is not None:
                write_atomic(layers, json.dumps(held))
        samples = [decode(LayerSample, each, source="layers") for each in held[case.model.name]]
        rows += list(rows_of(case, samples, profile))
        click.echo(f"{case.model.name}: {len(rows)} rows", err=True)
    errors_of = summary(rows)
    result = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "sweep_s": taken_s,  # None: read from a file
        "samples": len(profile.rates),
        "summary": errors_of,
        "rows": rows,
    }
    for name, errors in errors_of.items():
        each = " | ".join(
            f"{way}: mean {errors[f'{way}_mape']:6.1%} median {errors[f'{way}_median']:6.1%} "
            f"of time {errors[f'{way}_of_time']:6.1%}"
            for way in ("sweeps", "one_rate")
        )
        click.echo(f"{name:20s} n {errors['n']:3.0f} {each}")
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Prices of layers and plans by a profile that has tensor parallelism alone: they stay."""

from __future__ import annotations

import itertools
import json
import operator
import random
from pathlib import Path

import pytest

from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.layer import LayerShape
from planner.cost.stage.layer_cost import LayerModel
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import LayerKind, load_profile
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

PROFILE = Path(__file__).parents[1] / "golden" / "profile.json"
"""The first shipped profile of a CPU, as it was: nothing but tensor parallelism, at one length."""
FIGURES = (
    "forward_s",
    "backward_s",
    "saved_bytes",
    "forward_transient_bytes",
    "backward_transient_bytes",
    "origin",
)
GOLDEN = Path(__file__).parents[1] / "golden" / "layer-prices.json"
"""Written before samples had lengths, context and expert parallelism: what each is priced at. Peaks of plans
are those of the own runtime's moments (planner.cost.stage.memory_timeline); each of 8 ranks has a whole one
of the
model's 4 key-value heads. Full recomputation at other lengths is without an MLP's last product."""


PLANS = (
    Degrees(dp_shard=4, zero=Zero.PARAMETERS, micro_batch=2, num_micro_batches=4),
    Degrees(tp=2, dp_replicate=2, micro_batch=4, num_micro_batches=2),
    Degrees(tp=4, micro_batch=8, sequence_parallel=True, num_micro_batches=2),
    Degrees(pp=4, micro_batch=2, num_micro_batches=8),
    Degrees(cp=2, dp_shard=2, zero=Zero.GRADIENTS, micro_batch=2, num_micro_batches=4),
    Degrees(tp=2, pp=2, micro_batch=3, num_micro_batches=5),
)


def problem(seq: int = 256, batch: int = 32) -> PlanningProblem:
    cluster = parse_cluster("local:4")
    return PlanningProblem(
        model=load_model("shardwise-demo"),
        workload=Workload(seq=seq, batch=batch, precision=Precision.FP32),
        cluster=cluster,
        profile=load_profile(PROFILE),
        memory_limit_bytes=2**33,
    )


def shapes() -> list[LayerShape]:
    """A hundred and twenty shapes at, between and beyond what was measured."""
    everything = itertools.product(
        [(LayerKind.EMBEDDING, Recompute.NONE), (LayerKind.HEAD, Recompute.NONE)]
        + [(LayerKind.BLOCK, recompute) for recompute in Recompute],
        [(1, False), *itertools.product((2, 4, 8), (False, True))],
        (1, 3, 8, 16),
        (64, 256, 1000),
        [(1, CpExchange.RING), *((2, exchange) for exchange in CpExchange)],
    )
    return [
        LayerShape(
            kind=kind,
            tp=tp,
            sequence_parallel=parallel,
            micro_batch=micro_batch,
            seq=seq,
            precision=Precision.FP32,
            recompute=recompute,
            cp=cp,
            cp_exchange=exchange,
        )
        for (kind, recompute), (tp, parallel), micro_batch, seq, (cp, exchange) in random.Random(5).sample(
            list(everything), 120
        )
    ]


def label(shape: LayerShape) -> str:
    width = f"tp{shape.tp}" + "+sp" * shape.sequence_parallel + f" cp{shape.cp}-{shape.cp_exchange}"
    return f"{shape.kind} {shape.recompute} {width} {shape.micro_batch} of {shape.seq}"


def prices() -> dict[str, list[float | str]]:
    """Each layer's figures and origin, and each plan's step time and peak memory."""
    asked = problem()
    layers = LayerModel(asked, time_constants_of(asked.profile, asked.engine_settings))
    figures = operator.attrgetter(*FIGURES)
    found = {label(shape): list(figures(layers.cost(shape))) for shape in shapes()}
    for degrees in PLANS:
        whole = problem(batch=degrees.batch)
        stages = even_stages(whole.model.layers, degrees.stages)
        estimate = CostModel(whole).evaluate(Strategy(degrees=degrees, stages=stages)).estimate
        found[degrees.label()] = [estimate.step_time_s, estimate.peak_memory_bytes]
    return found


def test_prices_are_what_they_were() -> None:
    known, found = json.loads(GOLDEN.read_text()), prices()
    assert found.keys() == known.keys()
    for name, figures in known.items():
        numbers = [f for f in figures if not isinstance(f, str)]
        assert [f for f in found[name] if not isinstance(f, str)] == pytest.approx(numbers, rel=1e-9), name
        assert found[name][len(numbers) :] == figures[len(numbers) :], name

"""What waits between input and weight gradients is what the cost model counts
(planner.cost.memory.activations)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.distributed.tensor import DTensor

from bench.rehearsal import plan_of, predicted_bytes
from planner.cost.layer import LayerShape
from planner.cost.memory.activations import waiting_bytes
from planner.model.spec import Block
from planner.model.workload import Precision
from planner.profile.profile import LayerKind
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RehearsalMode
from planner.strategy.strategy import Degrees, Schedule
from runtime.parallel.deferred_gradients import Deferred
from runtime.parallel.pipeline.stage import GradientUnits
from runtime.rehearse.rehearse import RehearsalOptions, rehearse_rank
from tests.plans import make_plan, parallel, tiny_deepseek_experts, tiny_gpt2, tiny_llama, tiny_mla
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

MODELS = {
    "llama": tiny_llama(),
    "gpt2": tiny_gpt2(),
    "latent": tiny_mla(),
    "experts": tiny_deepseek_experts(),
    "parallel": parallel(tiny_gpt2(), 1),
    "parallel with two norms": parallel(tiny_gpt2(), 2),
}
DEGREES = [Degrees(), Degrees(tp=2), Degrees(tp=2, sequence_parallel=True)]


@pytest.mark.parametrize("degrees", DEGREES, ids=["whole", "tp", "sp"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_of_weight_gradients_are_what_is_counted(name: str, degrees: Degrees) -> None:
    degrees = dataclasses.replace(degrees, pp=2, schedule=Schedule.ZB_H1, micro_batch=2, num_micro_batches=3)
    plan = make_plan(MODELS[name], degrees)
    held = on_ranks(lambda _rank: _waiting(plan), degrees.world)
    for each in held:
        for layer, found in each.items():
            block = plan.model.block(int(layer))
            assert isinstance(block, Block)
            assert found == waiting_bytes(block, _shape(plan)), layer


def _shape(plan: Plan) -> LayerShape:
    degrees = plan.strategy.degrees
    return LayerShape(
        kind=LayerKind.BLOCK,
        tp=degrees.tp,
        sequence_parallel=degrees.sequence_parallel,
        micro_batch=degrees.micro_batch,
        seq=plan.workload.seq,
        precision=Precision.FP32,
    )


def _waiting(plan: Plan) -> dict[str, int]:
    """Of each layer of this rank, the bytes that wait as a W begins."""
    executor, held = make_executor(plan), {}
    inner = GradientUnits.add_deferred

    def add_deferred(units: GradientUnits, micro_batch: int) -> None:
        for name, block in units.model.layers.items():
            deferred = next(d for each, d in units._deferred if each is block)
            held[name] = _bytes(deferred, micro_batch)
        inner(units, micro_batch)

    GradientUnits.add_deferred = add_deferred  # type: ignore[method-assign]
    executor.step(slice_of(executor, batch_of(plan, 0)))
    return held


def _bytes(deferred: Deferred, micro_batch: int) -> int:
    factors: list[Any] = [f for p in deferred._waiting[micro_batch] for f in (p.x, p.dy)]
    own = [f.to_local() if isinstance(f, DTensor) else f for f in factors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values())


PINS = {
    "schedule=zb-h1": (1, 3),
    "chunks=2 schedule=zbv": (0, 3),
    "schedule=gpipe": (0, 2),
}
"""Schedules of the demo model on four ranks, and ranks that are looked at."""


@pytest.mark.parametrize("pins", PINS)
def test_peaks_of_pipelines_are_as_predicted(pins: str) -> None:
    asked = plan_of("shardwise-demo", "local:4", 256, 16, f"pp=4 micro_batch=2 {pins}")
    for rank in PINS[pins]:
        alone = rehearse_rank(asked.plan, rank, (rank,), RehearsalOptions(mode=RehearsalMode.FAKE_TENSORS))
        assert predicted_bytes(asked.plan, alone) == pytest.approx(alone.allocated_bytes, rel=0.03), rank

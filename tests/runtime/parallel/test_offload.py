"""Masters, optimizer state and activations in host memory: the same training, read back, and really away."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.foundation.decode import decode, encode
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer, Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, OffloadCounts, RecomputeCounts, Stage, Zero, even_stages
from runtime.check.executed_settings import Executed
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import committed_folders, load_index
from runtime.parallel.offload import Saved
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
FULL = RecomputeCounts(none=2, full=2)


def offloading(plan: Plan, *counts: OffloadCounts) -> Plan:
    stages = tuple(replace(s, offload=c) for s, c in zip(plan.strategy.stages, counts, strict=True))
    return replace(plan, strategy=replace(plan.strategy, stages=stages))


def both(optimizer: int, activations: int) -> OffloadCounts:
    return OffloadCounts(optimizer=optimizer, activations=activations)


PLANS: dict[str, Plan] = {
    "one": offloading(make_plan(LLAMA, Degrees(micro_batch=2, num_micro_batches=2)), both(4, 3)),
    "tp2-sp-full": offloading(
        make_plan(
            LLAMA,
            Degrees(tp=2, micro_batch=4, sequence_parallel=True),
            (Stage(first=0, end=4, recompute=FULL),),
        ),
        both(2, 4),
    ),
    "zero1": offloading(make_plan(GPT2, Degrees(dp_shard=2, num_micro_batches=2, zero=Zero(1))), both(4, 2)),
    "tp2-zero3": offloading(
        make_plan(LLAMA, Degrees(tp=2, dp_shard=2, num_micro_batches=2, zero=Zero(3))), both(4, 1)
    ),
    "pp2-zero2": offloading(
        make_plan(LLAMA, Degrees(pp=2, dp_shard=2, num_micro_batches=2, zero=Zero(2))), both(1, 2), both(2, 0)
    ),
    "dp2-adafactor": offloading(
        make_plan(LLAMA, Degrees(dp_replicate=2, micro_batch=2), optimizer=Optimizer.ADAFACTOR), both(3, 0)
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_offloaded_trains_as_resident_and_is_read_back(name: str) -> None:
    plan = PLANS[name]
    resident = offloading(plan, *(OffloadCounts() for _ in plan.strategy.stages))

    def body(rank: int) -> Any:
        expected = train(make_executor(resident), 0, 3)
        executor = make_executor(plan)
        return expected, train(executor, 0, 3), encode(executor.executed())

    for expected, found, executed in on_ranks(body, plan.strategy.degrees.world):
        assert [v for pair in found for v in pair] == pytest.approx(
            [v for pair in expected for v in pair], rel=1e-6
        )
        assert decode(Executed, executed, source="rank").differences(plan) == ()
    if plan.workload.optimizer is Optimizer.ADAMW:
        alone = single_process(plan, 3)
        assert [v for p in found for v in p] == pytest.approx([v for p in alone for v in p], rel=1e-5)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("zero", [Zero(0), Zero(2)])
def test_the_device_keeps_the_compute_precision_alone(precision: Precision, zero: Zero) -> None:
    degrees = Degrees(dp_shard=2 if zero else 1, num_micro_batches=2, zero=zero)
    plan = offloading(make_plan(LLAMA, degrees, precision=precision), both(2, 0))

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        losses = train(executor, 0, 4)
        places = {}
        for weight in executor.weights:
            away = weight.host is not None
            assert away == weight.name.startswith(("layers.0.", "layers.1."))
            assert weight.shard.dtype == torch.float32
            assert all(
                value.device.type == "cpu" for value in executor.optimizer.state_of(weight.shard).values()
            )
            places[weight.name] = str(weight.parameter.dtype)
            assert weight.parameter.grad is None
        return losses, places

    expected = single_process(plan, 4)
    for losses, places in on_ranks(body, degrees.world):
        low = "torch.bfloat16" if precision is Precision.BF16 else "torch.float16"
        assert places["layers.1.mlp.up.weight"] == low
        assert places["layers.2.mlp.up.weight"] == "torch.float32"
        for (loss, norm), (exact_loss, exact_norm) in zip(losses, expected, strict=True):
            assert loss == pytest.approx(exact_loss, rel=1e-2)
            assert norm == pytest.approx(exact_norm, rel=5e-2)


def test_two_blocks_at_a_time_are_on_the_device() -> None:
    """Tensors that a block saved, alive on the device at the start of each block's passes."""
    plan = offloading(make_plan(LLAMA, Degrees(micro_batch=4)), both(0, 4))

    def body(rank: int) -> tuple[list[int], int]:
        executor = make_executor(plan)
        saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        counts: list[int] = []
        before = Saved.send_down

        def note(self: Saved) -> int:
            saved.add(self)
            sent = before(self)
            counts.append(sum(bool(each._on_device) for each in saved))
            return sent

        Saved.send_down = note  # type: ignore[method-assign]
        for layer in executor.modules[0].model.layers.values():
            layer.register_full_backward_hook(
                lambda *_: counts.append(sum(bool(each._on_device) for each in saved))
            )
        train(executor, 0, 1)
        model = executor.modules[0].model
        assert model.offload is not None
        return counts, len(set(model.offload.sent_bytes.values()))

    counts, distinct = on_ranks(body, 1)[0]
    assert len(counts) == 8 and max(counts) == 2
    assert distinct == 1, "every block of the same class sends the same bytes"


def test_a_checkpoint_of_masters_goes_on_with_and_without_offload() -> None:
    away = offloading(make_plan(LLAMA, Degrees(dp_shard=2, micro_batch=2, zero=Zero(3))), both(4, 0))
    pipeline = make_plan(LLAMA, Degrees(pp=2, micro_batch=4), even_stages(4, 2, Recompute.NONE))
    half = offloading(pipeline, both(2, 0), both(1, 1))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)

        def run(plan: Plan, first: int) -> Any:
            executor = make_executor(plan)
            for path in committed_folders(folder)[:1]:
                executor.load_state_dict(load_checkpoint(path, load_index(path), executor.state_dict()))
            found = train(executor, first, 2)
            save_checkpoint(folder, executor.state_dict(), step=first + 2, run={})
            return found

        results = [on_ranks(lambda r, p=p, i=i: run(p, 2 * i), 2)[0] for i, p in enumerate((away, half))]
    expected = [v for pair in single_process(away, 4) for v in pair]
    assert [v for result in results for pair in result for v in pair] == pytest.approx(expected, rel=1e-5)

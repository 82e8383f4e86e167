"""fp16 with dynamic loss scaling: trains like fp32, and an overflow anywhere skips the step everywhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.model.workload import Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import committed_folders, load_index
from runtime.model.precision import LossScaler
from runtime.train.executor import Executor
from tests.plans import make_plan, tiny_llama
from tests.runtime.ranks import batch_of, make_executor, on_ranks, single_process, slice_of, train

LLAMA = tiny_llama()


def fp16(degrees: Degrees) -> Plan:
    return make_plan(LLAMA, degrees, precision=Precision.FP16)


LAYOUTS = {
    "tp2-sp-pp2": Degrees(tp=2, pp=2, micro_batch=2, num_micro_batches=2, sequence_parallel=True),
    "zero3": Degrees(dp_shard=2, micro_batch=2, zero=Zero(3)),
    "one": Degrees(micro_batch=4),
    **{
        f"weights-later-zero{int(zero)}-{count}": Degrees(
            pp=2,
            schedule=Schedule.ZB_H1,
            dp_shard=1 if zero is Zero.NONE else 2,
            dp_replicate=2 if zero is Zero.NONE else 1,
            zero=zero,
            micro_batch=2 // count,
            num_micro_batches=count,
        )
        for zero in Zero
        for count in (1, 2)
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_trains_like_fp32(layout: str) -> None:
    plan = fp16(LAYOUTS[layout])

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        assert {weight.shard.dtype for weight in executor.weights} == {torch.float32}
        seen: list[torch.dtype] = []
        for module in executor.modules:
            for layer in module.model.layers.values():
                layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
        found = train(executor, 0, 4)
        assert set(seen) == {torch.float16}
        return found

    expected = single_process(plan, 4)
    for found in on_ranks(body, plan.strategy.degrees.world):
        for (loss, norm), (exact_loss, exact_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(exact_loss, rel=2e-3)
            assert norm == pytest.approx(exact_norm, rel=1e-2)
        losses = [[loss for loss, _ in steps] for steps in (found, expected)]
        assert losses[0] != losses[1]  # those of single steps may be the same by chance


def scaled_steps(executor: Executor, first: int, steps: int) -> list[tuple[float, bool, float | None]]:
    results = [
        executor.step(slice_of(executor, batch_of(executor.plan, step)))
        for step in range(first, first + steps)
    ]
    return [(result.loss, result.skipped, result.loss_scale) for result in results]


def weights_of(executor: Executor) -> torch.Tensor:
    return torch.cat([weight.shard.detach().flatten() for weight in executor.weights])


@pytest.mark.parametrize("layout", ["tp2-sp-pp2", "zero3"])
def test_an_overflow_skips_the_step_on_every_rank(layout: str) -> None:
    """Only ranks with the head see the overflow itself; the norm tells the others."""
    plan = fp16(LAYOUTS[layout])

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        assert executor.scaler is not None
        executor.scaler.scale = 2.0**20
        found, unchanged = [], []
        for step in range(6):
            before = weights_of(executor)
            found += scaled_steps(executor, step, 1)
            unchanged.append(torch.equal(before, weights_of(executor)))
        return found, unchanged, executor.steps_done

    results = on_ranks(body, plan.strategy.degrees.world)
    assert all(result == results[0] for result in results)
    found, unchanged, done = results[0]
    skipped = [each[1] for each in found]
    assert skipped == unchanged and skipped[0] and not skipped[-1] and done == 6
    scales = [each[2] for each in found]
    assert scales[1:] == [s * (0.5 if bad else 1.0) for s, bad in zip(scales, skipped, strict=True)][:-1]


def test_the_scale_goes_on_from_a_checkpoint_in_another_layout() -> None:
    before, after = fp16(LAYOUTS["zero3"]), fp16(Degrees(tp=2, micro_batch=4))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)

        def straight(rank: int) -> Any:
            executor = make_executor(before)
            assert executor.scaler is not None
            executor.scaler.scale, executor.scaler.good_steps = 2.0**12, LossScaler.INTERVAL - 3
            early = scaled_steps(executor, 0, 2)
            save_checkpoint(folder, executor.state_dict(), step=2, run={})
            return early + scaled_steps(executor, 2, 4)

        def resumed(plan: Plan) -> Any:
            executor = make_executor(plan)
            path = committed_folders(folder)[0]
            executor.load_state_dict(load_checkpoint(path, load_index(path), executor.state_dict()))
            return scaled_steps(executor, 2, 4)

        expected = on_ranks(straight, 2)[0][2:]
        assert on_ranks(lambda rank: resumed(before), 2)[0] == expected
        found = on_ranks(lambda rank: resumed(after), 2)[0]
    assert [each[2] for each in expected] == [2.0**12, 2.0**13, 2.0**13, 2.0**13]
    assert [each[1:] for each in found] == [each[1:] for each in expected]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], rel=2e-3)


def test_the_scale_grows_after_good_steps_and_ends_below_one() -> None:
    scaler = LossScaler()
    for _ in range(LossScaler.INTERVAL):
        scaler.update(overflow=False)
    assert (scaler.scale, scaler.good_steps) == (2 * LossScaler.FIRST, 0)
    scaler.update(overflow=False)
    scaler.update(overflow=True)
    assert (scaler.scale, scaler.good_steps) == (LossScaler.FIRST, 0)
    for _ in range(16):
        scaler.update(overflow=True)
    assert scaler.scale == 1.0 and not scaler.exhausted
    scaler.update(overflow=True)
    assert scaler.exhausted

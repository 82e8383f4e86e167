"""The executor around its step: what it refuses, its optimizer, its state in other layouts, bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from planner.foundation.errors import InputError
from planner.model.attention import CpExchange
from planner.model.workload import Optimizer, Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.parallel.parallelize import check_supported
from runtime.train.executor import Executor
from runtime.train.optimizer import OptimizerOptions, learning_rate
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.runtime.ranks import (
    batch_of,
    interrupted,
    make_executor,
    on_ranks,
    single_process,
    slice_of,
    train,
)

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
RESHARDINGS = {
    "tp2-zero3-to-pp2": (
        make_plan(LLAMA, Degrees(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3), sequence_parallel=True)),
        make_plan(LLAMA, Degrees(pp=2, micro_batch=1, num_micro_batches=4)),
    ),
    "interleaved-to-zero1": (
        make_plan(LLAMA, Degrees(pp=2, chunks=2, schedule=Schedule.INTERLEAVED, num_micro_batches=4)),
        make_plan(LLAMA, Degrees(dp_shard=2, micro_batch=2, zero=Zero(1))),
    ),
    "gpt2-pp2-to-tp2": (
        make_plan(GPT2, Degrees(pp=2, micro_batch=1, num_micro_batches=4)),
        make_plan(GPT2, Degrees(tp=2, micro_batch=4, sequence_parallel=True)),
    ),
    "gpt2-one-rank-to-pp2-zero2": (
        make_plan(GPT2, Degrees(micro_batch=4)),
        make_plan(GPT2, Degrees(pp=2, dp_shard=2, num_micro_batches=2, zero=Zero(2))),
    ),
}


@pytest.mark.parametrize("name", RESHARDINGS)
def test_training_goes_on_in_another_layout(name: str) -> None:
    """Three steps, a checkpoint, two steps under another plan: five steps of one process."""
    before, after = RESHARDINGS[name]
    first, second = interrupted(before, after)
    expected = [value for pair in single_process(before, 5) for value in pair]
    for early in first:
        for late in second:
            assert [v for pair in early + late for v in pair] == pytest.approx(expected, rel=1e-4)


def test_bf16_keeps_fp32_masters_and_trains_like_fp32() -> None:
    for degrees in (
        Degrees(micro_batch=4),
        Degrees(dp_shard=2, micro_batch=2, zero=Zero(3)),
        Degrees(dp_replicate=2, micro_batch=2),
        Degrees(pp=2, micro_batch=2, num_micro_batches=2),
        Degrees(tp=2, micro_batch=4, sequence_parallel=True),
    ):
        plan = make_plan(LLAMA, degrees, precision=Precision.BF16)

        def body(rank: int, plan: Plan = plan) -> Any:
            executor = make_executor(plan)
            assert {weight.shard.dtype for weight in executor.weights} == {torch.float32}
            seen: list[torch.dtype] = []
            for module in executor.modules:
                for layer in module.model.layers.values():
                    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
            found = train(executor, 0, 4)
            assert set(seen) == {torch.bfloat16}
            return found

        expected = single_process(plan, 4)
        for found in on_ranks(body, degrees.world):
            for (loss, norm), (exact_loss, exact_norm) in zip(found, expected, strict=True):
                assert loss == pytest.approx(exact_loss, rel=1e-2)
                assert norm == pytest.approx(exact_norm, rel=5e-2)
                assert loss != exact_loss


def test_sgd_with_momentum_equals_torch_by_hand() -> None:
    plan = make_plan(LLAMA, Degrees(dp_shard=2, micro_batch=2, zero=Zero(2)), optimizer=Optimizer.SGD)
    alone = replace(plan, strategy=replace(plan.strategy, degrees=Degrees(micro_batch=4)))
    alone = replace(alone, rank_grid_shape=alone.strategy.degrees.grid_shape())
    options = OptimizerOptions(learning_rate=0.1, momentum=0.9, weight_decay=0.0, clip_norm=None)

    def run(plan: Plan) -> Any:
        executor = Executor(plan, device="cpu", seed=1, optimizer_options=options)
        weight = executor.weights[0].parameter
        start = weight.detach().clone()
        momentum = torch.zeros_like(start)
        losses = []
        for step in range(3):
            grads: list[torch.Tensor] = []
            handle = executor.optimizer.parts[0].register_step_pre_hook(
                lambda *_: grads.append(executor.weights[0].shard.grad.clone())  # type: ignore[union-attr] # noqa: B023
            )
            losses.append(executor.step(slice_of(executor, batch_of(plan, step))).loss)
            handle.remove()
            if executor.data_size == 1:
                momentum = 0.9 * momentum + grads[0]
                start -= 0.1 * momentum
                torch.testing.assert_close(weight.detach(), start)
        return losses

    expected = on_ranks(lambda rank: run(alone), 1)[0]
    assert on_ranks(lambda rank: run(plan), 2)[1] == pytest.approx(expected, rel=1e-4)


def test_learning_rate_warms_up_then_falls_by_a_cosine() -> None:
    options = OptimizerOptions(learning_rate=1.0, min_lr_ratio=0.2, warmup_steps=4, total_steps=14)
    assert [learning_rate(options, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(options, 9) == pytest.approx(0.6)
    assert learning_rate(options, 14) == pytest.approx(0.2)
    assert learning_rate(options, 1000) == pytest.approx(0.2)
    assert learning_rate(OptimizerOptions(learning_rate=0.5), 1000) == 0.5


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        (Degrees(ep=2), ["strategy: ep=2 and etp=1 share out experts", "strategy: ep=2"]),
        (Degrees(cp=3), ["strategy.cp: cp=3 cannot split a sequence of 16"]),
        (
            Degrees(cp=16, cp_exchange=CpExchange.ALL_TO_ALL),
            ["strategy.cp: cp=16 by all_to_all cannot split the 8"],
        ),
        (Degrees(tp=16), ["heads of 8", "tp of 1, 2, 4, 8"]),
        (
            Degrees(tp=3, sequence_parallel=True),
            ["heads of 8", "key-value heads of 4", "width of 64", "sequence of 16"],
        ),
        (Degrees(dp_replicate=2, zero=Zero(3)), ["strategy.zero"]),
        (Degrees(dp_shard=2), ["strategy.zero"]),
    ],
)
def test_what_cannot_be_executed_is_refused_with_all_reasons(degrees: Degrees, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check_supported(make_plan(LLAMA, degrees))
    assert len(caught.value.problems) == sum(
        (" of " in word and "tp" not in word) or "strategy" in word for word in words
    )
    for word in words:
        assert word in str(caught.value)


def test_a_plan_for_other_ranks_is_refused() -> None:
    def body(rank: int) -> str:
        with pytest.raises(InputError) as caught:
            make_executor(make_plan(LLAMA, Degrees(pp=2, num_micro_batches=2)))
        return str(caught.value)

    assert "1 were started, but the plan is for 2" in on_ranks(body, 1)[0]

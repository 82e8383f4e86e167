"""Experts shared out over ranks train as in one process: losses, gradient norms, balance, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.foundation.errors import InputError
from planner.model.feed_forward import Activation, Mlp, Routing, Score
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Zero
from runtime.parallel.parallelize import check_supported
from runtime.train.executor import Executor
from tests.plans import batch8, make_plan, tiny_deepseek_experts, tiny_mixtral
from tests.runtime.matrix import SGD_TOLERANCE, TOLERANCE, execute, under_sgd
from tests.runtime.ranks import interrupted, make_executor, on_ranks, single_process, train

STEPS = 5
SHARED = Mlp(width=32, gated=True, activation=Activation.SILU)
MIXTRAL = tiny_mixtral(layers=2, routing=Routing(aux_loss=0.02, z_loss=0.001))
DEEPSEEK = tiny_deepseek_experts(layers=2)
DROPPING = tiny_mixtral(layers=2, shared=SHARED, routing=Routing(capacity=0.75, aux_loss=0.02))
BIASED = tiny_mixtral(layers=2, router_bias=True, expert=replace(SHARED, bias=True))
MIXED = (Stage(first=0, end=2, recompute=RecomputeCounts(none=0, selective=1, full=1)),)


def sliced(**degrees: object) -> Degrees:
    """The same with sequence parallelism: each rank sends its own tokens."""
    return batch8(sequence_parallel=True, **degrees)


CASES: dict[str, Plan] = {
    "ep2-zero0": make_plan(MIXTRAL, batch8(dp_replicate=2, ep=2, micro_batch=2)),
    "ep2-dp4-zero1": make_plan(DEEPSEEK, batch8(dp_shard=4, ep=2, micro_batch=1, zero=Zero(1))),
    "ep2-dp4-zero3": make_plan(DEEPSEEK, batch8(dp_shard=4, ep=2, micro_batch=1, zero=Zero(3))),
    "ep4-zero2": make_plan(DEEPSEEK, batch8(dp_shard=4, ep=4, micro_batch=1, zero=Zero(2))),
    "tp2": make_plan(DEEPSEEK, batch8(tp=2, micro_batch=4)),
    "tp2-sp": make_plan(DEEPSEEK, sliced(tp=2, micro_batch=4)),
    "tp2-ep2": make_plan(DEEPSEEK, batch8(tp=2, dp_replicate=2, ep=2, micro_batch=2)),
    "tp2-sp-ep2": make_plan(DEEPSEEK, sliced(tp=2, dp_shard=2, ep=2, micro_batch=2, zero=Zero(3))),
    "tp2-sp-ep4-etp1": make_plan(MIXTRAL, sliced(tp=2, dp_shard=2, ep=4, etp=1, micro_batch=2, zero=Zero(1))),
    "tp4-sp-etp2": make_plan(DEEPSEEK, sliced(tp=4, etp=2, micro_batch=4)),
    "pp2-ep2": make_plan(DEEPSEEK, batch8(pp=2, dp_shard=2, ep=2, micro_batch=1, zero=Zero(1))),
    "recompute-ep2": make_plan(DEEPSEEK, batch8(dp_shard=2, ep=2, micro_batch=2, zero=Zero(3)), MIXED),
    "recompute-tp2-sp-ep2": make_plan(
        MIXTRAL, sliced(tp=2, dp_shard=2, ep=2, micro_batch=2, zero=Zero(2)), MIXED
    ),
    "dropping-tp2-sp-ep2-etp1": make_plan(DROPPING, sliced(tp=2, ep=2, etp=1, micro_batch=4)),
    "biased-tp2-sp-ep2": make_plan(BIASED, sliced(tp=2, dp_shard=2, ep=2, micro_batch=2, zero=Zero(2))),
}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str) -> None:
    plan = CASES[name]
    expected = [value for pair in single_process(plan, STEPS) for value in pair]

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        return train(executor, 0, STEPS), executor.executed().differences(plan)

    for trajectory, differences in on_ranks(body, plan.strategy.degrees.world):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=TOLERANCE)
        assert not differences


def test_gradients_are_those_of_one_process_where_nothing_divides_by_them() -> None:
    """By SGD, which does not enlarge what the order of sums left, so that a closer bound holds."""
    plan = make_plan(tiny_deepseek_experts(), sliced(tp=2, ep=2, etp=1, micro_batch=2))
    assert execute(under_sgd(plan)).difference <= SGD_TOLERANCE


def test_a_rank_holds_its_experts_and_its_part_of_their_state() -> None:
    """Eight experts over ep=2, the state of each four over two ranks: a quarter of the weights."""
    plan = CASES["ep2-dp4-zero3"]

    def body(rank: int) -> Any:
        weights = make_executor(plan).weights
        return {w.name: w.shard.numel() for w in weights if ".experts." in w.name}

    for held in on_ranks(body, 4):
        assert held == {
            f"layers.{layer}.mlp.experts.{name}": 8 * 32 * 32 // 4
            for layer in range(2)
            for name in ("gate", "up", "down")
        }


def test_experts_that_do_not_divide_are_split_along_the_hidden_size() -> None:
    """Two experts over four ranks: none is left without a part."""
    spec = tiny_mixtral(layers=1, count=2, topk=1)
    plan = make_plan(spec, batch8(dp_shard=4, micro_batch=1, zero=Zero(3)))
    expected = [value for pair in single_process(plan, 2) for value in pair]

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        sizes = {w.shard.numel() for w in executor.weights if ".experts." in w.name}
        return sizes.pop(), train(executor, 0, 2)

    for held, trajectory in on_ranks(body, 4):
        assert held == 2 * 32 * 32 // 4
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=TOLERANCE)


def imbalance(executor: Executor, steps: int) -> float:
    """Tokens of the busiest expert over the mean, in the last of some steps that train nothing else."""
    executor.optimizer.step = lambda: None  # type: ignore[method-assign]
    (router, *_) = (m for m in executor.modules[0].model.modules() if hasattr(m, "correction"))
    loads = []
    update = executor.balance.update

    def watched() -> None:
        loads.append(router.counts.clone())
        update()

    executor.balance.update = watched  # type: ignore[method-assign]
    for _ in range(steps):
        train(executor, 0, 1)
    return float(loads[-1].max() / loads[-1].mean())


def test_the_correction_evens_out_the_loads() -> None:
    spec = tiny_mixtral(layers=1, routing=Routing(score=Score.SIGMOID, corrected=True, bias_speed=0.02))
    plan = make_plan(spec, Degrees(micro_batch=8))

    def body(rank: int) -> Any:
        return imbalance(make_executor(plan), 1), imbalance(make_executor(plan), 40)

    ((before, after),) = on_ranks(body, 1)
    assert before > 1.4
    assert after < 1.2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CASES["ep4-zero2"], make_plan(DEEPSEEK, batch8(dp_shard=2, ep=2, micro_batch=2, zero=Zero(3)))),
        (CASES["tp2-sp-ep2"], CASES["pp2-ep2"]),
    ],
    ids=["ep4-to-ep2", "tp2-sp-ep2-to-pp2-ep2"],
)
def test_training_goes_on_under_another_ep(before: Plan, after: Plan) -> None:
    """Three steps, a checkpoint, two steps under another plan: five of one process, correction and all."""
    first, second = interrupted(before, after)
    expected = [value for pair in single_process(before, STEPS) for value in pair]
    for early in first:
        for late in second:
            assert [v for pair in early + late for v in pair] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        (Degrees(dp_replicate=3, ep=3, micro_batch=1), ("ep=3", "8 experts", "1, 2, 4, 8")),
        (Degrees(dp_replicate=2, ep=4, micro_batch=1), ("ep=4", "2 of dp x cp x tp")),
        (Degrees(tp=2, etp=1, micro_batch=1), ("etp=1", "sequence_parallel=true")),
    ],
)
def test_an_impossible_share_is_refused(degrees: Degrees, says: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        check_supported(make_plan(MIXTRAL, degrees))
    for text in says:
        assert text in str(caught.value)


def test_interleaved_stages_balance_their_own_layers() -> None:
    spec = replace(DEEPSEEK, segments=(replace(DEEPSEEK.segments[0], count=4),))
    plan = make_plan(
        spec, batch8(pp=2, chunks=2, schedule=Schedule.INTERLEAVED, dp_replicate=2, ep=2, micro_batch=1)
    )
    expected = [value for pair in single_process(plan, 3) for value in pair]
    for trajectory in on_ranks(lambda rank: train(make_executor(plan), 0, 3), 4):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=TOLERANCE)

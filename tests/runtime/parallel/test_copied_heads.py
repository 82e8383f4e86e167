"""Fewer key-value heads than tensor-parallel ranks: neighbours have copies of one, which are one tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner.foundation.errors import InputError
from planner.model.attention import Attention, CpExchange, QkNorm
from planner.model.spec import Block, ModelSpec, Segment
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.parallel.parallelize import check_supported
from tests.plans import batch8, make_plan, split, tiny_llama
from tests.runtime.matrix import TOLERANCE, execute
from tests.runtime.ranks import make_executor, on_ranks
from tests.runtime.resharding import reshard

TWO, ONE = tiny_llama(kv_heads=2), tiny_llama(kv_heads=1)


def normed(qk_norm: QkNorm, kv_heads: int) -> Segment:
    """A layer with biases of projections, and norms of queries and keys."""
    block = TWO.block(0)
    assert isinstance(block, Block)
    mixer = Attention(heads=8, kv_heads=kv_heads, head_dim=4, qkv_bias=True, qk_norm=qk_norm)
    return Segment(block=replace(block, mixer=mixer), count=1)


MIXED: ModelSpec = replace(
    TWO, segments=(normed(QkNorm.WIDTH, 2), normed(QkNorm.HEAD, 1), normed(QkNorm.HEAD_LAYERNORM, 4))
)
"""Layers with two, one and four key-value heads."""


SP = {"sequence_parallel": True}
PLANS: dict[str, Plan] = {
    "tp4": make_plan(TWO, batch8(tp=4, micro_batch=4)),
    "tp4-one-sp": make_plan(ONE, batch8(tp=4, micro_batch=4, **SP)),
    "tp2-one-sp-zero3": make_plan(ONE, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3), **SP)),
    "tp2-one-zbv": make_plan(ONE, batch8(tp=2, pp=2, chunks=2, micro_batch=2, schedule=Schedule.ZBV)),
    "tp2-one-traded": make_plan(
        ONE, batch8(tp=2, cp=2, micro_batch=2, zero=Zero(2), cp_exchange=CpExchange.ALL_TO_ALL)
    ),
    "mixed-tp4-sp": make_plan(
        MIXED, batch8(tp=4, micro_batch=4, **SP), split(3, recompute=Recompute.SELECTIVE)
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_losses_and_gradient_norms_are_those_of_one_process(name: str) -> None:
    outcome = execute(PLANS[name])
    assert outcome.difference < TOLERANCE
    assert outcome.not_as_planned == ()


def test_a_checkpoint_holds_each_head_once_and_goes_on_under_any_tp(tmp_path: Path) -> None:
    short = tiny_llama(layers=2, kv_heads=2)
    plans = {
        "tp4": make_plan(short, Degrees(tp=4, micro_batch=4)),
        "tp2-zero1": make_plan(short, Degrees(tp=2, dp_shard=2, micro_batch=2, zero=Zero(1))),
        "one": make_plan(short, Degrees(micro_batch=4)),
    }
    pairs = reshard(plans, tmp_path)
    assert len(pairs) == len(plans) ** 2
    assert [pair for pair in pairs if not pair.good] == []


def test_ranks_hold_copies_of_whole_heads() -> None:
    """Rank r of 4 has key head r // 2 of two, of the rows of one process."""
    plan = make_plan(TWO, Degrees(tp=4, micro_batch=4))
    whole = on_ranks(lambda rank: _keys(make_plan(TWO, Degrees(micro_batch=4))), 1)[0]
    ranks = on_ranks(lambda rank: _keys(plan), 4)
    assert ranks == [whole[:4], whole[:4], whole[4:], whole[4:]]


def _keys(plan: Plan) -> list[list[float]]:
    """The rows of the first key projection on this rank."""
    executor = make_executor(plan)
    weight = next(w for w in executor.weights if w.name == "layers.0.attention.wk.weight")
    return [list(row) for row in weight.shard.tolist()]


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    odd = replace(TWO, segments=(normed(QkNorm.NONE, 8), normed(QkNorm.NONE, 1)))
    check_supported(make_plan(odd, batch8(tp=4, micro_batch=4)))
    wide = tiny_llama(hidden=48, kv_heads=4)
    block = wide.block(0)
    assert isinstance(block, Block)
    mixer = Attention(heads=12, kv_heads=4, head_dim=4)
    spec = replace(wide, vocab=66, segments=(Segment(block=replace(block, mixer=mixer), count=4),))
    with pytest.raises(InputError) as caught:
        check_supported(make_plan(spec, batch8(tp=6, micro_batch=4)))
    assert "strategy.tp=6: cannot split key-value heads of 4" in str(caught.value)
    assert "tp of 1, 2, 4, 8, 12, 16" in str(caught.value)

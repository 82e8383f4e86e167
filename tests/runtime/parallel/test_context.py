"""Context parallelism: attention over a shared sequence is that over the whole one; what is sent for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.foundation.decode import decode, encode
from planner.model.attention import CAUSAL, CpExchange
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Zero
from runtime.check.executed_settings import Executed
from runtime.model.attention import Core
from runtime.parallel.context import held_positions, make_core
from tests.plans import batch8, make_plan, split, tiny_gpt2, tiny_llama
from tests.runtime.matrix import TOLERANCE
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
PLAIN_CORE = Core(CAUSAL, None, None)
RING, GATHER, ALL_TO_ALL = CpExchange
MIXED = (Stage(first=0, end=4, recompute=RecomputeCounts(none=1, selective=1, full=2)),)


PLANS: dict[str, Plan] = {
    "ring": make_plan(LLAMA, batch8(cp=4, micro_batch=4)),
    "ring-tp2-sp-dp2-zero3": make_plan(
        LLAMA,
        batch8(cp=2, tp=2, sequence_parallel=True, dp_shard=2, zero=Zero.PARAMETERS, micro_batch=2),
        MIXED,
    ),
    "ring-pp2-zero1": make_plan(
        LLAMA,
        batch8(cp=2, pp=2, zero=Zero.OPTIMIZER, micro_batch=2),
        split(3, 1, recompute=Recompute.SELECTIVE),
    ),
    "ring-gpt2-tp2": make_plan(GPT2, batch8(cp=2, tp=2, micro_batch=4)),
    "gather-tp2-sp": make_plan(
        LLAMA, batch8(cp=2, tp=2, sequence_parallel=True, cp_exchange=GATHER, micro_batch=4)
    ),
    "gather-cp4-mixed": make_plan(LLAMA, batch8(cp=4, cp_exchange=GATHER, micro_batch=4), MIXED),
    "gather-hsdp": make_plan(
        LLAMA, batch8(cp=2, dp_replicate=2, zero=Zero.GRADIENTS, cp_exchange=GATHER, micro_batch=2)
    ),
    "all-to-all-gpt2-pp2-interleaved": make_plan(
        GPT2,
        batch8(cp=2, pp=2, chunks=2, schedule=Schedule.INTERLEAVED, cp_exchange=ALL_TO_ALL, micro_batch=2),
    ),
    "all-to-all-tp2-sp": make_plan(
        LLAMA, batch8(cp=2, tp=2, sequence_parallel=True, cp_exchange=ALL_TO_ALL, micro_batch=4), MIXED
    ),
    "all-to-all-dp2-zero0": make_plan(
        LLAMA, batch8(cp=2, dp_replicate=2, cp_exchange=ALL_TO_ALL, micro_batch=2)
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_training_is_that_of_one_process_and_read_back_as_planned(name: str) -> None:
    plan = PLANS[name]
    expected = [value for pair in single_process(plan, 5) for value in pair]

    def body(rank: int) -> dict[str, Any]:
        executor = make_executor(plan)
        return {"seen": train(executor, 0, 5), "executed": encode(executor.executed())}

    for answer in on_ranks(body, plan.strategy.degrees.world):
        seen = [value for pair in answer["seen"] for value in pair]
        assert seen == pytest.approx(expected, rel=TOLERANCE)
        executed = decode(Executed, answer["executed"], source="rank")
        assert executed.differences(plan) == ()
        assert executed.strategy == plan.strategy


@pytest.mark.parametrize(("exchange", "precision"), [(e, p) for e in CpExchange for p in ("fp32", "bf16")])
def test_attention_over_ranks_is_attention_over_the_whole_sequence(
    exchange: CpExchange, precision: str
) -> None:
    """Results and gradients on 4 ranks, with two key heads for four queries' and for four ranks."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rtol, atol = (1e-5, 1e-6) if precision == "fp32" else (2e-2, 2e-2)
    degrees = Degrees(cp=4, cp_exchange=exchange)
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(2, 16, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]

    def body(rank: int) -> bool:
        held = held_positions(16, degrees, rank)
        *inputs, grad = (t[:, held].to(dtype) for t in whole)
        inputs = [t.requires_grad_() for t in inputs]
        core = make_core(PLAIN_CORE, exchange, dist.group.WORLD)  # type: ignore[arg-type]
        out = core(*inputs)
        found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        exact_inputs = [t.to(dtype).float().requires_grad_() for t in whole[:3]]
        exact = PLAIN_CORE(*exact_inputs)
        right = (exact.detach(), *torch.autograd.grad(exact, exact_inputs, whole[3].to(dtype).float()))
        for mine, all_tokens in zip(found, right, strict=True):
            assert mine.dtype is dtype
            torch.testing.assert_close(mine.float(), all_tokens[:, held], rtol=rtol, atol=atol)
        return True

    assert all(on_ranks(body, 4))


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_every_token_feels_all_tokens_before_it_and_none_behind(exchange: CpExchange) -> None:
    """By gradients of values: a query's go to the keys that it met, on whatever rank they lie."""
    degrees = Degrees(cp=4, cp_exchange=exchange)

    def body(rank: int) -> list[list[int]]:
        held = held_positions(16, degrees, rank)
        q, k, v = (torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(rank)) for _ in range(3))
        v.requires_grad_()
        out = make_core(PLAIN_CORE, exchange, dist.group.WORLD)(q, k, v)  # type: ignore[arg-type]
        met = []
        for query in range(16):
            own = (held == query).to(out.dtype)[None, :, None, None]
            (grad,) = torch.autograd.grad(out, v, own * torch.ones_like(out), retain_graph=True)
            met += [[query, key] for key, part in zip(held.tolist(), grad[0], strict=True) if part.any()]
        return met

    met = sorted(pair for answer in on_ranks(body, 4) for pair in answer)
    assert met == [[query, key] for query in range(16) for key in range(query + 1)]


def test_ranks_hold_every_token_once_and_as_many_pairs() -> None:
    for exchange in CpExchange:
        degrees = Degrees(cp=4, cp_exchange=exchange)
        held = [held_positions(32, degrees, rank).tolist() for rank in range(4)]
        assert sorted(position for own in held for position in own) == list(range(32))
        balanced = len({sum(own) for own in held}) == 1
        assert balanced is (exchange is not ALL_TO_ALL), "heads, not tokens, are shared out there"
    assert held_positions(16, Degrees(cp=2), 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_a_block_that_met_only_its_own_tokens_is_read_as_not_parallel() -> None:
    plan = PLANS["all-to-all-dp2-zero0"]

    def body(rank: int) -> str:
        executor = make_executor(plan)
        executor.modules[0].model.get_submodule("layers.2.attention").core = PLAIN_CORE
        train(executor, 0, 1)
        with pytest.raises(AssertionError) as caught:
            executor.executed()
        return str(caught.value)

    for told in on_ranks(body, 4):
        assert "dp_replicate_cp" in told

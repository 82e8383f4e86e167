"""Context parallelism: attention over a shared sequence is that over the whole one; what is sent for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional_collectives

from planner.attention import CAUSAL, Attention
from planner.codec import decode, encode
from planner.cost.context import copies_of_heads, widths_of
from planner.cost.layer import LayerShape
from planner.cost.spread import sent_again
from planner.model import Block, Segment
from planner.plan import Plan
from planner.profile import LayerKind
from planner.stack import NATIVE
from planner.strategy import CpExchange, Degrees, Recompute, RecomputeCounts, Schedule, Stage, Zero
from planner.workload import Precision
from runtime.parallel.context import held_positions, make_core
from runtime.readback import Executed
from runtime.transformer.core import Core
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama
from tests.runtime.matrix import TOLERANCE
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
PLAIN_CORE = Core(CAUSAL, None, None)
RING, GATHER, ALL_TO_ALL = CpExchange
MIXED = (Stage(first=0, end=4, recompute=RecomputeCounts(none=1, selective=1, full=2)),)


def batch8(**degrees: object) -> Degrees:
    """Degrees with as many micro-batches as make a batch of 8 sequences."""
    found = Degrees(**degrees)  # type: ignore[arg-type]
    return replace(found, num_micro_batches=8 // (found.micro_batch * found.dp))


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


Message = tuple[str, int]
"""What is sent, and the bytes that this rank puts in."""


@contextmanager
def messages_of(group: dist.ProcessGroup) -> Iterator[list[Message]]:
    """Every message over a group, in order, seen where torch is asked to send it."""
    seen: list[Message] = []

    def patched(module: Any, name: str, see: Any) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            see(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(module, name, call)
        undo.append(lambda: setattr(module, name, real))

    def see_batch(operations: list[dist.P2POp]) -> None:
        if operations[0].group is group:
            sent = [each.tensor for each in operations if each.op is dist.isend]
            seen.append(("hop", sum(t.nbytes for t in sent)))

    def see(what: str) -> Any:
        def call(_out: Tensor, put_in: Tensor, *_: Any, **kwargs: Any) -> None:
            if kwargs.get("group") is group:
                seen.append((what, put_in.nbytes))

        return call

    def see_trade(put_in: Tensor, _out: Any, _in: Any, over: Any) -> None:
        if over is group:
            seen.append(("all_to_all", put_in.nbytes))

    undo: list[Any] = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    patched(dist, "batch_isend_irecv", see_batch)
    patched(dist, gather, see("gather"))
    patched(dist, scatter, see("scatter"))
    patched(functional_collectives, "all_to_all_single", see_trade)
    try:
        yield seen
    finally:
        for each in undo:
            each()


def charged(plan: Plan, recompute: Recompute) -> list[Message]:
    """What planner.cost.context charges one block and micro-batch for, as this rank's bytes."""
    degrees, workload = plan.strategy.degrees, plan.workload
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=degrees.tp, sequence_parallel=degrees.sequence_parallel,
        micro_batch=degrees.micro_batch, seq=workload.seq, precision=workload.precision, cp=degrees.cp,
    )  # fmt: skip
    block = plan.model.block(0)
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    mixer = block.mixer
    widths, tokens, copies = widths_of(mixer, shape), int(shape.tokens), copies_of_heads(mixer, shape)
    kv = int(tokens * widths.kv)
    match degrees.cp_exchange:
        case CpExchange.RING:
            forward, backward = [("hop", kv)] * (degrees.cp - 1), [("hop", kv)] * (2 * degrees.cp - 1)
        case CpExchange.GATHER:
            forward, backward = [("gather", kv)], [("gather", kv), ("scatter", degrees.cp * kv)]
        case CpExchange.ALL_TO_ALL:
            each = (widths.query, copies * widths.key, copies * widths.value, widths.out)
            forward = backward = [("all_to_all", int(tokens * width)) for width in each]
    again, _ = sent_again(recompute, NATIVE, degrees.cp_exchange)
    return sorted(forward + backward + forward * again)


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_what_is_sent_is_what_the_cost_model_charges(exchange: CpExchange) -> None:
    """For each recompute option, of one step with two micro-batches in bf16; fewer key heads than ranks."""
    block = LLAMA.block(0)
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    mixer = replace(block.mixer, kv_heads=2)
    few_keys = replace(LLAMA, segments=(Segment(block=replace(block, mixer=mixer), count=4),))

    def body(rank: int) -> list[Any]:
        found = []
        for recompute in Recompute:
            plan = make_plan(
                few_keys, batch8(cp=4, cp_exchange=exchange, micro_batch=4), recompute=recompute,
                precision=Precision.BF16,
            )  # fmt: skip
            executor = make_executor(plan)
            with messages_of(executor.meshes.cp.get_group()) as seen:
                train(executor, 0, 1)
            found.append((sorted(map(list, seen)), [list(m) for m in sorted(charged(plan, recompute) * 8)]))
        return found

    for answer in on_ranks(body, 4):
        for seen, expected in answer:
            assert seen == expected
            assert seen


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

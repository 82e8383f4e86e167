"""The same code on an accelerator. Skipped where there is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from planner.model.attention import CAUSAL, AttentionSpan, Reach
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.strategy.rehearsal import RehearsalMode
from planner.strategy.strategy import Degrees, Zero
from runtime.launch.process_group import enter_group
from runtime.model.attention import Core
from runtime.model.block_attention import Merged, WrittenOut, attend, attend_backward
from runtime.rehearse.rehearse import RehearsalOptions, rehearse_rank
from runtime.train.executor import Executor
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.runtime.ranks import OPTIONS, SEED, single_process, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The first accelerator, in a group of one rank over NCCL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    yield enter_group("cuda", timeout_s=60)
    dist.destroy_process_group()


@pytest.mark.parametrize("spec", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_fp32_equals_one_process_on_the_cpu(device: torch.device, spec, recompute: Recompute) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan(spec, Degrees(micro_batch=2, num_micro_batches=2), recompute=recompute)
    executor = Executor(plan, device=device, seed=SEED, optimizer_options=OPTIONS)
    expected = [value for pair in single_process(plan, 5) for value in pair]
    assert [v for pair in train(executor, 0, 5) for v in pair] == pytest.approx(expected, rel=1e-4)
    assert executor.executed().differences(plan) == ()


@pytest.mark.parametrize("spec", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_fp32_within_documents_equals_one_process_on_the_cpu(device: torch.device, spec) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan(spec, Degrees(micro_batch=2, num_micro_batches=2), recompute=Recompute.SELECTIVE)
    executor = Executor(plan, device=device, seed=SEED, optimizer_options=OPTIONS)
    expected = [value for pair in single_process(plan, 3, documents=True) for value in pair]
    found = [v for pair in train(executor, 0, 3, documents=True) for v in pair]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_bf16_attention_within_documents_is_that_of_each_alone(window: int, cap: float | None) -> None:
    span = AttentionSpan(reach=Reach.WINDOW, size=window) if window else CAUSAL
    core, ends = Core(span, None, cap), [0, 1, 100, 229, 256]
    q, k, v = (
        torch.randn(1, 256, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    begins = torch.tensor([[a for a, b in pairwise(ends) for _ in range(b - a)]])
    parts = [core(*(t[:, a:b] for t in (q, k, v))) for a, b in pairwise(ends)]
    results = [core(q, k, v, begins), torch.cat(parts, 1)]
    gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in results]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


def test_bf16_recompute_saves_memory_and_gives_the_same_loss(device: torch.device) -> None:
    """Peak memory falls from none to selective to full; the losses agree to bf16's precision."""
    spec = replace(tiny_llama(hidden=512, vocab=1024), max_positions=1024, initializer_range=0.02)
    losses, peaks = [], []
    for recompute in Recompute:
        plan = make_plan(
            spec, Degrees(micro_batch=8), recompute=recompute, seq=1024, precision=Precision.BF16
        )
        executor = Executor(plan, device=device, seed=SEED, optimizer_options=OPTIONS)
        train(executor, 0, 1)
        torch.cuda.reset_peak_memory_stats()
        losses.append(train(executor, 1, 1)[0][0])
        peaks.append(torch.cuda.max_memory_allocated())
        del executor
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_attention_are_torchs_attention(causal: bool) -> None:
    """The flash kernel's operators, forward and backward, with groups of heads; keys in two blocks."""
    q, k, v, grad = (
        torch.randn(2, 256, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2, 8)
    )
    out, lse = attend(q, k, v, causal=causal, scale=None)
    found = (out, *attend_backward(grad, (q, k, v), out, lse, causal=causal, scale=None))
    exact = WrittenOut()
    right_out, right_lse = exact.forward(q, k, v, causal, None)
    right = (right_out, *exact.backward(grad, (q, k, v), right_out, right_lse, causal, None))
    for mine, expected in zip(found, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)
    if not causal:
        merged = Merged(*attend(q, k[:, :128], v[:, :128], causal=False, scale=None))
        merged.add(*attend(q, k[:, 128:], v[:, 128:], causal=False, scale=None))
        torch.testing.assert_close(merged.out, right_out.float(), rtol=2e-2, atol=2e-2)


def test_a_rank_of_many_is_rehearsed_on_the_device() -> None:
    """In processes of their own: this one may not have asked CUDA for anything."""
    if torch.cuda.is_initialized():
        pytest.skip("this process has initialised CUDA and cannot fork for it")
    spec = replace(tiny_llama(layers=8, hidden=512, vocab=4096), max_positions=1024)
    degrees = Degrees(tp=2, pp=2, dp_shard=4, zero=Zero.OPTIMIZER, micro_batch=2, num_micro_batches=4)
    plan = make_plan(spec, degrees, seq=1024, precision=Precision.BF16)
    alone = {
        mode: rehearse_rank(plan, 8, (1,), RehearsalOptions(mode=mode, compiled=False))
        for mode in (RehearsalMode.DEVICE, RehearsalMode.FAKE_TENSORS)
    }
    device, shapes = alone.values()
    assert device.reserved_bytes and device.device_bytes and device.allocated_bytes
    assert device.allocated_bytes <= device.reserved_bytes <= device.device_bytes
    assert shapes.allocated_bytes == pytest.approx(device.allocated_bytes, rel=0.1)
    assert {each.kind for each in device.passes} == {"F", "B"} and device.step_s
    assert device.idle_share is not None and 0 <= device.idle_share < 1
    short = RehearsalOptions(
        mode=RehearsalMode.DEVICE, compiled=False, room_bytes=device.allocated_bytes // 2
    )
    assert rehearse_rank(plan, 8, (1,), short).ran_out

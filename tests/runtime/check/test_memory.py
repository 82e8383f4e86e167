"""Peaks against cases that can be computed by hand."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from planner.strategy.strategy import Degrees, Zero
from runtime.check.memory import live_bytes, measure_peak, storage_bytes, trace_phases
from tests.plans import make_plan, tiny_llama
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

CPU = torch.device("cpu")
MIB = 1024**2


def floats(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB) // 4)


def test_parameters_without_storage_are_passed_over() -> None:
    lazy = torch.nn.LazyLinear(4)
    assert measure_peak(lambda: floats(2), CPU).allocated_bytes >= 2 * MIB
    assert lazy.has_uninitialized_params()


def test_peak_of_known_tensors_above_what_was_alive() -> None:
    held = [floats(3)]

    def work() -> None:
        a = floats(4)
        b = floats(2)
        del a
        floats(5)
        del b
        floats(1)

    before = live_bytes(CPU)
    peak = measure_peak(work, CPU)
    assert peak.start_bytes == before
    assert peak.allocated_bytes - before == 7 * MIB
    assert before >= 3 * MIB and storage_bytes(held) == 3 * MIB
    assert peak.reserved_bytes is None and peak.device_used_bytes is None
    assert peak.rss_bytes > peak.allocated_bytes


def test_releasing_what_was_alive_makes_room() -> None:
    held = [floats(6)]

    def work() -> None:
        held.clear()
        held.append(floats(6))

    before = live_bytes(CPU)
    assert measure_peak(work, CPU).allocated_bytes == before


def test_replacing_needs_both() -> None:
    held = [floats(6)]

    def work() -> None:
        held[0] = floats(6)

    before = live_bytes(CPU)
    assert measure_peak(work, CPU).allocated_bytes == before + 6 * MIB


def test_autograd_keeps_and_releases_saved_tensors() -> None:
    x = floats(2).requires_grad_()
    x.grad = torch.zeros_like(x)
    state: dict[str, torch.Tensor] = {}

    def forward() -> None:
        y = x.exp()  # saved by exp's backward
        z = y.sin()  # saves y only; z itself is saved by the next
        state["loss"] = z.square().sum()  # the square is released

    def backward() -> None:
        state["loss"].backward()
        del state["loss"]

    first, second = trace_phases([forward, backward], CPU)
    assert first.end_bytes == pytest.approx(4 * MIB, rel=0.01)  # y and z
    assert first.peak_bytes == pytest.approx(6 * MIB, rel=0.01)  # and the square
    assert second.peak_bytes >= first.end_bytes
    assert second.end_bytes == 0


def test_a_step_of_adamw_is_weights_gradients_and_state() -> None:
    layer = torch.nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=True)
    x = torch.randn(64, 512)
    before = live_bytes(CPU)

    def step() -> None:
        layer(x).sum().backward()
        optimizer.step()

    trace = measure_peak(step, CPU)
    assert live_bytes(CPU) - before == pytest.approx(3 * MIB, rel=0.001)  # gradient and two moments
    assert 3 * MIB <= trace.allocated_bytes - before <= 6 * MIB  # and the update's temporaries
    optimizer.zero_grad()
    assert live_bytes(CPU) - before == pytest.approx(2 * MIB, rel=0.001)


def test_views_count_once_and_foreign_memory_not_at_all() -> None:
    base = floats(1)
    assert storage_bytes([base, base[10:], base.view(2, -1), torch.from_numpy(np.zeros(MIB))]) == MIB


def test_what_other_threads_release_is_seen() -> None:
    held = [floats(4)]

    def work() -> None:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        held.append(floats(4))

    (phase,) = trace_phases([work], CPU)
    assert phase.end_bytes == 0 and phase.peak_bytes == 0


def test_a_sharded_step_on_real_ranks() -> None:
    """ZeRO 3 over gloo: shards of weights and moments before, and all that a step takes is given back."""
    model = tiny_llama(hidden=128, vocab=256)
    degrees = Degrees(dp_shard=2, zero=Zero.PARAMETERS, micro_batch=2, num_micro_batches=2)
    plan = make_plan(model, degrees, seq=64)

    def body(rank: int) -> list[int]:
        inherited = live_bytes(CPU)  # ranks are forked: what earlier tests left alive is theirs too
        executor = make_executor(plan)
        tokens = slice_of(executor, batch_of(plan, 0))
        executor.step(tokens)
        peak = measure_peak(lambda: executor.step(tokens), CPU)
        figures = (peak.start_bytes, peak.allocated_bytes, live_bytes(CPU))
        return [figure - inherited for figure in figures]

    first, second = on_ranks(body, 2)
    shards_bytes = 12 * model.params_total // 2  # weights and two moments in fp32, halved
    logits_bytes = 4 * 2 * 64 * model.vocab
    for start, peak, after in (first, second):
        assert start == pytest.approx(shards_bytes, rel=0.02)
        assert after == start
        assert peak > start + 4 * model.params_total // 2 + logits_bytes  # and gradients, and activations
    assert first[1] == pytest.approx(second[1], rel=0.02)

"""One rank of a world that exists in name only: what it receives has the size and kind of what it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner.model.attention import CAUSAL, CpExchange
from planner.strategy.strategy import Degrees
from runtime.model.attention import Core
from runtime.parallel import collectives
from runtime.parallel import collectives as context_messages
from runtime.parallel.collectives import (
    balanced_counts,
    exchange_counts,
    exchange_rows,
    fill_received,
    sum_to_ranks,
)
from runtime.parallel.context import make_core
from runtime.parallel.expert import SentByRank
from runtime.parallel.meshes import fake_world

SPREAD = Degrees(dp_replicate=4, ep=4)


def poison(*shape: int) -> None:
    """Leaves memory of this size with values that are not finite to the allocator."""
    for _ in range(8):
        torch.full(shape, torch.nan)


class Leaving:
    """The functional collectives of a backend that leaves what is received as it was allocated."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops._c10d_functional, name)
        return (lambda x: operator(x).fill_(torch.nan)) if name == "wait_tensor" else operator


@pytest.fixture(params=["backend-fills", "backend-leaves"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of fake backend."""
    if request.param == "backend-leaves":
        for module in (collectives, context_messages):
            monkeypatch.setattr(module, "FAKE_BACKEND_COPIES", False)
        monkeypatch.setattr(collectives, "_ops", Leaving())
        monkeypatch.setattr(context_messages.functional_collectives, "wait_tensor", Leaving().wait_tensor)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

        def leave(out: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
            scatter(out, whole, group=group)
            out.fill_(torch.nan)

        monkeypatch.setattr(dist, "reduce_scatter_single", leave, raising=False)


@pytest.mark.parametrize("counts", [[[9, 0], [1, 2], [0, 0], [0, 0]], [[4, 4]] * 4, [[0, 0]] * 4])
def test_as_many_rows_come_as_go_evenly_over_experts(counts: list[list[int]]) -> None:
    with fake_world(SPREAD, "cpu") as meshes:
        assert meshes.experts is not None
        sent = torch.tensor(counts)
        received = exchange_counts(sent, meshes.experts.ep.get_group())
    assert received.shape == sent.shape and received.dtype == sent.dtype
    assert received.sum() == sent.sum()
    assert received.max() - received.min() <= 1


def test_balanced_routers_receive_what_they_send() -> None:
    even = torch.full((4, 2), 3)
    assert torch.equal(balanced_counts(even), even)


@pytest.mark.usefixtures("backend")
def test_rows_that_come_are_rows_that_were_sent() -> None:
    """Also where more come than go, and where the backend leaves what it should write."""
    rows = torch.randn(6, 3).requires_grad_()
    with fake_world(SPREAD, "cpu") as meshes:
        assert meshes.experts is not None
        poison(10, 3)
        received = exchange_rows(rows, [6, 0, 0, 0], [4, 2, 2, 2], meshes.experts.ep.get_group())
        received.sum().backward()
    known = {tuple(row) for row in rows.detach().tolist()}
    assert received.shape == (10, 3) and {tuple(row) for row in received.tolist()} <= known
    assert rows.grad is not None and rows.grad.isfinite().all()


def test_filling_repeats_what_was_sent() -> None:
    received = torch.full((5, 2), torch.nan)
    fill_received(received, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert received.tolist() == [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]]


def test_nothing_is_filled_from_nothing() -> None:
    received = torch.ones(0, 2)
    fill_received(received, torch.ones(0, 2))
    assert received.shape == (0, 2)


@pytest.mark.parametrize("etp", [1, 2])
def test_experts_get_balanced_rows_and_give_all_back(etp: int) -> None:
    """A router that sends all rows to one expert still meets ranks that send evenly."""
    degrees = Degrees(tp=2, sequence_parallel=True, dp_replicate=4, ep=4, etp=etp)
    with fake_world(degrees, "cpu") as meshes:
        assert meshes.experts is not None
        group = meshes.experts.etp.get_group() if etp > 1 else None
        dispatch = SentByRank(meshes.experts.ep.get_group(), group)
        rows = torch.randn(24, 3)
        here, counts, sent = dispatch.send(rows, torch.tensor([24, 0, 0, 0, 0, 0, 0, 0]))
        back = dispatch.take_back(here, sent)
    assert counts.tolist() == [12 * etp, 12 * etp] and here.shape == (24 * etp, 3)
    assert back.shape == rows.shape and back.isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("exchange", list(CpExchange))
def test_context_parallel_attention_meets_finite_keys(exchange: CpExchange) -> None:
    q, k, v = (torch.randn(2, 8, heads, 4).requires_grad_() for heads in (4, 2, 2))
    with fake_world(Degrees(cp=2, cp_exchange=exchange), "cpu") as meshes:
        core = make_core(Core(CAUSAL, None, None), exchange, meshes.cp.get_group())
        poison(2, 8, 2, 4)
        out = core(q, k, v)
        poison(2, 8, 2, 4)
        out.square().sum().backward()
    assert out.shape == q.shape and out.isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.usefixtures("backend")
def test_sums_over_ranks_are_finite() -> None:
    with fake_world(Degrees(tp=2), "cpu"):
        poison(2, 3)
        summed = sum_to_ranks(torch.ones(4, 3), dist.group.WORLD)
    assert summed.shape == (2, 3) and summed.isfinite().all()

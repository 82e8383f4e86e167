"""The pipeline keeps no more alive than its schedule needs."""

from __future__ import annotations

from typing import Any

import pytest

from planner.strategy import Degrees, Schedule
from runtime.pipeline import PlanStage
from tests.plans import make_plan, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, train


@pytest.mark.parametrize(
    ("schedule", "peaks"),
    [
        # Rank 0 runs one forward ahead; each rank waits for one message, and has at most two under way.
        (Schedule.ONE_F_ONE_B, [{"buffers": 1, "sent": 2}, {"buffers": 2, "sent": 1}]),
        # GPipe keeps every micro-batch by design.
        (Schedule.GPIPE, [{"buffers": 1, "sent": 12}, {"buffers": 12, "sent": 11}]),
    ],
)
def test_buffers_and_messages_alive(schedule: Schedule, peaks: list[dict[str, int]]) -> None:
    plan = make_plan(tiny_llama(), Degrees(pp=2, schedule=schedule, num_micro_batches=12))

    def body(rank: int) -> dict[str, int]:
        executor = make_executor(plan)
        schedule = executor.pipeline._schedule
        assert schedule is not None
        (stage,) = schedule._stages
        assert isinstance(stage, PlanStage)
        peak = {"buffers": 0, "sent": 0}
        inner = stage.backward_one_chunk

        def backward(*args: Any, **kwargs: Any) -> Any:
            infos = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
            buffers = sum(getattr(info, "buffer", None) is not None for chunk in infos for info in chunk)
            peak["buffers"] = max(peak["buffers"], buffers)
            peak["sent"] = max(peak["sent"], len(stage._sent_forward) + len(stage._sent_backward))
            return inner(*args, **kwargs)

        stage.backward_one_chunk = backward  # type: ignore[method-assign]
        train(executor, 0, 2)
        assert not stage._sent_forward and not stage._sent_backward
        assert not stage.fwd_cache
        return peak

    assert on_ranks(body, 2) == peaks

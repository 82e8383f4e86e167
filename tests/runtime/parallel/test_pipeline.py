"""The pipeline does what its table says, whatever its order, and keeps no more alive than that needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import (
    ActionKind,
    Row,
    build_table,
    parse_table,
    peak_in_flight,
    print_table,
)
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Zero
from runtime.check.executed_settings import Executed
from runtime.model.attention import Attention
from runtime.parallel.parallelize import check_supported
from runtime.parallel.pipeline import Pipeline
from runtime.parallel.pipeline.run import Await, Receive, Release, Run, Send, lower
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
ZB_H1, ZBV, DUALPIPEV = Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV
STEPS = 5
MIXED = RecomputeCounts(none=1, full=1)


def custom_table() -> tuple[tuple[str, ...], ...]:
    """Two ranks, micro-batches out of order, whole and split backwards beside each other, one pair."""
    return (
        ("0F1", "0F0", "0F2", "0I1", "0F3", "0B0", "0W1", "0I3", "0I2", "0W2", "0W3"),
        ("1F1", "1I1", "1F0", "(1F2;1B0)OVERLAP_F_B", "1F3", "1B3", "1W1", "1I2", "1W2"),
    )


def with_table(plan: Plan, table: tuple[tuple[str, ...], ...]) -> Plan:
    return replace(plan, schedule_table=table)


PLANS: dict[str, Plan] = {
    "zb-h1": make_plan(LLAMA, Degrees(pp=2, schedule=ZB_H1, micro_batch=2, num_micro_batches=4)),
    "zb-h1-tied-zero2": make_plan(
        GPT2, Degrees(pp=2, schedule=ZB_H1, dp_shard=2, zero=Zero.GRADIENTS, num_micro_batches=4)
    ),
    "zbv-tied": make_plan(GPT2, Degrees(pp=2, chunks=2, schedule=ZBV, micro_batch=2, num_micro_batches=4)),
    "zbv-zero3-uneven": make_plan(
        tiny_llama(layers=7),
        Degrees(pp=2, chunks=2, schedule=ZBV, dp_shard=2, zero=Zero.PARAMETERS, num_micro_batches=4),
        split(1, 3, 1, 2),
    ),
    "zbv-zero1": make_plan(
        LLAMA, Degrees(pp=2, chunks=2, schedule=ZBV, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=3)
    ),
    "dualpipev-tied-tp2-sp": make_plan(
        GPT2,
        Degrees(pp=2, chunks=2, schedule=DUALPIPEV, tp=2, sequence_parallel=True, num_micro_batches=4),
    ),
    "zb-h1-hsdp": make_plan(
        LLAMA,
        Degrees(pp=2, schedule=ZB_H1, dp_replicate=2, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=2),
    ),
    "zb-h1-recompute": make_plan(
        LLAMA,
        Degrees(pp=2, schedule=ZB_H1, num_micro_batches=4),
        (Stage(first=0, end=2, recompute=MIXED), *split(2, 2, recompute=Recompute.FULL)[1:]),
    ),
    "custom": with_table(make_plan(LLAMA, Degrees(pp=2, num_micro_batches=4)), custom_table()),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_split_backward_trains_as_one_process_and_runs_each_layer_once(name: str) -> None:
    """Losses and gradient norms of five steps, what was executed, and calls of each layer in each step."""
    plan = PLANS[name]
    expected = [value for pair in single_process(plan, STEPS) for value in pair]
    counts = [option is not Recompute.NONE for s in plan.strategy.stages for option in s.recompute.options()]

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        calls: dict[int, int] = {}
        for module in executor.modules:
            for index, layer in module.model.layers.items():
                attention = next(part for part in layer.modules() if isinstance(part, Attention))
                attention.register_forward_pre_hook(
                    lambda _m, _a, index=int(index): calls.update({index: calls.get(index, 0) + 1})
                )
        found = train(executor, 0, STEPS)
        return found, encode(executor.executed()), sorted(calls.items())

    seen: set[int] = set()
    for trajectory, executed, calls in on_ranks(body, plan.strategy.degrees.world):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=1e-5)
        found = decode(Executed, executed, source="rank")
        assert found.differences(plan) == () and found.schedule_table == plan.schedule_table
        each = STEPS * plan.strategy.degrees.num_micro_batches
        assert calls == [[layer, each * (1 + counts[layer])] for layer, _ in calls]
        seen |= {layer for layer, _ in calls}
    assert seen == set(range(plan.model.layers))


class Watch:
    """The most that a pipeline held in its steps: buffers, sent tensors, micro-batches of each stage."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.received, self.sent = pipeline, 0, 0
        self.alive = dict.fromkeys(pipeline.passes, 0)
        self._inner, pipeline._do = pipeline._do, self._do  # type: ignore[method-assign]

    def _do(self, step: Any, batch: Any) -> None:
        self._inner(step, batch)
        received, sent = self.pipeline.mailbox.held
        self.received, self.sent = max(self.received, received), max(self.sent, sent)
        for stage, passes in self.pipeline.passes.items():
            self.alive[stage] = max(self.alive[stage], passes.alive + passes.deferred)

    def peaks(self) -> dict[str, Any]:
        alive = {str(stage): count for stage, count in self.alive.items()}
        return {"received": self.received, "sent": self.sent, "alive": alive}


@pytest.mark.parametrize(
    ("schedule", "messages"),
    [
        # By rank: buffers and messages received but not taken; tensors sent but not known to have arrived.
        (Schedule.ONE_F_ONE_B, [(1, 2), (2, 2)]),
        (ZB_H1, [(2, 2), (2, 2)]),
        (ZBV, [(2, 4), (3, 4)]),
        (DUALPIPEV, [(2, 4), (4, 4)]),
        (Schedule.GPIPE, [(1, 12), (1, 12)]),  # keeps every micro-batch's tensors by design
    ],
)
def test_no_more_is_alive_than_the_table_needs(schedule: Schedule, messages: list[tuple[int, int]]) -> None:
    """Micro-batches of each stage, their deferred gradients included, and messages on their way."""
    degrees = Degrees(pp=2, chunks=schedule.least_chunks, schedule=schedule, num_micro_batches=12)
    plan = make_plan(LLAMA, degrees)

    def body(rank: int) -> dict[str, Any]:
        executor = make_executor(plan)
        watch = Watch(executor.pipeline)
        train(executor, 0, 2)
        assert executor.pipeline.mailbox.held == (0, 0)
        assert not any(passes.alive or passes.deferred for passes in executor.pipeline.passes.values())
        return watch.peaks()

    table = parse_table(plan.schedule_table)
    for rank, found in enumerate(on_ranks(body, 2)):
        assert {int(stage): count for stage, count in found["alive"].items()} == peak_in_flight(table[rank])
        assert (found["received"], found["sent"]) == messages[rank]


def row_of(program: Any) -> Row:
    return tuple(step.action for step in program if isinstance(step, Run))


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("pp", [2, 3, 5])
def test_messages_of_a_program_cannot_wait_in_a_circle(schedule: Schedule, pp: int) -> None:
    """Both ends of a pair of ranks speak in one order, nothing is taken before it is sent, all is let go."""
    chunks = schedule.least_chunks
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=2 * pp)
    table = build_table(schedule, pp, chunks, 2 * pp)
    programs = lower(table, pp * chunks, degrees.pp_rank_of_stage)
    assert [row_of(program) for program in programs] == list(table)
    for a in range(pp):
        for b in range(a):
            spoken = [[step for step in programs[own] if _to(step, peer)] for own, peer in ((a, b), (b, a))]
            assert [step.message for step in spoken[0]] == [step.message for step in spoken[1]]
            assert all(isinstance(x, Send) != isinstance(y, Send) for x, y in zip(*spoken, strict=True))
    released = 0
    for program in programs:
        opened, sent = set(), set()
        for step in program:
            if isinstance(step, Receive):
                opened.add(step.message)
            elif isinstance(step, Await):
                opened.remove(step.message)
            elif isinstance(step, Send):
                sent.add(step.message)
            elif isinstance(step, Release):
                sent.remove(step.message)
                released += 1
        assert not opened
    total = sum(isinstance(step, Send) for program in programs for step in program)
    assert total == 2 * 2 * pp * (pp - 1) * chunks - (0 if schedule is not Schedule.INTERLEAVED else -4 * pp)
    assert released >= total / 2


def _to(step: Any, peer: int) -> bool:
    return isinstance(step, (Send, Receive)) and step.peer == peer


def edited(table: tuple[tuple[str, ...], ...], rank: int, old: str, new: str) -> tuple[tuple[str, ...], ...]:
    """The table with an action of a row replaced by others, or by none."""
    row = tuple(text for action in table[rank] for text in (new.split() if action == old else [action]))
    return (*table[:rank], row, *table[rank + 1 :])


@pytest.mark.parametrize(
    ("rank", "old", "new", "reason"),
    [
        (0, "0W1", "", "stage/micro-batch without forward and backward: 0/1"),
        (0, "0W1", "0W1 0W1", "0W1 in row 0 is out of order or repeated"),
        (0, "0I0", "0W0", "0W0 in row 0 is out of order"),
        (1, "1F0", "0F0", "0F0 in row 1 is out of order|0F0 stands in row 1, which does not hold that stage"),
        (1, "1F0", "1F7", "1F7 in row 1 is of no micro-batch: there are 4"),
        (0, "0F1", "0X1", "schedule action '0X1'"),
        (0, "0F0", "0F3 0F0", "0F3 in row 0 is out of order or repeated"),
        (0, "0F1", "0I0 0F1", "out of order or repeated"),
    ],
)
def test_an_edited_table_is_refused_with_the_reason(rank: int, old: str, new: str, reason: str) -> None:
    plan = PLANS["zb-h1"]
    assert old in plan.schedule_table[rank]
    with pytest.raises(InputError, match=f"schedule_table: cannot be executed: .*({reason})"):
        check_supported(with_table(plan, edited(plan.schedule_table, rank, old, new)))


def test_a_table_that_waits_for_itself_is_refused_and_says_where() -> None:
    table = (("0F0", "0B0", "0F1", "0B1"), ("1F0", "1F1", "1B0", "1B1"))
    with pytest.raises(InputError) as caught:
        check_supported(with_table(make_plan(LLAMA, Degrees(pp=2, num_micro_batches=2)), table))
    text = " ".join(str(caught.value).split())
    assert "rank 0 waits for ever at 0B0 for the backward of micro-batch 0 on stage 1" in text
    assert "rank 1 waits for ever at 1F1 for 0F1" in text


def test_every_legal_table_may_be_custom() -> None:
    """The custom plan's table is none of a named schedule, and is not refused."""
    plan = PLANS["custom"]
    kinds = {action.kind for row in parse_table(plan.schedule_table) for action in row}
    assert kinds == set(ActionKind)
    assert plan.schedule_table != print_table(build_table(Schedule.ONE_F_ONE_B, 2, 1, 4))
    check_supported(plan)

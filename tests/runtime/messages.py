"""The messages of one step: those that the ranks of a plan sent, those that the cost model charges for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from planner.cost.charged import COPIES, Message, charged_messages
from planner.plan import Plan
from planner.profile import Op
from planner.strategy import Zero
from runtime.comm_count import count_messages
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

AXES = ("cp", "tp", "dp_shard", "dp_replicate", "pp")


def expected_messages(plan: Plan) -> list[Counter[Message]]:
    """What each rank should send: what its stage is charged for, and what is left out of that."""
    degrees, charged = plan.strategy.degrees, charged_messages(plan)
    stages = [rank * degrees.pp // degrees.world for rank in range(degrees.world)]
    return [_named(plan, charged[stage]) + _beside(plan, stage) for stage in stages]


def _named(plan: Plan, charged: Counter[Message]) -> Counter[Message]:
    """Messages over a data axis that is nothing but the cp folded into it go by the name of cp, those between
    copies of the only key-value head by that of tp."""
    degrees = plan.strategy.degrees
    if plan.model.heads_copied(degrees.tp) == (1,):
        charged = Counter({m._replace(axis="tp") if m.axis == COPIES else m: n for m, n in charged.items()})
    axis, size = ("dp_shard", degrees.dp_shard) if degrees.zero else ("dp_replicate", degrees.dp_replicate)
    if degrees.cp == 1 or size > 1:
        return charged
    return Counter({m._replace(axis="cp") if m.axis == axis else m: n for m, n in charged.items()})


def _beside(plan: Plan, pp_rank: int) -> Counter[Message]:
    """What is sent and not charged for, since it is small: once a step, whatever the micro-batches.

    The loss and the squared gradient norm, 8 bytes each, over the world; and under sequence parallelism the
    gradients of norms, which each rank has of its slice, as one all-reduce over tp.
    """
    degrees, model = plan.strategy.degrees, plan.model
    folded = degrees.cp > 1 and degrees.cp * degrees.dp_shard * degrees.dp_replicate == degrees.world
    data = "dp_replicate" if degrees.zero is Zero.NONE else "dp_shard"
    whole = [axis for axis in AXES if getattr(degrees, axis) == degrees.world]
    found = Counter({Message(Op.ALL_REDUCE, (*whole, *[data] * folded, "world")[0], 16): 1})
    if degrees.tp > 1 and degrees.sequence_parallel:
        stages = [s for s in range(degrees.stages) if degrees.pp_rank_of_stage(s) == pp_rank]
        layers = sum(plan.strategy.stages[s].end - plan.strategy.stages[s].first for s in stages)
        norms = 2 * layers + (degrees.stages - 1 in stages)
        each = model.norm.params(model.hidden) / degrees.weight_shards
        found[Message(Op.ALL_REDUCE, "tp", round(4 * norms * each))] = 1
    return found


def sent_messages(plan: Plan) -> list[Counter[Message]]:
    """What each rank sent in a second step; the first one also sets things up."""

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        executor.step(slice_of(executor, batch_of(plan, 0)))
        tokens = slice_of(executor, batch_of(plan, 1))
        counted = count_messages(lambda: executor.step(tokens), executor.meshes)
        return [[*message, count] for message, count in counted.items()]

    return [
        Counter({Message(Op(op), axis, size): count for op, axis, size, count in rows})
        for rows in on_ranks(body, plan.strategy.degrees.world)
    ]

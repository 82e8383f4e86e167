"""The messages that the cost model charges a plan for, found by asking it.

The model is given communication of which one kind of message (an operation and its bytes) takes a second
and all else nothing; the seconds that a stage then takes are how often it is charged for that kind. So this
repeats no formula and cannot differ from what the estimate is made of.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from planner.cost.communication.collectives import FREE, CommCost, CommModel, Group
from planner.cost.constants import problem_time_constants
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.sharded_layers import SharedCosts
from planner.cost.stage.stage import LayoutModel
from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link
from planner.job.engine_settings import EngineSettings
from planner.job.problem import PlanningProblem
from planner.profile.profile import Op
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import ActionKind

COPIES = "copies"
"""The axis of tensor-parallel neighbours that have copies of the same key-value heads."""


class Message(NamedTuple):
    """A message of a rank: the operation, the mesh axis whose ranks take part, the bytes of all of it.

    Bytes are those of the whole tensor: of the gathered one, of the one to be scattered or summed.
    """

    op: Op
    axis: str
    bytes: int


class _OneKind(CommModel):
    """Communication of which one kind of message takes a second."""

    def __init__(self, problem: PlanningProblem) -> None:
        super().__init__(problem)
        self.asked: set[tuple[Op, float]] = set()
        self.one: tuple[Op, float] | None = None

    def cost(self, op: Op, size_bytes: float, group: Group) -> CommCost:
        if group.ranks == 1 or size_bytes <= 0:
            return FREE
        self.asked.add((op, size_bytes))
        return CommCost(seconds=float((op, size_bytes) == self.one), origin="datasheet")


def charged_messages(plan: Plan) -> tuple[Counter[Message], ...]:
    """What one step of each pipeline rank is charged for: how often for each message."""
    problem = _somewhere(plan)
    comms = _OneKind(problem)
    layers = LayerModel(problem, problem_time_constants(problem))

    def layout() -> LayoutModel:
        return LayoutModel(problem, plan.strategy.degrees, layers, comms, 1.0, SharedCosts())

    found: list[Counter[Message]] = [Counter() for _ in range(plan.strategy.degrees.pp)]
    first = layout()
    first.messages.p2p_s()
    for stage in plan.strategy.stages:
        first.stage(stage)
    for kind in sorted(comms.asked):
        comms.one = kind
        model = layout()
        for index, stage in enumerate(plan.strategy.stages):
            rank = plan.strategy.degrees.pp_rank_of_stage(index)
            cost, often = model.stage(stage), plan.strategy.degrees.num_micro_batches
            tp = often * (cost.forward.tp_s + cost.backward.tp_s)
            cp = often * (cost.forward.cp_s + cost.backward.cp_s)
            ep = often * (cost.forward.ep_s + cost.backward.ep_s)
            dp = often * (cost.forward.dp_s + cost.backward.dp_s) + cost.unshard_s + cost.reduce_s
            copies = cost.copied_s
            data = "dp_replicate" if kind[0] is Op.ALL_REDUCE else "dp_shard"
            for axis, count in (("tp", tp), ("cp", cp), ("ep", ep), (COPIES, copies), (data, dp - copies)):
                if count:
                    found[rank][Message(kind[0], axis, round(kind[1]))] += round(count)
        if model.messages.p2p_s():
            _add_sends(plan, round(kind[1]), found)
    return tuple(found)


def _add_sends(plan: Plan, size_bytes: int, found: list[Counter[Message]]) -> None:
    """A hop of hidden states forward, or of their gradient backward, where the next stage is elsewhere."""
    degrees = plan.strategy.degrees
    for rank, row in enumerate(plan.table):
        for action in row:
            to = action.stage + (1 if action.kind is ActionKind.FORWARD else -1)
            if 0 <= to < degrees.stages and degrees.pp_rank_of_stage(to) != rank:
                found[rank][Message(Op.P2P, "pp", size_bytes)] += 1


def _somewhere(plan: Plan) -> PlanningProblem:
    """The plan's problem on devices that overlap nothing, so that all that is charged for shows, and with
    routers that send as many tokens to every rank."""
    device = Device(
        name="any",
        title="a device",
        vendor="",
        memory_bytes=2**40,
        usable_memory_bytes=2**40,
        memory_bandwidth_bytes_per_s=1e12,
        peak_fp32_flops=1e13,
        peak_bf16_flops=1e13,
        peak_fp16_flops=1e13,
        link_bytes_per_s=None,
    )
    world = plan.strategy.degrees.world
    group = DeviceGroup(device=device, nodes=1, devices_per_node=world, slots_per_node=world)
    link = Link(name="any", latency_s=1e-6, bytes_per_s=1e9)
    return PlanningProblem(
        model=plan.model,
        workload=plan.workload,
        cluster=ClusterSpec(name="any", groups=(group,), intra=link, inter=link),
        profile=None,
        memory_limit_bytes=2**40,
        engine_settings=EngineSettings(balanced=True),
    )

"""Collectives as a family of the profiler, among processes of this machine or ranks that were launched."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from planner.foundation.decode import decode, encode
from planner.profile.profile import CommSample
from runtime.profiler.joint_world import END, JointWorld
from runtime.profiler.measure_comm import CommCase, comm_cases, measure_comm, measure_jointly
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.rank_groups import World
from runtime.profiler.subprocesses import ChildFailed
from runtime.profiler.timing import Effort


@dataclass(frozen=True)
class CommFamily:
    """Every collective over every layout of groups at several sizes. A single device has none."""

    world: World
    device_type: str
    sizes_bytes: tuple[int, ...]
    effort: Effort
    joint: JointWorld | None = None

    @property
    def name(self) -> str:
        nodes = self.world.ranks // self.world.per_node
        return f"collectives of {self.world.ranks} ranks" + (f" on {nodes} nodes" if nodes > 1 else "")

    def cases(self) -> Sequence[CommCase]:
        # Processes of one CPU have one memory between them, however far apart their ranks.
        strided = self.device_type == "cuda" or self.world.ranks > self.world.per_node
        return comm_cases(self.world, self.sizes_bytes, strided=strided)

    def together(self, case: CommCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[CommCase]) -> Iterator[Reading]:
        if self.joint is None:
            return readings(CommSample, measure_comm(cases, self.world, self.device_type, self.effort))
        order = {"device_type": self.device_type, "effort": encode(self.effort)}
        order["cases"] = [encode(case) for case in cases]
        number = self.joint.begin_round(json.dumps(order))
        messages = measure_jointly(cases, self.joint, number, self.device_type, self.effort)
        return readings(CommSample, messages)


def attend(joint: JointWorld) -> Iterator[str]:
    """Takes another rank's part in every round; yields what went wrong in each, or nothing."""
    while True:
        number, text = joint.await_round()
        if text == END:
            return
        order = json.loads(text)
        cases = [decode(CommCase, case, source="the first rank") for case in order["cases"]]
        effort = decode(Effort, order["effort"], source="the first rank")
        try:
            for _ in measure_jointly(cases, joint, number, order["device_type"], effort):
                pass
        except ChildFailed as failure:
            yield f"rank {joint.rank}: the process {failure}"
        else:
            yield ""

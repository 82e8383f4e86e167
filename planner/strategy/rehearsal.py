"""Rehearsal: what single ranks of a plan did when each was executed alone on one device."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.strategy.estimate import TimeBreakdown, Verdict


class RehearsalMode(StrEnum):
    """On what a rank was executed."""

    DEVICE = "device"
    """An accelerator: memory and time are measured."""
    PROCESSOR = "processor"
    """This machine's CPU, for which the plan was made: memory and time are measured."""
    FAKE_TENSORS = "fake tensors"
    """Shapes alone: the bytes of every allocation are traced, nothing is computed and no time measured."""


FORWARD_KINDS, BACKWARD_KINDS = "F", "BIW"
"""Kinds of passes: of backward ones, whole, or split into gradients of inputs and of weights."""


@frozen
class RehearsedPass:
    """The passes of one kind through one stage, a micro-batch each: median seconds, and how they spread.

    The first forward and the last backward of a step are left out, where there are others. Messages to other
    ranks take no time. `kind` is that of the action: F, B, I or W.
    """

    stage: int
    kind: str
    seconds: float
    spread: float
    samples: int


@frozen
class RankRehearsal:
    """One rank, alone. `alike` are the pipeline ranks that it stands for.

    `first_extra_s` is what the first forward pass of a step takes more than others, `last_extra_s` the last
    backward pass: gathering weights and reducing gradients once a step, without the messages. `update_s` are
    gradient sums and optimizer. `idle_share` is the part of the step in which the device waits for the host.

    `reference_s` is what a fixed piece of work took beside these times, where speeds drift (a CPU).

    `allocated_bytes` is the peak of live tensors in a step that finds the optimizer's state there,
    `start_bytes` what lives between steps; `reserved_bytes` what the allocator took and `device_bytes` what
    the driver shows. Times are None where nothing was timed. `ran_out` says where memory ran out, else "".
    """

    rank: int
    alike: tuple[int, ...]
    stages: tuple[int, ...]
    passes: tuple[RehearsedPass, ...] = ()
    first_extra_s: float | None = None
    last_extra_s: float | None = None
    update_s: float | None = None
    step_s: float | None = None
    idle_share: float | None = None
    reference_s: float | None = None
    allocated_bytes: int | None = None
    start_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    ran_out: str = ""
    compiled: bool = False
    wall_s: float = 0.0

    def passes_s(self, kinds: str, stage: int | None = None) -> float:
        """One micro-batch's passes of some kinds, through a stage or all of the rank's; 0: none was timed."""
        found = (each for each in self.passes if stage in (None, each.stage))
        return sum(each.seconds for each in found if each.kind in kinds)


@frozen
class Refined:
    """The plan's estimate with what was measured in place of what was modelled.

    `measured_share` is the part of a rank's time, without waiting, that was measured: messages are not.
    `peak_memory_bytes` is of the fullest of the rehearsed ranks, with what the model says of
    communicators, and of the allocator where nothing was reserved.
    """

    step_time_s: float
    step_time_interval_s: tuple[float, float]
    breakdown: TimeBreakdown
    measured_share: float
    peak_memory_bytes: int
    peak_memory_interval_bytes: tuple[int, int]
    memory_limit_bytes: int
    verdict: Verdict


@frozen
class RehearsedPlan:
    """A plan that was rehearsed beside the one that carries this, and what came of it."""

    label: str
    predicted_step_time_s: float
    refined: Refined


@frozen
class Rehearsal:
    """The rehearsed ranks of a plan and its refined prediction.

    `device` is what they ran on. `micro_batches` of a step were run: fewer than the plan's where as many are
    in flight. `complete` says that every kind of rank of the plan is among `ranks`. `others` are runners-up
    that were rehearsed too.
    """

    mode: RehearsalMode
    device: str
    created: str
    versions: dict[str, str]
    compiled: bool
    micro_batches: int
    ranks: tuple[RankRehearsal, ...]
    complete: bool
    refined: Refined | None
    remarks: tuple[str, ...] = ()
    others: tuple[RehearsedPlan, ...] = ()

    @property
    def ran_out(self) -> bool:
        """Whether a rank had too little memory."""
        return any(rank.ran_out for rank in self.ranks)


def is_refined_choice(better: Refined, than: Refined) -> bool:
    """Whether a refined plan is to be preferred: that fits more surely, then the faster one."""
    order = list(Verdict)
    a, b = order.index(better.verdict), order.index(than.verdict)
    if a != b:
        return a < b
    return better.step_time_s < than.step_time_s

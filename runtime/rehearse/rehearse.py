"""Rehearsal: one rank of a plan executed alone, by the code that trains it.

The process group is torch's fake one, of the plan's size: modules, shards, hooks, the schedule's actions,
what is recomputed and the optimizer's step are real, and messages are answered by nobody, with tensors of the
right shape. So memory and a rank's own time are those of the cluster's rank; the messages' time is modelled
(`planner.advice.apply_rehearsal`).

Each rank has a process of its own, so that one without enough memory ends alone. On an accelerator the
allocator is held to the plan's limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from planner.foundation.decode import decode, encode
from planner.hardware.local_machine import usable_cores
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, RehearsalMode, RehearsedPass
from planner.strategy.schedule.table import ActionKind, parse_action
from runtime.check.memory import CUDA_BLOCK_BYTES, LiveBytes, accelerator_kernels, fake_tensors, measure_peak
from runtime.launch.local_ranks import RunFailedError
from runtime.parallel.meshes import build_meshes, fake_group
from runtime.parallel.recompute import compiles
from runtime.profiler.layers import out_of_memory
from runtime.profiler.timing import ChildFailed, Emit, clock_of, reference_s, run_children, summarize
from runtime.train.executor import Executor
from runtime.train.optimizer import OptimizerOptions
from runtime.train.recorder import GRADIENT_SUMS, OPTIMIZER, Span

SILENCE_S = 900.0
"""A rank that says nothing for so long has failed: a step of a large stage on a CPU takes minutes."""

KILLED = "SIGKILL"
"""What a failure says where the system ended the process, for want of memory mostly."""


@dataclass(frozen=True, slots=True)
class RehearsalOptions:
    """How ranks are rehearsed.

    `steps` are timed; `room_bytes` is what the allocator may take (None: all). `compiled` None: as in
    training.
    """

    mode: RehearsalMode
    steps: int = 3
    compiled: bool | None = None
    room_bytes: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.mode is RehearsalMode.DEVICE else torch.device("cpu")


Asked = tuple[int, tuple[int, ...]]
"""A rank, and the pipeline ranks that do the same."""


def rehearse_rank(plan: Plan, rank: int, alike: tuple[int, ...], options: RehearsalOptions) -> RankRehearsal:
    """What rank `rank` of the plan does alone, in a process of its own.

    Too little memory is part of the answer. Raises RunFailedError where the process ended otherwise.
    """
    try:
        (found,) = _side_by_side(plan, [(rank, alike)], options)
    except ChildFailed as failure:
        if KILLED not in str(failure):
            raise RunFailedError(f"rank {rank} could not be rehearsed: {failure}") from failure
        found = dataclasses.replace(_asked(plan, rank, alike), ran_out="the system ended the process")
    return found


def _asked(plan: Plan, rank: int, alike: tuple[int, ...]) -> RankRehearsal:
    """A rank of which nothing is known yet."""
    degrees = plan.strategy.degrees
    held = degrees.stages_of_pp_rank(degrees.pp_rank_of_rank(rank))
    return RankRehearsal(rank=rank, alike=alike, stages=held)


def _side_by_side(plan: Plan, ranks: Sequence[Asked], options: RehearsalOptions) -> list[RankRehearsal]:
    """What some ranks do, each in a process of its own, at the same time. Raises ChildFailed if one fails."""
    begun_s = time.monotonic()

    def body(place: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        found, where = _asked(plan, *ranks[place]), "building the stages"
        try:
            with ExitStack() as stack:
                run = _Rank(plan, found.rank, options, stack)
                where = "running a step"
                found = run.rehearsed(found)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            found = dataclasses.replace(found, ran_out=where)
        emit(encode(dataclasses.replace(found, wall_s=time.monotonic() - begun_s)))

    messages = run_children(body, len(ranks), silence_s=SILENCE_S)
    found = [decode(RankRehearsal, message, source="a rehearsing process") for message in messages]
    order = [rank for rank, _ in ranks]
    return sorted(found, key=lambda each: order.index(each.rank))


class _Rank:
    """One rank in this process: its executor and tokens, and what is measured of its steps."""

    def __init__(self, plan: Plan, rank: int, options: RehearsalOptions, stack: ExitStack) -> None:
        self.options, self.device = options, options.device
        self.live: LiveBytes | None = None
        fake = options.mode is RehearsalMode.FAKE_TENSORS
        self.compiled = not fake and compiles(options.compiled, self.device)
        degrees = plan.strategy.degrees
        if options.mode is RehearsalMode.DEVICE:
            _hold_to(options.room_bytes, self.device)
        stack.enter_context(fake_group(degrees.world, rank))
        meshes = build_meshes(plan, self.device.type)
        if fake:
            accelerated = all(group.device.name != "cpu" for group in plan.cluster.groups)
            self.live = stack.enter_context(fake_tensors(CUDA_BLOCK_BYTES if accelerated else 1))
            if accelerated:
                stack.enter_context(accelerator_kernels())
        self.executor = Executor(
            plan,
            device=self.device,
            seed=0,
            optimizer_options=OptimizerOptions(),
            compiled=self.compiled,
            meshes=meshes,
        )
        shape = (plan.workload.batch // degrees.dp, plan.workload.seq + 1)
        self.tokens = torch.randint(plan.model.vocab, shape, device=self.device)

    def step(self) -> None:
        """One step; the next one finds the optimizer's state there."""
        self.executor.step(self.tokens)

    def rehearsed(self, found: RankRehearsal) -> RankRehearsal:
        """Memory of the second step, times of those after it."""
        found = dataclasses.replace(found, compiled=self.compiled)
        self.step()
        if self.live is not None:
            start_bytes = self.live.begin()
            self.step()
            return dataclasses.replace(found, start_bytes=start_bytes, allocated_bytes=self.live.peak_bytes)
        peak = measure_peak(self.step, self.device)
        found = dataclasses.replace(
            found,
            start_bytes=peak.start_bytes,
            allocated_bytes=peak.allocated_bytes,
            reserved_bytes=peak.reserved_bytes,
            device_bytes=peak.device_used_bytes,
        )
        beside = [reference_s()] if self.device.type == "cpu" else []
        steps = [self._timed() for _ in range(self.options.steps)]
        beside += [reference_s()] if self.device.type == "cpu" else []
        return dataclasses.replace(
            found,
            idle_share=self._idle_share(),
            reference_s=statistics.fmean(beside) if beside else None,
            **_times(steps),
        )

    def _timed(self) -> tuple[float, list[Span]]:
        """Seconds of a step on this rank, and its spans."""
        clock = DeviceClock(self.device) if self.device.type == "cuda" else clock_of(self.device)
        record = self.executor.pipeline.record
        record.clock = clock
        begin = clock()
        self.step()
        end = clock()
        record.clock = None
        spans = list(record.spans)
        if isinstance(clock, DeviceClock):
            spans = [(name, clock.seconds(a), clock.seconds(b)) for name, a, b in spans]
            begin, end = clock.seconds(begin), clock.seconds(end)
        return end - begin, spans

    def _idle_share(self) -> float | None:
        """The part of a step in which an accelerator runs no kernel: it waits for the host."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            self.step()
            torch.cuda.synchronize(self.device)
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type is DeviceType.CUDA
        ]
        return idle_share(kernels)


class DeviceClock:
    """Marks on an accelerator's own time line, which the host does not wait for.

    A call sets a mark and returns its number; `seconds` tells when it was reached, once all is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def __call__(self) -> float:
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        self._marks.append(mark)
        return float(len(self._marks) - 1)

    def seconds(self, number: float) -> float:
        """Seconds from the first mark to one."""
        torch.cuda.synchronize(self._device)
        passed_ms: float = self._marks[0].elapsed_time(self._marks[int(number)])
        return passed_ms / 1e3


def idle_share(kernels: list[tuple[float, float]]) -> float | None:
    """The part of the time from the first kernel's begin to the last one's end in which none runs.

    Kernels are (begin, end) of any streams; None where there is none.
    """
    if not kernels:
        return None
    busy, reached = 0.0, min(begin for begin, _ in kernels)
    first = reached
    for begin, end in sorted(kernels):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1.0 - busy / (reached - first) if reached > first else None


def _hold_to(room_bytes: int | None, device: torch.device) -> None:
    """Has the allocator give out no more than so many bytes."""
    if room_bytes is not None:
        _, total_bytes = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, room_bytes / total_bytes), device)


def _times(steps: list[tuple[float, list[Span]]]) -> dict[str, Any]:
    """The times of a RankRehearsal, from the spans of some steps of one rank."""
    passes: dict[tuple[int, ActionKind], list[list[float]]] = {}
    updates = []
    for _, spans in steps:
        own: dict[tuple[int, ActionKind], list[float]] = {}
        for name, begin, end in spans:
            if name not in (GRADIENT_SUMS, OPTIMIZER):
                action = parse_action(name)
                own.setdefault((action.stage, action.kind), []).append(end - begin)
        for key, seconds in own.items():
            passes.setdefault(key, []).append(seconds)
        updates.append(sum(end - begin for name, begin, end in spans if name in (GRADIENT_SUMS, OPTIMIZER)))
    told = {key: _told(*key, each) for key, each in passes.items()}
    return {
        "passes": tuple(rehearsed for rehearsed, _ in told.values()),
        "first_extra_s": sum(extra for (_, kind), (_, extra) in told.items() if kind is ActionKind.FORWARD),
        "last_extra_s": sum(
            extra for (_, kind), (_, extra) in told.items() if kind is not ActionKind.FORWARD
        ),
        "update_s": statistics.median(updates),
        "step_s": statistics.median(seconds for seconds, _ in steps),
    }


def _told(stage: int, kind: ActionKind, steps: list[list[float]]) -> tuple[RehearsedPass, float]:
    """The usual pass of a stage, and the median of what a step's unusual one takes more.

    Unusual are the first forward pass, before which weights may have to be gathered, and the last of others,
    after which gradients may have to be reduced. A single micro-batch's pass is both: nothing is told apart.
    """
    forward = kind is ActionKind.FORWARD
    if len(steps[0]) < 2:
        usual = [seconds[0] for seconds in steps]
        extra_s = 0.0
    else:
        usual = [s for seconds in steps for s in (seconds[1:] if forward else seconds[:-1])]
        middle = statistics.median(usual)
        extra_s = statistics.median((seconds[0] if forward else seconds[-1]) - middle for seconds in steps)
    timing = summarize(usual)
    rehearsed = RehearsedPass(
        stage=stage,
        kind=str(kind),
        seconds=timing.median_s,
        spread=timing.spread,
        samples=timing.samples,
    )
    return rehearsed, max(extra_s, 0.0)


Progress = Callable[[str], None]


def rehearse_ranks(
    plan: Plan, ranks: list[Asked], options: RehearsalOptions, progress: Progress
) -> Iterator[RankRehearsal]:
    """Rehearses ranks one after another; on shapes alone, where nothing is timed, a rank for each core."""
    at_once = usable_cores() if options.mode is RehearsalMode.FAKE_TENSORS else 1
    for first in range(0, len(ranks), at_once):
        batch = ranks[first : first + at_once]
        names = " and ".join(f"rank {rank}" for rank, _ in batch)
        progress(f"{names} ({first + len(batch)} of {len(ranks)})")
        yield from _batch(plan, batch, options)


def _batch(plan: Plan, ranks: Sequence[Asked], options: RehearsalOptions) -> Iterable[RankRehearsal]:
    """Some ranks at the same time, or one by one where they fail together: each then says what its own is."""
    if len(ranks) > 1:
        with contextlib.suppress(ChildFailed):
            return _side_by_side(plan, ranks, options)
    return (rehearse_rank(plan, rank, alike, options) for rank, alike in ranks)

"""Collectives and point-to-point messages over the real backend, at several sizes.

Groups are those of `runtime.profiler.joint_world`. Inside a node all groups of one size are measured twice:
one alone (the
other ranks wait, idle), and every group of the world at once, because groups on one machine share its cores,
memory and links.

Calls follow one another in bursts, and a sample is a burst's time over its calls, on the first rank: the
collectives synchronise their ranks themselves, and where ranks share cores the slow calls are as much a
part of a step as the quick ones. A message of p2p is half a round trip. Tensors are fp32.

Where ranks share cores (a CPU), each call follows a piece of compute, as it does in training, and the time
of as much compute alone is taken off: waiting for a rank that the others keep from a core is most of what
a small collective costs there. On 2 cores, an all-reduce of 4 KiB over 4 ranks took 5.6 ms on idle ranks and
8 to 10 ms between products.

Collectives as a family of the profiler, among processes of this machine or ranks that were launched.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from planner.foundation.decode import decode, encode
from planner.foundation.frozen import frozen
from planner.profile.profile import CommSample, Op
from runtime.profiler.joint_world import END, JointWorld, Layout, World, layouts, ops, sizes_of
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.timing import ChildFailed, Effort, Emit, run_children, summarize, synchronize

SIZES_BYTES = (4096, 65536, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)
"""4 KiB to 1 GiB: beyond it a message is in its bandwidth."""

CPU_LARGEST_BYTES = 1 << 24
"""The largest message between processes of a CPU unless a larger one is asked for: one of 1 GiB takes seconds
there, and models that a CPU trains send none."""
_TIMEOUT = timedelta(seconds=60)
_BURST_S = 4e-3
_BURST_CALLS = 16
_WORK_PRODUCTS, _WORK_DIM = 12, 256
"""The compute before a call: about 5 ms of a core, as much as lies between the messages of a block."""


@frozen
class CommCase:
    """One sample to take: an operation over a layout with a full message of `bytes`."""

    op: Op
    layout: Layout
    bytes: int

    def label(self) -> str:
        """A short name for progress and messages."""
        return f"{self.op} of {self.bytes} bytes over {self.layout.label()}"


def comm_cases(world: World, sizes_bytes: tuple[int, ...], *, strided: bool) -> list[CommCase]:
    """All cases of a world, those of one layout together."""
    return [
        CommCase(op=op, layout=layout, bytes=size_bytes)
        for layout in layouts(world, strided=strided)
        for op in ops(layout)
        for size_bytes in sizes_of(op, layout, sizes_bytes)
    ]


class Place(NamedTuple):
    """One rank in a world of `world.ranks`, and where they meet."""

    rank: int
    device: torch.device
    world: World
    store: Store


def measure_comm(
    cases: Sequence[CommCase], world: World, device_type: str, effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yields the CommSample (encoded) of each case, in a world of processes on this machine."""
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:

        def body(rank: int, emit: Emit) -> None:
            store = FileStore(f"{folder}/store", world.ranks)
            _measure(cases, Place(rank, _device(device_type, rank), world, store), effort, emit)

        yield from _samples(run_children(body, world.ranks))


def measure_jointly(
    cases: Sequence[CommCase], joint: JointWorld, number: int, device_type: str, effort: Effort
) -> Iterator[dict[str, Any]]:
    """The same by ranks that a launcher started, each of which calls this; the first rank's has samples."""

    def body(_: int, emit: Emit) -> None:
        device = _device(device_type, joint.local_rank)
        store = joint.group_store(number)
        _measure(cases, Place(joint.rank, device, joint.world, store), effort, emit)

    yield from _samples(run_children(body))


def _samples(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those of the first rank; of others come signs of life."""
    return (message for message in messages if message)


def _device(device_type: str, local_rank: int) -> torch.device:
    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")


def _measure(cases: Sequence[CommCase], place: Place, effort: Effort, emit: Emit) -> None:
    """One rank's part in all cases."""
    torch.set_num_threads(1)
    rank, device, world, store = place
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world.ranks, timeout=_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    for layout, group in itertools.groupby(cases, key=lambda case: case.layout):
        mine = _own_group(layout, rank, world)
        for case in group:
            sample = _sample(case.op, layout, case.bytes, mine, control, device, effort)
            emit(encode(sample) if rank == 0 else {})
        if mine is not None:
            dist.destroy_process_group(mine)  # NCCL keeps buffers on the device for each
    dist.barrier(control)
    dist.destroy_process_group()


def _own_group(layout: Layout, rank: int, world: World) -> dist.ProcessGroup | None:
    """Makes the groups of a layout, as all ranks must; this rank's, None where it is in none."""
    mine = None
    for members in layout.members(world):
        group = dist.new_group(members, timeout=_TIMEOUT)
        mine = group if rank in members else mine  # others get a placeholder
    return mine


def _sample(
    op: Op,
    layout: Layout,
    size_bytes: int,
    group: dist.ProcessGroup | None,
    control: dist.ProcessGroup,
    device: torch.device,
    effort: Effort,
) -> CommSample:
    """One sample; ranks outside the active groups only keep the step with the others."""
    call = None if group is None else _call(op, size_bytes, group, device)
    if device.type == "cpu" and op is not Op.P2P:
        return _sample_between_work(op, layout, size_bytes, call, control, effort)
    dist.barrier(control)
    trial = _run(call, bursts=effort.warmup + 2, calls=1, device=device)
    counts = torch.tensor(_counts(trial[-1] if trial else 0.0, effort))
    dist.broadcast(counts, src=0, group=control)  # every rank must run as often as rank 0
    bursts, calls = (int(count) for count in counts)
    seconds = _run(call, bursts, calls, device)
    dist.barrier(control)
    halves = 2 if op is Op.P2P else 1
    return _summed_up(op, layout, size_bytes, [taken / halves for taken in seconds])


def _sample_between_work(
    op: Op,
    layout: Layout,
    size_bytes: int,
    call: Callable[[], object] | None,
    control: dist.ProcessGroup,
    effort: Effort,
) -> CommSample:
    """What a call adds to a piece of compute that all active ranks do before it; no less than it takes alone.

    What others do on the machine may make the compute alone seem as slow as with the call.
    """
    factor = torch.randn(_WORK_DIM, _WORK_DIM)
    added: list[float] = []
    dist.barrier(control)
    if call is not None:
        call()
        least_s = min(_run(call, bursts=2, calls=1, device=torch.device("cpu")))
        # Every rank runs as often: the number must not depend on a rank's own clock.
        for _ in range(effort.least * 2):
            work_s = _paired_s(lambda: None, factor)
            added.append(max(_paired_s(call, factor) - work_s, least_s))
    dist.barrier(control)
    return _summed_up(op, layout, size_bytes, added)


def _summed_up(op: Op, layout: Layout, size_bytes: int, seconds: Sequence[float]) -> CommSample:
    """The sample of some calls; of none for a rank outside the active groups, whose sample nobody reads."""
    timing = summarize(seconds or [0.0])
    return CommSample(
        op=op,
        ranks=layout.ranks,
        groups=layout.groups,
        nodes=layout.nodes,
        stride=layout.stride,
        bytes=size_bytes,
        seconds=timing.median_s,
        spread=timing.spread,
        samples=timing.samples,
    )


def _paired_s(call: Callable[[], object], factor: torch.Tensor, times: int = 2) -> float:
    """Mean seconds of a piece of compute with a call after it."""
    begun = time.perf_counter()
    for _ in range(times):
        for _ in range(_WORK_PRODUCTS):
            factor @ factor
        call()
    return (time.perf_counter() - begun) / times


def _counts(one_s: float, effort: Effort) -> tuple[int, int]:
    """Bursts, and calls in each."""
    calls = max(1, min(_BURST_CALLS, int(_BURST_S / max(one_s, 1e-9))))
    bursts = int(effort.budget_s / max(one_s * calls, 1e-9))
    return max(effort.least, min(effort.most, bursts)), calls


def _run(call: Callable[[], object] | None, bursts: int, calls: int, device: torch.device) -> list[float]:
    """Seconds of one call, for each burst."""
    if call is None:
        return []
    seconds = []
    before = time.perf_counter()
    for _ in range(bursts):
        for _ in range(calls):
            call()
        synchronize(device)
        now = time.perf_counter()
        seconds.append((now - before) / calls)
        before = now
    return seconds


def _call(op: Op, size_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], object]:
    """The operation over `group` with a full message of `size_bytes`."""
    ranks = dist.get_world_size(group)
    full = torch.zeros(size_bytes // 4, device=device)
    shard = torch.zeros(size_bytes // 4 // ranks, device=device)
    # torch 2.13 renamed these and warns about the old names, which alone exist in 2.11.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    match op:
        case Op.ALL_REDUCE:
            return lambda: dist.all_reduce(full, group=group)
        case Op.ALL_GATHER:
            return lambda: gather(full, shard, group=group)
        case Op.REDUCE_SCATTER:
            return lambda: scatter(shard, full, group=group)
        case Op.ALL_TO_ALL:
            received = torch.zeros_like(full)
            return lambda: dist.all_to_all_single(received, full, group=group)
        case Op.P2P:
            return _ping_pong(full, group)


def _ping_pong(message: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """Sends the message to the other rank of a pair and gets it back."""
    first = dist.get_rank(group) == 0
    peer = dist.get_global_rank(group, 1 if first else 0)

    def call() -> None:
        if first:
            dist.send(message, peer, group=group)
            dist.recv(message, peer, group=group)
        else:
            dist.recv(message, peer, group=group)
            dist.send(message, peer, group=group)

    return call


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

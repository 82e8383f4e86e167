"""`plan profile`: measures layers, collectives, host and memory of this machine into a Profile.

What is measured is a list of families (`families_of`), each in processes of its own (`children`); the
scheduler chooses the cases, and this process only gathers what they report.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

from planner.hardware.cluster import ClusterSpec, Device
from planner.hardware.local_machine import ClockWatch, driver_version, usable_cores
from planner.model.spec import ModelSpec
from planner.model.workload import Precision
from planner.profile.merge import MORE_CASES, NO_TIME, Platform, Sample, by_field
from planner.profile.profile import PROFILE_SCHEMA, Profile
from runtime.profiler.collectives import CommFamily
from runtime.profiler.host import CommunicatorFamily, ContentionFamily, HostFamily
from runtime.profiler.joint_world import JointWorld, World
from runtime.profiler.layer_family import LayerFamily
from runtime.profiler.operators import rate_families
from runtime.profiler.profile_cases import Family, Reading
from runtime.profiler.scheduler import Record, Scheduler
from runtime.profiler.scope import Scope, Sweeps

MOST_NAMED = 10
"""Cases that a profile without time names one by one."""


class Progress(Protocol):
    """Who is told how far the profile is."""

    def step(self, text: str) -> None:
        """One more sample is there: this one."""

    def ahead(self, cases: int, left_s: float | None) -> None:
        """At most so many cases are left, and about so many seconds (None: unknown yet)."""

    def say(self, text: str) -> None:
        """A remark, such as a sample that had to be skipped."""


def take_profile(
    models: Sequence[ModelSpec],
    cluster: ClusterSpec,
    precision: Precision,
    scope: Scope,
    progress: Progress,
    record: Record | None = None,
    joint: JointWorld | None = None,
) -> Profile:
    """Measures this machine, which `cluster` describes. A sample that fails is skipped and named.

    Widths that do not divide a model are left out. Each reading goes to `record` as it comes, and what that
    has already is not taken again. With `joint`, this is its first rank, and the others attend.
    """
    watch = ClockWatch(cluster.devices if _on_cuda(cluster) else 0)
    gathering = _Gathering(progress, record, watch)
    families = families_of(models, cluster, precision, scope, joint)
    done = {family: dict(cases) for family, cases in record.readings.items()} if record else {}
    scheduler = Scheduler(families, scope.target, scope.time_limit_s, gathering, done)
    with watch:
        complete = scheduler.run()
    if not complete:
        gathering.skip_rest(scheduler)
    elif record:
        record.whole = True
    if cluster.devices == 1 and joint is None:
        gathering.skip("collectives: one device has nobody to talk to")
    if scope.sweeps is not Sweeps.NONE and not _on_cuda(cluster):
        gathering.skip("copies to and from a device, and what overlaps them: a CPU has one memory")
    group, platform = cluster.groups[0], platform_here(cluster, precision)
    names = "+".join(model.name for model in models)
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name=f"{cluster.name} {names} seq {'+'.join(map(str, scope.seqs))} {precision}",
        device=platform.device,
        device_title=platform.device_title,
        backend=platform.backend,
        created=now_text(),
        versions=stack_versions(on_cuda=_on_cuda(cluster)),
        devices_per_node=group.devices_per_node,
        slots_per_node=group.slots_per_node,
        **by_field(gathering.samples),
        cores=usable_cores(),
        skipped=tuple(gathering.skipped),
        precision=precision,
        fits=tuple(course.fit() for course in scheduler.courses),
        clocks=watch.clocks(),
    )


def platform_here(cluster: ClusterSpec, precision: Precision) -> Platform:
    """What times that are measured on this machine depend on."""
    device = cluster.groups[0].device
    return Platform(
        device=device.name,
        device_title=device.title,
        backend="nccl" if _on_cuda(cluster) else "gloo",
        torch=stack_versions()["torch"],
        precision=precision,
    )


def families_of(
    models: Sequence[ModelSpec],
    cluster: ClusterSpec,
    precision: Precision,
    scope: Scope,
    joint: JointWorld | None = None,
) -> list[Family[Any]]:
    """What is measured, in this order: first what every prediction needs, last what there is most of."""
    on_cuda = _on_cuda(cluster)
    device_type = "cuda" if on_cuda else "cpu"
    window_s, device = scope.contention_window_s, cluster.groups[0].device
    cores = cluster.groups[0].slots_per_node or usable_cores()
    world = joint.world if joint else World(ranks=cluster.devices, per_node=cluster.devices)
    return [
        HostFamily(device_type, precision, scope.host_effort),
        CommunicatorFamily(cluster.devices, on_cuda and joint is None),
        ContentionFamily(models[0], scope.seqs[0], cluster.devices, cores, precision, window_s, on_cuda),
        CommFamily(world, device_type, scope.sizes_bytes, scope.comm_effort, joint),
        *_layer_families(models, device, device_type, precision, scope),
        *rate_families(device_type, precision, scope.sweep_effort, scope.sweeps),
    ]


def _layer_families(
    models: Sequence[ModelSpec], device: Device, device_type: str, precision: Precision, scope: Scope
) -> list[LayerFamily]:
    """The layers of each model; those in bf16 then in fp8 too, where device and sizes allow."""
    families = [LayerFamily(model, precision, device_type, device, scope) for model in models]
    if precision is Precision.BF16 and device.peak_fp8_flops is not None:
        beside = (LayerFamily(model, Precision.FP8, device_type, device, scope) for model in models)
        families += [family for family in beside if family.cases()]
    return families


def _on_cuda(cluster: ClusterSpec) -> bool:
    return cluster.groups[0].device.name != "cpu"


def stack_versions(*, on_cuda: bool = False) -> dict[str, str]:
    """Versions of what takes part in a measurement, of CUDA's libraries and driver where they do."""
    import torch

    try:
        own = metadata.version("shardwise")
    except metadata.PackageNotFoundError:
        own = "source tree"
    versions = {"shardwise": own, "torch": torch.__version__, "python": platform.python_version()}
    if on_cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        versions |= {"cuda": torch.version.cuda or "", "nccl": nccl, "driver": driver_version() or ""}
    return versions


class _Gathering:
    """What was taken and what was skipped, earlier and now; passes it on to who watches."""

    def __init__(self, progress: Progress, record: Record | None, watch: ClockWatch) -> None:
        self.progress, self.record, self.watch = progress, record, watch
        self.samples: list[Sample] = []
        self.skipped: list[str] = []
        for family, cases in (record.readings if record else {}).items():
            for case, reading in cases.items():
                self._take(family, case, reading)

    def settled(self, family: str, case: str, reading: Reading) -> None:
        self.watch.read()
        dated = reading.dated(now_text())
        if self.record:
            self.record.add(family, case, dated)
        self._take(family, case, dated)
        if reading.skipped:
            self.progress.say(f"skipped: {self.skipped[-1]}")
        else:
            self.progress.step(case)

    def ahead(self, cases: int, left_s: float | None) -> None:
        self.progress.ahead(cases, left_s)

    def skip_rest(self, scheduler: Scheduler) -> None:
        """Says what the time was too short for: seeds by name, and what is not known to the target."""
        unsettled = scheduler.unsettled()
        for text in unsettled[:MOST_NAMED]:
            self.skip(f"{text}: {NO_TIME}")
        if len(unsettled) > MOST_NAMED:
            self.skip(f"{len(unsettled) - MOST_NAMED} {MORE_CASES}{NO_TIME}")
        for fit in (course.fit() for course in scheduler.courses):
            if fit.error is not None and fit.error > scheduler.target:
                error = f"{fit.error:.1%}, not {scheduler.target:.1%}"
                self.progress.say(f"{fit.family}: {NO_TIME}, known to {error}")

    def skip(self, text: str) -> None:
        """Notes what was not measured for a reason of its own."""
        self.skipped.append(text)
        self.progress.say(f"skipped: {text}")

    def _take(self, family: str, case: str, reading: Reading) -> None:
        self.samples += reading.samples
        if reading.skipped:
            self.skipped.append(f"{family}: {case}: {reading.skipped.removeprefix(f'{case}: ')}")


def now_text() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

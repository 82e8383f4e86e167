"""`plan profile`: measures layers, collectives, host and memory of this machine into a Profile.

The families run one after another, each in processes of its own (`children`), and this process only
gathers what they report. Nothing is written here: a profile exists once all of it was measured.
"""

from __future__ import annotations

import datetime
import itertools
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

from planner.cluster import ClusterSpec
from planner.codec import noun
from planner.errors import InputError, Problem
from planner.machine import usable_cores
from planner.model import ModelSpec
from planner.profile import PROFILE_SCHEMA, Profile
from planner.profile_merge import Sample, by_field
from planner.workload import Precision
from runtime.children import ChildFailed
from runtime.comm_family import CommFamily
from runtime.families import Case, Family, Reading
from runtime.host_families import ContentionFamily, HostFamily
from runtime.layer_family import LayerFamily
from runtime.measure_comm import QUICK_SIZES_BYTES, SIZES_BYTES
from runtime.measure_layers import divides
from runtime.timing import Effort

FAILURES = 3
"""Processes that fail one after another at their first case: the rest would fail as they did."""


class Progress(Protocol):
    """Who is told how far the profile is."""

    def begin(self, total: int) -> None:
        """`total` steps will follow."""

    def step(self, text: str) -> None:
        """One more is done: this one."""

    def say(self, text: str) -> None:
        """A remark, such as a sample that had to be skipped."""


@noun
class Scope:
    """How much is measured: the shard widths, micro-batches and message sizes, and how often each."""

    widths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    layer_effort: Effort
    comm_effort: Effort
    host_effort: Effort
    contention_window_s: float


def default_scope(
    devices: int,
    *,
    quick: bool,
    widths: Sequence[int] | None = None,
    micro_batches: Sequence[int] | None = None,
) -> Scope:
    """The usual scope for a world of `devices`: widths are powers of two within it."""
    powers = tuple(1 << step for step in range(devices.bit_length()) if 1 << step <= devices)
    once = Effort(warmup=1, least=2, most=4, budget_s=0.01)
    return Scope(
        widths=tuple(widths or powers),
        micro_batches=tuple(micro_batches or ((1, 2) if quick else (1, 2, 4, 8))),
        sizes_bytes=QUICK_SIZES_BYTES if quick else SIZES_BYTES,
        layer_effort=once if quick else Effort(warmup=1, least=3, most=30, budget_s=0.10),
        comm_effort=once if quick else Effort(warmup=2, least=3, most=40, budget_s=0.08),
        host_effort=once if quick else Effort(warmup=2, least=7, most=40, budget_s=0.15),
        contention_window_s=0.1 if quick else 0.5,
    )


def take_profile(
    model: ModelSpec,
    cluster: ClusterSpec,
    seq: int,
    precision: Precision,
    scope: Scope,
    progress: Progress,
) -> Profile:
    """Measures this machine, which `cluster` describes. A sample that fails is skipped and named.

    Widths that do not divide the model are left out.
    """
    families = families_of(model, cluster, seq, precision, scope)
    run = _Run(progress)
    progress.begin(sum(len(family.cases()) for family in families))
    for family in families:
        run.measure(family)
    if cluster.devices == 1:
        run.skip("collectives: one device has nobody to talk to")
    group = cluster.groups[0]
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name=f"{cluster.name} {model.name} seq {seq} {precision}",
        device=group.device.name,
        device_title=group.device.title,
        backend="nccl" if _on_cuda(cluster) else "gloo",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        devices_per_node=group.devices_per_node,
        slots_per_node=group.slots_per_node,
        **by_field(run.samples),
        cores=usable_cores(),
        skipped=tuple(run.skipped),
    )


def families_of(
    model: ModelSpec, cluster: ClusterSpec, seq: int, precision: Precision, scope: Scope
) -> list[Family[Any]]:
    """What is measured, in this order."""
    on_cuda = _on_cuda(cluster)
    device_type = "cuda" if on_cuda else "cpu"
    return [
        LayerFamily(
            model, seq, precision, device_type, scope.widths, scope.micro_batches, scope.layer_effort
        ),
        HostFamily(device_type, precision, scope.host_effort),
        ContentionFamily(model, seq, cluster.devices, precision, scope.contention_window_s, on_cuda),
        CommFamily(cluster.devices, device_type, scope.sizes_bytes, scope.comm_effort),
    ]


def _on_cuda(cluster: ClusterSpec) -> bool:
    return cluster.groups[0].device.name != "cpu"


def check_widths(model: ModelSpec, widths: Sequence[int]) -> None:
    """Raises InputError with every width asked for that the model's sizes cannot be split by."""
    legal = ", ".join(str(tp) for tp in range(1, 65) if divides(model, tp))
    problems = [
        Problem(where="--tp", fault=f"{tp} does not divide {model.name} into equal shards.", legal=legal)
        for tp in widths
        if not divides(model, tp)
    ]
    if problems:
        raise InputError(*problems)


def _versions() -> dict[str, str]:
    import torch

    try:
        own = metadata.version("shardwise")
    except metadata.PackageNotFoundError:
        own = "source tree"
    return {"shardwise": own, "torch": torch.__version__, "python": platform.python_version()}


class _Run:
    """One profile on its way: who watches, what was taken and what was skipped."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.samples: list[Sample] = []
        self.skipped: list[str] = []

    def measure(self, family: Family[Any]) -> None:
        """Every case of a family, those of one `together` in one process."""
        for _, alike in itertools.groupby(family.cases(), key=family.together):
            cases, failures = list(alike), 0
            while cases:
                settled, failed = self._some(family, cases)
                failures = failures + 1 if failed and settled == 1 else int(failed)
                cases = cases[settled:]
                if cases and failures == FAILURES:
                    self.skip(
                        f"{cases[0].label()} and {len(cases) - 1} more like it: {FAILURES} in a row failed"
                    )
                    break

    def _some(self, family: Family[Any], cases: Sequence[Case]) -> tuple[int, bool]:
        """Measures cases in one process until it ends.

        How many are settled, measured or skipped, and whether it failed, which costs the case it was at.
        """
        settled = 0
        try:
            for case, reading in zip(cases, family.measure(cases), strict=False):
                self._take(case, reading)
                settled += 1
        except ChildFailed as failure:
            self.skip(f"{cases[settled].label()}: the process {failure}")
            return settled + 1, True
        if settled < len(cases):
            self.skip(f"{cases[settled].label()}: the process reported nothing")
            return settled + 1, True
        return settled, False

    def _take(self, case: Case, reading: Reading) -> None:
        if reading.skipped:
            self.skip(reading.skipped)
        else:
            self.samples += reading.samples
            self.progress.step(case.label())

    def skip(self, text: str) -> None:
        self.skipped.append(text)
        self.progress.say(f"skipped: {text}")

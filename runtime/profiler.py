"""`plan profile`: measures layers, collectives, host and memory of this machine into a Profile.

The families run one after another, each in processes of its own (`children`), and this process only
gathers what they report. Nothing is written here: a profile exists once all of it was measured.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, Protocol, TypeVar

from planner.cluster import ClusterSpec
from planner.codec import decode, noun
from planner.errors import InputError, Problem
from planner.machine import usable_cores
from planner.model import ModelSpec
from planner.profile import (
    PROFILE_SCHEMA,
    CommSample,
    Constant,
    ContentionSample,
    LayerSample,
    Profile,
)
from planner.workload import Precision
from runtime.children import ChildFailed
from runtime.measure_comm import QUICK_SIZES_BYTES, SIZES_BYTES, count_samples, measure_comm
from runtime.measure_host import HOST_CONSTANTS, measure_contention, measure_host
from runtime.measure_layers import LayerCase, divides, layer_cases, measure_layers
from runtime.timing import Effort

Sample = TypeVar("Sample")


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
    run = _Run(model, cluster, seq, precision, scope, progress)
    progress.begin(run.total())
    layers = run.layers()
    constants = run.constants()
    contention = run.contention()
    comms = run.comms()
    group = cluster.groups[0]
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name=f"{cluster.name} {model.name} seq {seq} {precision}",
        device=group.device.name,
        device_title=group.device.title,
        backend="nccl" if run.on_cuda else "gloo",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        devices_per_node=group.devices_per_node,
        slots_per_node=group.slots_per_node,
        layers=tuple(layers),
        comms=tuple(comms),
        contention=tuple(contention),
        constants=tuple(constants),
        cores=usable_cores(),
        skipped=tuple(run.skipped),
    )


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
    """One profile on its way: the inputs, who watches, and what was skipped."""

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        seq: int,
        precision: Precision,
        scope: Scope,
        progress: Progress,
    ) -> None:
        self.model, self.seq, self.precision = model, seq, precision
        self.scope, self.progress = scope, progress
        self.devices = cluster.devices
        self.on_cuda = cluster.groups[0].device.name != "cpu"
        self.device_type = "cuda" if self.on_cuda else "cpu"
        self.cases = layer_cases(model, seq, scope.widths, scope.micro_batches)
        self.skipped: list[str] = []

    def total(self) -> int:
        """How many steps the progress will see, about."""
        contention = 0 if self.on_cuda else self.devices
        return (
            len(self.cases)
            + HOST_CONSTANTS
            + contention
            + count_samples(self.devices, self.scope.sizes_bytes)
        )

    def layers(self) -> list[LayerSample]:
        """Every layer case; a process that dies costs the case that it was at."""
        samples: list[LayerSample] = []
        for _, group in itertools.groupby(self.cases, key=lambda case: (case.tp, case.sequence_parallel)):
            cases = list(group)
            while cases:
                done = self._some_layers(cases, samples)
                cases = cases[done:]
        return samples

    def _some_layers(self, cases: Sequence[LayerCase], samples: list[LayerSample]) -> int:
        """Measures cases in one process until it ends; how many are settled, measured or skipped."""
        settled = 0
        messages = measure_layers(
            cases, self.model, self.seq, self.precision, self.device_type, self.scope.layer_effort
        )
        try:
            for case, message in zip(cases, messages, strict=False):
                self._take(message, LayerSample, samples, case.label())
                settled += 1
        except ChildFailed as failure:
            self._skip(f"{cases[settled].label()}: the process {failure}")
            settled += 1
        return settled

    def constants(self) -> list[Constant]:
        """Constants of the host and the device."""
        found: list[Constant] = []
        messages = measure_host(self.device_type, self.precision, self.scope.host_effort)
        self._gather(messages, Constant, found, "host")
        return found

    def contention(self) -> list[ContentionSample]:
        """Slowdown of compute by the number of ranks at work; accelerators do not share theirs."""
        if self.on_cuda:
            return [ContentionSample(active=n, slowdown=1.0) for n in range(1, self.devices + 1)]
        seconds: dict[int, list[float]] = {}
        messages = measure_contention(
            self.model, self.seq, self.devices, self.precision, self.scope.contention_window_s
        )
        try:
            for message in messages:
                seconds.setdefault(message["active"], []).append(message["seconds"])
                if len(seconds[message["active"]]) == message["active"]:
                    self.progress.step(f"contention: {message['active']} ranks compute")
        except ChildFailed as failure:
            self._skip(f"contention: {failure}")
            return []
        alone = statistics.fmean(seconds[1])
        return [
            ContentionSample(active=active, slowdown=max(statistics.fmean(seconds[active]) / alone, 1.0))
            for active in sorted(seconds)
        ]

    def comms(self) -> list[CommSample]:
        """Collectives over the real backend; a single device has none."""
        found: list[CommSample] = []
        if self.devices == 1:
            self._skip("collectives: one device has nobody to talk to")
            return found
        messages = measure_comm(
            self.devices, self.device_type, self.scope.sizes_bytes, self.scope.comm_effort
        )
        self._gather(messages, CommSample, found, "collectives")
        return found

    def _gather(
        self, messages: Iterator[dict[str, Any]], kind: type[Sample], into: list[Sample], what: str
    ) -> None:
        try:
            for message in messages:
                self._take(message, kind, into, _label(what, message))
        except ChildFailed as failure:
            self._skip(f"{what}, after {len(into)} samples: {failure}")

    def _take(self, message: dict[str, Any], kind: type[Sample], into: list[Sample], label: str) -> None:
        if "skipped" in message:
            self._skip(message["skipped"])
        else:
            into.append(decode(kind, message, source="a measuring process"))
            self.progress.step(label)

    def _skip(self, text: str) -> None:
        self.skipped.append(text)
        self.progress.say(f"skipped: {text}")


def _label(what: str, message: dict[str, Any]) -> str:
    if "op" in message:
        return f"{message['op']} over {message['ranks']} ranks, {message['groups']} at once"
    return f"{what}: {message['name']}"

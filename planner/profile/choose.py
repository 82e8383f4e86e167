"""How a profile is used: for which devices it speaks, and what is to be said where it does not quite fit.

The shipped profile that fits a device best: measured on it, else fitted to runs on it among others.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.catalog import profile_files
from planner.hardware.cluster import ClusterSpec, Device
from planner.model.spec import ModelSpec
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, Profile, load_profile, shape_key

OLD_MONTHS = 12
"""Months after which a profile is called old: about four minor releases of torch, 2.5 (October 2024) to 2.9
(October 2025), each with other kernels."""

DAYS_A_MONTH = 365.25 / 12
MOST_NAMED = 6
"""Devices that an error lists by name."""


@frozen
class ProfileUse:
    """A profile as the figures of one kind of device rest on it; in plan.json under `inputs`.

    `measured` says that it was measured on `devices`, else it was fitted to runs on them. `remarks` are what
    does not quite fit: other versions, another backend or precision, age.
    """

    device: str
    name: str
    devices: tuple[str, ...]
    measured: bool
    created: str
    torch: str = ""
    backend: str = ""
    remarks: tuple[str, ...] = ()

    def text(self) -> str:
        """`measured on cpu with torch 2.13.0, 2026-11-24; mind: ...`."""
        made = "measured on" if self.measured else "fitted to runs on"
        torch = f" with torch {self.torch}" if self.torch else ""
        remarks = f"; mind: {'; '.join(self.remarks)}" if self.remarks else ""
        return f"{made} {', '.join(self.devices)}{torch}, {self.created[:10]}{remarks}"


def speaks_of(profile: Profile, device: str) -> bool:
    """Whether a profile counts for a device: if measured, for its own; if fitted, for all."""
    return not profile.measured or profile.device == device


def check_device(profile: Profile, devices: Sequence[str], where: str, what: str = "the cluster is") -> None:
    """Raises InputError where a profile was measured on none of the devices it is used for."""
    if any(speaks_of(profile, device) for device in devices):
        return
    counts = {"layers": profile.layers, "operators": profile.rates, "collectives": profile.comms}
    held = ", ".join(f"{len(samples)} {name}" for name, samples in counts.items() if samples)
    distinct = list(dict.fromkeys(devices))
    more = [f"{len(distinct) - MOST_NAMED} more"] if len(distinct) > MOST_NAMED else []
    *first, last = [*distinct[:MOST_NAMED], *more]
    listed = f"{', '.join(first)} and {last}" if first else last
    raise InputError(
        Problem(
            where=where,
            fault=f"was measured on {profile.device} ({held}, {profile.created[:10]}), and {what} of "
            f"{listed}: times of one device say nothing of another's.",
            legal=f"a profile of {listed if len(distinct) == 1 else 'one of these'}, or one fitted to runs",
            fix="plan profile on that device, or leave --profile out",
        )
    )


def use_of(
    profile: Profile,
    device: Device,
    *,
    model: ModelSpec | None = None,
    precision: Precision | None = None,
    cluster: ClusterSpec | None = None,
    today: datetime.date | None = None,
) -> ProfileUse:
    """The use of a profile for a device, with all that is to be said of it.

    What is not known is not remarked on: the precision, the model, and, unless the cluster is this machine,
    the versions that will run there.
    """
    remarks = [*_of_device(profile, device, cluster), *_of_samples(profile, model, precision)]
    if cluster is not None and cluster.local:
        remarks += _of_version(profile, installed_torch())
    remarks += _of_age(profile, today or datetime.datetime.now(datetime.UTC).date())
    return ProfileUse(
        device=device.name,
        name=profile.name,
        devices=profile.devices,
        measured=profile.measured,
        created=profile.created,
        torch=profile.versions.get("torch", ""),
        backend=profile.backend,
        remarks=tuple(remarks),
    )


def installed_torch() -> str:
    """The version of torch on this machine, or nothing; torch itself is not imported."""
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _of_device(profile: Profile, device: Device, cluster: ClusterSpec | None) -> list[str]:
    """Runs on other devices, another CPU, messages that another library carried."""
    if not profile.measured:
        if device.name in profile.devices:
            return []
        return [f"fitted to runs on {', '.join(profile.devices)}, none of them on {device.name}"]
    remarks = []
    here = cluster is not None and cluster.local and device.name == "cpu"
    if here and profile.device_title != device.title:
        remarks.append(f"measured on {profile.device_title}, this is {device.title}")
    usual = "gloo" if device.name == "cpu" else "nccl"
    if profile.backend and profile.comms and profile.backend != usual:
        remarks.append(f"its messages went over {profile.backend}, those of {device.name} go over {usual}")
    return remarks


def _of_samples(profile: Profile, model: ModelSpec | None, precision: Precision | None) -> list[str]:
    """Layers and operators in another format, or layers of other models."""
    measured = profile.layers or profile.rates
    if not measured or precision is None:
        return []
    formats = sorted({str(sample.precision) for sample in measured})
    if str(precision) not in formats:
        what = "layers" if profile.layers else "operators"
        return [f"its {what} are in {' and '.join(formats)}, the run is in {precision}"]
    if model is None:
        return []
    known = {s.shape_key for s in profile.layers if s.precision is precision and s.kind is LayerKind.BLOCK}
    wanted = [shape_key(model, LayerKind.BLOCK, block) for block in model.classes().values()]
    missing = sum(key not in known for key in wanted)
    if not missing:
        return []
    priced = ", which its operators price" if profile.rates else ""
    return [f"it has no sample of {missing} of the {len(wanted)} layer classes of {model.name}{priced}"]


def _of_version(profile: Profile, installed: str) -> list[str]:
    """Another release of torch than the one that is here."""
    taken = profile.versions.get("torch", "")
    if not taken or not installed or release(taken) == release(installed):
        return []
    return [f"taken with torch {taken}, here is torch {installed}"]


def release(version: str) -> str:
    """The public part of a version: builds for CPU and CUDA are of one release."""
    return version.partition("+")[0]


def _of_age(profile: Profile, today: datetime.date) -> list[str]:
    months = months_old(profile.created, today)
    if months is None:
        return [f"its date '{profile.created[:40]}' cannot be read"]
    return [f"it is {months:.0f} months old"] if months > OLD_MONTHS else []


def months_old(created: str, today: datetime.date) -> float | None:
    """Months between the date of a profile and a day; None where the date cannot be read."""
    try:
        made = datetime.datetime.fromisoformat(created).date()
    except ValueError:
        return None
    return (today - made).days / DAYS_A_MONTH


def told_age(created: str, today: datetime.date) -> str:
    """`today`, `3 days ago`, `14 months ago`."""
    months = months_old(created, today)
    if months is None:
        return "of an unknown date"
    days = round(months * DAYS_A_MONTH)
    if days <= 0:
        return "today"
    if days < 2 * DAYS_A_MONTH:
        return f"{days} day{'s' if days > 1 else ''} ago"
    return f"{months:.0f} months ago"


@functools.cache
def shipped_profile(device: str) -> Profile | None:
    """The profile for a device's name; None where none is shipped."""
    named = (path for path in profile_files() if device in path.read_text(encoding="utf-8"))
    fitting = [profile for profile in map(_loaded, named) if device in profile.devices]
    return max(fitting, key=lambda profile: (profile.device == device, profile.created), default=None)


@functools.cache
def _loaded(path: Path) -> Profile:
    return load_profile(path)


def shipped_profiles() -> tuple[Profile, ...]:
    """All shipped profiles."""
    return tuple(map(_loaded, profile_files()))

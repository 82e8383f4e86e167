"""Profiles of one device and software, taken at different times, as one.

A sample's fields say what it is of, apart from FIGURES, which were measured: two samples with one key are two
measurements of one thing, of which a merged profile keeps the later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable
from typing import Any

from planner.foundation.frozen import frozen
from planner.model.workload import Precision
from planner.profile.profile import (
    CommSample,
    Constant,
    ContentionSample,
    FamilyFit,
    LayerSample,
    OperatorSample,
    Profile,
)

Sample = LayerSample | CommSample | ContentionSample | Constant | OperatorSample

FIELDS: dict[type, str] = {
    LayerSample: "layers",
    CommSample: "comms",
    ContentionSample: "contention",
    Constant: "constants",
    OperatorSample: "rates",
}
"""The field of Profile that holds samples of a kind."""


def by_field(samples: Iterable[Sample]) -> dict[str, Any]:
    """Samples under the fields of Profile that hold them, every such field given."""
    held: dict[str, list[Sample]] = {name: [] for name in FIELDS.values()}
    for sample in samples:
        held[FIELDS[type(sample)]].append(sample)
    return {name: tuple(each) for name, each in held.items()}


FIGURES = frozenset(
    {
        *("forward_s", "backward_s", "seconds", "reference_s", "spread", "samples", "slowdown"),
        *("saved_bytes", "forward_transient_bytes", "backward_transient_bytes", "value", "origin"),
        *("host_forward_s", "host_backward_s", "taken"),
    }
)
"""Names of what was measured. All other fields of a sample say of what, and are its key."""


def key_of(sample: Sample) -> Hashable:
    """What the sample is of: two with one key are two measurements of the same thing."""
    names = (field.name for field in dataclasses.fields(sample))
    return type(sample).__name__, *((name, getattr(sample, name)) for name in names if name not in FIGURES)


NO_TIME = "no time was left"
MORE_CASES = "more cases: "
"""How a skipped case ends, and how others of that kind are summed up after the first few."""


@frozen
class Platform:
    """What times depend on besides the work: the device, the libraries, the format of products.

    `precision` is None where a profile does not say.
    """

    device: str
    device_title: str
    backend: str
    torch: str
    precision: Precision | None

    def differences(self, other: Platform) -> list[str]:
        """List the fields that differ, with both values; a field unknown on either side never differs."""
        names = {
            "device": "device",
            "device_title": "device title",
            "backend": "backend",
            "torch": "torch",
            "precision": "precision",
        }
        pairs = [(label, getattr(self, name), getattr(other, name)) for name, label in names.items()]
        return [f"{label} {own} against {its}" for label, own, its in pairs if own and its and own != its]


def platform_of(profile: Profile) -> Platform:
    """Return the platform that a profile was measured on."""
    formats = {sample.precision for sample in profile.layers}
    return Platform(
        device=profile.device,
        device_title=profile.device_title,
        backend=profile.backend,
        torch=profile.versions.get("torch", ""),
        precision=profile.precision or (formats.pop() if len(formats) == 1 else None),
    )


def merge(old: Profile, new: Profile, measured: Collection[str] = ()) -> Profile:
    """The samples of both; where they have one of the same thing, that of `new`.

    Both are of one platform, and `new` is the later. `measured` are the cases, `family: case`, that `new`
    took: that `old` had skipped them is no longer true. For which cases no time was left, only the later of
    two profiles of a family knows.
    """
    names = dict.fromkeys(sorted({*old.name.split("; "), *new.name.split("; ")}))
    fields: dict[str, Any] = {
        name: _merged(getattr(old, name), getattr(new, name)) for name in FIELDS.values()
    }
    retaken = {fit.family for fit in new.fits}
    skipped = [
        text
        for text in old.skipped
        if not any(text.startswith(f"{case}: ") for case in measured)
        and not (text.endswith(NO_TIME) and (text.partition(": ")[0] in retaken or MORE_CASES in text))
    ]
    return dataclasses.replace(
        new,
        name="; ".join(names),
        created=max(old.created, new.created),
        devices_per_node=max(old.devices_per_node, new.devices_per_node),
        **fields,
        skipped=tuple(dict.fromkeys([*skipped, *new.skipped])),
        fits=_merged_fits(old.fits, new.fits),
        clocks=new.clocks or old.clocks,
    )


def _merged(old: Iterable[Sample], new: Iterable[Sample]) -> tuple[Sample, ...]:
    """By key, in the order of `old`, what only `new` has after it."""
    return tuple(({key_of(s): s for s in old} | {key_of(s): s for s in new}).values())


def _merged_fits(old: Iterable[FamilyFit], new: Iterable[FamilyFit]) -> tuple[FamilyFit, ...]:
    return tuple(({fit.family: fit for fit in old} | {fit.family: fit for fit in new}).values())

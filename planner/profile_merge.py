"""Samples of a profile: where each kind is kept, and which of two speak of the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

from planner.profile import CommSample, Constant, ContentionSample, LayerSample

Sample = LayerSample | CommSample | ContentionSample | Constant

FIELDS: dict[type, str] = {
    LayerSample: "layers",
    CommSample: "comms",
    ContentionSample: "contention",
    Constant: "constants",
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
        *("host_forward_s", "host_backward_s"),
    }
)
"""Names of what was measured. All other fields of a sample say of what, and are its key."""


def key_of(sample: Sample) -> Hashable:
    """What the sample is of: two with one key are two measurements of the same thing."""
    names = (field.name for field in dataclasses.fields(sample))
    return type(sample).__name__, *((name, getattr(sample, name)) for name in names if name not in FIGURES)

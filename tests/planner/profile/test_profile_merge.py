"""Laws of merging profiles, on random ones; and which are refused."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.foundation.decode import decode_json, to_json
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.merge import (
    FIELDS,
    FIGURES,
    MORE_CASES,
    NO_TIME,
    Sample,
    by_field,
    key_of,
    merge,
    platform_of,
)
from planner.profile.profile import (
    PROFILE_SCHEMA,
    CommSample,
    Constant,
    ContentionSample,
    FamilyFit,
    LayerKind,
    LayerSample,
    Op,
    Profile,
)


def layer(source: random.Random, keys: range) -> LayerSample:
    return LayerSample(
        kind=LayerKind.BLOCK,
        shape_key=f"shape-{source.choice(keys)}",
        precision=Precision.FP32,
        recompute=source.choice(list(Recompute)),
        tp=source.choice([1, 2, 4]),
        sequence_parallel=source.random() < 0.5,
        micro_batch=source.choice([1, 2]),
        seq=64,
        forward_s=source.random(),
        backward_s=source.random(),
        saved_bytes=source.randrange(1000),
        forward_transient_bytes=1,
        backward_transient_bytes=2,
        spread=0.1,
        samples=3,
        taken="2026-01-01T00:00:00+00:00",
    )


def comm(source: random.Random, keys: range) -> CommSample:
    size = 1 << source.choice(keys)
    return CommSample(
        op=source.choice(list(Op)),
        ranks=2,
        groups=1,
        bytes=size,
        seconds=source.random(),
        spread=0.0,
        samples=2,
    )


def profile(seed: int, *, keys: range = range(6), created: str = "2026-01-02") -> Profile:
    """Some samples with keys of a range; ranges that do not meet have no sample in common."""
    source = random.Random(seed)
    samples: list[Sample] = [layer(source, keys) for _ in range(source.randrange(12))]
    samples += [comm(source, keys) for _ in range(source.randrange(12))]
    samples += [
        ContentionSample(active=source.choice(keys), slowdown=1 + source.random())
        for _ in range(source.randrange(4))
    ]
    samples += [
        Constant(name=f"rate-{source.choice(keys)}", value=source.random(), origin="measured")
        for _ in range(source.randrange(6))
    ]
    once = {key_of(sample): sample for sample in samples}.values()
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name=f"profile of {keys.start}",
        device="cpu",
        device_title="A CPU",
        backend="gloo",
        created=created,
        versions={"torch": "2.13.0"},
        devices_per_node=2,
        slots_per_node=2,
        **by_field(once),
        cores=2,
        precision=Precision.FP32,
        fits=(FamilyFit(family=f"layers {keys.start}", cases=9, taken=3, error=0.04),),
    )


def sets(merged: Profile) -> dict[str, set[object]]:
    """What it holds, in no order."""
    held = {name: set(getattr(merged, name)) for name in FIELDS.values()}
    return held | {"fits": set(merged.fits), "skipped": set(merged.skipped)}


def samples_of(merged: Profile) -> list[Sample]:
    return [sample for name in FIELDS.values() for sample in getattr(merged, name)]


@pytest.mark.parametrize("seed", range(20))
def test_idempotent(seed: int) -> None:
    a, b = profile(seed), profile(seed + 1000)
    assert merge(a, a) == a
    assert merge(merge(a, b), b) == merge(a, b)


@pytest.mark.parametrize("seed", range(20))
def test_commutative_where_nothing_is_shared(seed: int) -> None:
    a, b = profile(seed), profile(seed + 1000, keys=range(10, 16))
    assert sets(merge(a, b)) == sets(merge(b, a))
    assert merge(a, b).name == merge(b, a).name
    assert len(samples_of(merge(a, b))) == len(samples_of(a)) + len(samples_of(b))


@pytest.mark.parametrize("seed", range(20))
def test_associative(seed: int) -> None:
    a, b, c = (profile(seed + step, keys=range(step, step + 5)) for step in range(3))
    assert sets(merge(merge(a, b), c)) == sets(merge(a, merge(b, c)))


@pytest.mark.parametrize("seed", range(20))
def test_the_later_wins_and_nothing_is_lost(seed: int) -> None:
    a, b = profile(seed, created="2026-03-01"), profile(seed + 1000, created="2026-02-01")
    merged = merge(a, b)
    by_key = {key_of(sample): sample for sample in samples_of(merged)}
    assert len(by_key) == len(samples_of(merged))
    assert by_key == {key_of(s): s for s in samples_of(a)} | {key_of(s): s for s in samples_of(b)}
    assert merged.created == "2026-03-01"
    assert decode_json(Profile, to_json(merged), source="x") == merged


def test_what_was_skipped_and_is_measured_now_is_not_said_to_be_skipped() -> None:
    old = dataclasses.replace(profile(1), skipped=("layers: head: not enough memory", "layers: block: died"))
    new = dataclasses.replace(profile(1), skipped=("layers: block: died", "comms: it: timed out"))
    merged = merge(old, new, ["layers: head"])
    assert merged.skipped == ("layers: block: died", "comms: it: timed out")


def test_the_later_profile_of_a_family_knows_what_had_no_time() -> None:
    old = dataclasses.replace(
        profile(1),
        skipped=("layers 0: head: no time was left", "x: y: no time was left", f"3 {MORE_CASES}{NO_TIME}"),
    )
    new = dataclasses.replace(profile(1), skipped=(f"layers 0: block: {NO_TIME}",))
    assert [fit.family for fit in new.fits] == ["layers 0"]
    assert merge(old, new).skipped == ("x: y: no time was left", "layers 0: block: no time was left")


def test_a_key_is_all_that_was_not_measured() -> None:
    """Every number that a measurement gives is in FIGURES, or two samples of one thing would both be kept."""
    sample = layer(random.Random(0), range(1))
    figures = {field.name for field in dataclasses.fields(sample) if field.name in FIGURES}
    changed = {name: 99 for name in figures if isinstance(getattr(sample, name), int | float)}
    assert key_of(dataclasses.replace(sample, **changed)) == key_of(sample)
    asked = ("kind", "shape_key", "precision", "recompute", "tp", "sequence_parallel", "micro_batch", "seq")
    assert figures.isdisjoint(asked)
    assert all(kind.__dataclass_fields__.keys() & FIGURES for kind in FIELDS)  # type: ignore[attr-defined]


def test_stacks_that_differ() -> None:
    a = profile(1)
    other = dataclasses.replace(
        a, device="h100", device_title="An H100", versions={"torch": "2.12.1"}, backend="nccl"
    )
    assert platform_of(a).differences(platform_of(a)) == []
    assert platform_of(a).differences(platform_of(other)) == [
        "device cpu against h100",
        "device title A CPU against An H100",
        "backend gloo against nccl",
        "torch 2.13.0 against 2.12.1",
    ]
    unknown = dataclasses.replace(a, precision=None, layers=())
    assert platform_of(a).differences(platform_of(unknown)) == []
    half = dataclasses.replace(a, precision=Precision.BF16)
    assert platform_of(half).differences(platform_of(a)) == ["precision bf16 against fp32"]

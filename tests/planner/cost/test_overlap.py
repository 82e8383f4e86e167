"""What a message shows beside work: usual shares, measured ones, and laws."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.cost.communication.collectives import Overlap, overlap_of
from planner.cost.evaluate import CostModel
from planner.model.sublayer import Recompute
from planner.profile.profile import Constant, Profile
from planner.strategy.strategy import Degrees, Zero
from tests.planner import instances

USUAL = overlap_of(None)


def profile(**constants: float) -> Profile:
    return instances.profile(
        constants=tuple(Constant(name=name, value=value, origin="test") for name, value in constants.items())
    )


def test_what_hides_slows_and_what_does_not_fit_shows() -> None:
    assert USUAL.shown_s(1.0, 10.0) == pytest.approx(0.19)
    assert USUAL.shown_s(10.0, 1.0) == pytest.approx(9.19)


def test_a_slowed_message_takes_longer_beside_work_and_its_rest_goes_on_alone() -> None:
    both = Overlap(work_slowdown=0.25, message_slowdown=0.5)
    assert both.shown_s(1.0, 10.0) == pytest.approx(0.25 * 1.5)
    # A second of work hides two thirds of a second of the message.
    assert both.shown_s(10.0, 1.0) == pytest.approx(10.0 - 1.0 / 1.5 + 0.25)


def test_work_hides_never_more_than_the_message_and_a_longer_message_shows_more() -> None:
    draw = random.Random(7)
    for _ in range(200):
        of = Overlap(work_slowdown=draw.uniform(0, 0.5), message_slowdown=draw.uniform(0, 0.9))
        message_s, work_s = draw.uniform(0, 3), draw.uniform(0, 3)
        shown_s = of.shown_s(message_s, work_s)
        assert 0 <= shown_s <= message_s * (1 + of.work_slowdown * (1 + of.message_slowdown))
        assert of.shown_s(message_s, work_s + 0.1) <= shown_s + 1e-12
        assert of.shown_s(message_s + 0.1, work_s) >= shown_s


def test_the_shares_of_a_profile_win() -> None:
    measured = profile(overlap_slowdown=0.05, overlap_message_slowdown=0.3)
    assert overlap_of(measured) == Overlap(work_slowdown=0.05, message_slowdown=0.3)
    assert overlap_of(profile()) == USUAL


def test_a_step_is_slower_where_work_slows_more() -> None:
    degrees = Degrees(dp_shard=4, zero=Zero.PARAMETERS, num_micro_batches=2)
    base = instances.problem(of=instances.model(), on=instances.cluster())
    shown = []
    for share in (0.0, 0.5):
        of = dataclasses.replace(base, profile=profile(overlap_slowdown=share))
        shape = CostModel(of).layout(degrees)
        shown.append(shape.passes(next(iter(shape.classes)), Recompute.NONE)[1].dp_s)
    assert shown[0] < shown[1]

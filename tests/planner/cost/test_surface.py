"""Surfaces over sizes: constants of a device that is made up, laws, and what left-out samples say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from planner.cost.compute.measured_operators import FEWEST, TERMS, Surface
from planner.profile.profile import OperatorKind

RATE_FLOPS, BYTES_PER_S, LAUNCH_S = 400e12, 2e12, 4e-6
TILE, WAVE = 96.0, 1024.0
GEMM = TERMS[OperatorKind.GEMM]


def additive(m: float, n: float, k: float) -> float:
    """A device whose time is the sum of its form's terms."""
    moved = 2.0 * (m * n + n * k + m * k) / BYTES_PER_S
    return LAUNCH_S + moved + 2.0 * m * n * k / RATE_FLOPS


def overlapping(m: float, n: float, k: float) -> float:
    """One that computes while it reads, in tiles and full waves of rows: no sum of the form's terms."""
    padded = 2.0 * max(m, WAVE) * (n + TILE) * (k + TILE) / RATE_FLOPS
    return LAUNCH_S + max(padded, 2.0 * (m * n + n * k + m * k) / BYTES_PER_S)


def sizes(count: int, seed: int) -> list[tuple[float, ...]]:
    source = random.Random(seed)
    return [tuple(2.0 ** source.uniform(6, 13) for _ in range(3)) for _ in range(count)]


def surface(device: object, count: int = 90, noise: float = 0.0, scale: float = 1.0) -> Surface:
    assert callable(device)
    source = random.Random(7)
    points = sizes(count, seed=1)
    seconds = [scale * device(*p) * math.exp(source.gauss(0.0, noise)) for p in points]
    return Surface(points, seconds, GEMM)


def errors(of: Surface, device: object, points: Sequence[Sequence[float]]) -> list[float]:
    assert callable(device)
    return sorted(abs(of.seconds(*p) / device(*p) - 1) for p in points)


def test_the_form_recovers_the_constants_of_an_additive_device() -> None:
    launch, result, weight, given, flops = surface(additive).coefficients
    assert launch == pytest.approx(LAUNCH_S, rel=1e-6)
    assert [result, weight, given] == pytest.approx([2.0 / BYTES_PER_S] * 3, rel=1e-6)
    assert flops == pytest.approx(2.0 / RATE_FLOPS, rel=1e-6)


def test_noise_of_a_twentieth_leaves_the_rate_within_it() -> None:
    assert surface(additive, noise=0.05).coefficients[-1] == pytest.approx(2.0 / RATE_FLOPS, rel=0.05)


def test_what_the_form_cannot_say_is_interpolated() -> None:
    of, points = surface(overlapping, noise=0.02), sizes(200, seed=2)
    found = errors(of, overlapping, points)
    alone = sorted(abs(of.form(p) / overlapping(*p) - 1) for p in points)
    assert found[100] < alone[100] * 0.7
    assert found[180] < alone[180] * 0.8


def test_left_out_samples_tell_the_error_elsewhere() -> None:
    of = surface(overlapping, noise=0.02)
    elsewhere = errors(of, overlapping, sizes(200, seed=3))[100]
    assert of.held_out_error == pytest.approx(elsewhere, abs=0.03)


@pytest.mark.parametrize("device", [additive, overlapping])
def test_more_work_never_takes_less_time(device: object) -> None:
    """Noisy samples too, within the samples and far beyond them."""
    of, source = surface(device, noise=0.1), random.Random(5)
    for _ in range(300):
        small = [2.0 ** source.uniform(3, 16) for _ in range(3)]
        large = [size * 2.0 ** source.uniform(0, 2) for size in small]
        assert of.seconds(*large) >= of.seconds(*small) * (1 - 1e-9)


def test_no_cliff_between_knots_or_at_their_end() -> None:
    of, source = surface(overlapping, noise=0.1), random.Random(6)
    for _ in range(300):
        at = [2.0 ** source.choice([4, 6, 7, 9, 10, 13, 15]) for _ in range(3)]
        axis = source.randrange(3)
        beside = [size * (1 + 1e-6 * (i == axis)) for i, size in enumerate(at)]
        assert of.seconds(*beside) == pytest.approx(of.seconds(*at), rel=1e-4)


def test_a_device_twice_as_slow_takes_twice_as_long_everywhere() -> None:
    once, twice = surface(overlapping, noise=0.05), surface(overlapping, noise=0.05, scale=2.0)
    for point in (*sizes(50, seed=4), (10.0, 1e5, 300.0)):
        assert twice.seconds(*point) == pytest.approx(2 * once.seconds(*point), rel=1e-6)


def test_beyond_the_samples_time_grows_like_the_work() -> None:
    of = surface(additive)
    ratio = of.seconds(2.0**15, 2.0**15, 2.0**15) / of.seconds(2.0**14, 2.0**14, 2.0**14)
    assert ratio == pytest.approx(8.0, rel=0.02)


def test_uncertainty_is_least_where_samples_are() -> None:
    of = surface(overlapping, count=30)
    near, far = of.uncertainty(*sizes(30, seed=1)[4]), of.uncertainty(2.0**16, 2.0**3, 2.0**16)
    assert 0 <= near < far


def test_few_samples_are_a_form_alone() -> None:
    points = [(2.0**n, 2.0**n, 2.0**n) for n in range(6, 6 + FEWEST - 1)]
    of = Surface(points, [overlapping(*p) for p in points], GEMM)
    assert of.seconds(128.0, 128.0, 128.0) == pytest.approx(of.form((128.0, 128.0, 128.0)))


def test_one_sample_is_scaled() -> None:
    of = Surface([(1024.0,)], [1e-3], TERMS[OperatorKind.ADD])
    assert of.seconds(1024.0) == pytest.approx(1e-3)
    assert 1e-3 <= of.seconds(4096.0) <= 4e-3 * (1 + 1e-9)

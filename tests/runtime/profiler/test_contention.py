"""What ranks on the same cores cost each other, from seconds that each had of a core."""

from __future__ import annotations

import pytest

from tests.plans import tiny_llama

pytest.importorskip("torch")

from planner.model.workload import Precision
from runtime.profiler.device import ROUNDS, Contended, measure_contention
from runtime.profiler.host import contention


def rounds(seconds: dict[int, float], speeds: tuple[float, ...]) -> list[Contended]:
    """Rounds on a machine of these speeds; `seconds` by ranks at work, each rank the same."""
    return [
        Contended(active=active, turn=turn, seconds=each / speed)
        for turn, speed in enumerate(speeds)
        for active, each in seconds.items()
        for _ in range(max(active, 1))
    ]


def test_ranks_beyond_the_cores_take_turns() -> None:
    taken = rounds({0: 1.0, 1: 1.04, 2: 1.1, 3: 1.1, 4: 1.15}, speeds=(1.0,))
    found = {sample.active: sample.slowdown for sample in contention(taken, cores=2)}
    assert found == pytest.approx({1: 1.04, 2: 1.1, 3: 1.5 * 1.1, 4: 2 * 1.15})


def test_a_machine_whose_speed_drifts_between_rounds() -> None:
    steady = rounds({0: 1.0, 1: 1.04, 2: 1.1}, speeds=(1.0, 1.0, 1.0))
    drifting = rounds({0: 1.0, 1: 1.04, 2: 1.1}, speeds=(1.0, 0.6, 1.3))
    assert contention(drifting, cores=2) == pytest.approx(contention(steady, cores=2))


def test_noise_never_makes_ranks_help_each_other() -> None:
    taken = rounds({0: 1.0, 1: 0.97, 2: 1.1, 3: 0.4}, speeds=(1.0,))
    slowdowns = [sample.slowdown for sample in contention(taken, cores=2)]
    assert slowdowns == pytest.approx([1.0, 1.1, 1.5 * 1.1])


def test_every_rank_speaks_in_every_round() -> None:
    model = tiny_llama(hidden=32, vocab=64)
    taken = list(measure_contention(model, 16, 2, 2, Precision.FP32, window_s=0.02))
    assert all(each.seconds > 0 for each in taken)
    counts = {active: [each.turn for each in taken if each.active == active] for active in (0, 1, 2)}
    assert {active: len(turns) for active, turns in counts.items()} == {0: ROUNDS, 1: ROUNDS, 2: 2 * ROUNDS}
    assert set(counts[2]) == set(range(ROUNDS))

"""How long a search goes on without a better plan."""

from __future__ import annotations

from planner.search.candidates import PATIENCE, WIDE, Progress


def searched(progress: Progress, times: int) -> Progress:
    """After so many shapes that found nothing."""
    for _ in range(times):
        progress.add(None)
    return progress


def test_a_search_without_a_plan_is_never_given_up() -> None:
    assert not searched(Progress(float("inf"), 0.005), 10 * PATIENCE).stale


def test_a_wide_gap_is_searched_longer_in_proportion() -> None:
    progress = searched(Progress(1.0, 0.005), PATIENCE)
    assert progress.stale and progress.spent(1.0 - WIDE) and not progress.spent(1.0 - 1.01 * WIDE)
    assert searched(progress, 4 * PATIENCE).spent(1.0 - 4.9 * WIDE) and not progress.spent(1.0 - 5.1 * WIDE)

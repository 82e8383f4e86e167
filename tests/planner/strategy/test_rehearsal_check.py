"""The rehearsal that a plan carries: a true one holds, damage is found, and `plan diff` shows both sides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.advice.plan_diff import plan_diff
from planner.cli import cli
from planner.strategy.estimate import Verdict
from planner.strategy.plan import Plan, decode_plan, encode_plan, save_plan
from planner.strategy.plan_check import check_plan, rehearsal_faults
from tests.planner.rehearsed_ranks import PINS, plan_of, problem, rehearsal_of

INTERLEAVED = PINS[-1]


def rehearsed(pins: str) -> Plan:
    asked = problem()
    plan = plan_of(asked, pins)
    return dataclasses.replace(plan, rehearsal=rehearsal_of(asked, plan))


@pytest.mark.parametrize("pins", PINS)
def test_a_true_rehearsal_holds(pins: str) -> None:
    assert all(check.holds for check in check_plan(rehearsed(pins)))


def damaged(change: Callable[[Any], None]) -> list[str]:
    """Faults after `change` of the rehearsal's JSON. Its ranks are 0 and 2, with stages 0, 2 and 1, 3."""
    document = json.loads(json.dumps(encode_plan(rehearsed(INTERLEAVED))))
    change(document["rehearsal"])
    return rehearsal_faults(decode_plan(document, source="plan.json"))


def _last_rank(rehearsal: Any) -> None:
    rehearsal["ranks"].pop()


def _runs_out(rehearsal: Any) -> None:
    rehearsal["ranks"][0]["ran_out"] = "running a step"


def _put(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(rehearsal: Any) -> None:
        place = rehearsal
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_put("ranks", 0, "rank", value=4), "rank 4 was rehearsed, the plan has 4 ranks"),
        (_put("ranks", 0, "rank", value=2), "rank 2 is said to hold stages (0, 2)"),
        (_put("ranks", 0, "stages", value=[0]), "rank 0 is said to hold stages (0,)"),
        (_put("ranks", 0, "passes", 0, "stage", value=1), "rank 0 has passes of stages [1]"),
        (
            _put("ranks", 0, "alike", value=[0, 1]),
            "rank 0 stands for pp (0, 1); those that do the same are (0,)",
        ),
        (_put("ranks", 0, "alike", value=[]), "rank 0 stands for pp ()"),
        (_put("ranks", 0, "start_bytes", value=2**50), "more than its peak"),
        (_put("ranks", 0, "reserved_bytes", value=1), "of 1 B reserved"),
        (_last_rank, "complete, but no rank stands for pp 1"),
        (_put("complete", value=False), "not complete, but every kind of rank was rehearsed"),
        (_put("micro_batches", value=5), "5 micro-batches were run, the plan has 4"),
        (_put("micro_batches", value=0), "0 micro-batches were run"),
        (_put("refined", "breakdown", "compute_s", value=9.0), "refined causes add up to"),
        (_put("refined", "step_time_interval_s", value=[8.0, 9.0]), "refined step time"),
        (_put("refined", "peak_memory_interval_bytes", value=[0, 1]), "refined peak memory"),
        (_put("refined", "measured_share", value=1.5), "1.5 of a rank's time"),
        (_put("refined", "memory_limit_bytes", value=2**60), "the refined limit is"),
        (_runs_out, "a rank ran out of memory, and the refined verdict is SAFE"),
    ],
)
def test_damage_is_found(change: Callable[[Any], None], fault: str) -> None:
    found = damaged(change)
    assert any(fault in each for each in found), found


def test_safe_beyond_the_limit_is_found() -> None:
    plan = rehearsed(INTERLEAVED)
    assert plan.rehearsal is not None and plan.rehearsal.refined is not None
    refined = plan.rehearsal.refined
    above = 2 * refined.memory_limit_bytes
    wrong = dataclasses.replace(
        refined, peak_memory_bytes=above, peak_memory_interval_bytes=(above, above), verdict=Verdict.SAFE
    )
    plan = dataclasses.replace(plan, rehearsal=dataclasses.replace(plan.rehearsal, refined=wrong))
    assert any("refined SAFE" in fault for fault in rehearsal_faults(plan))


def test_the_check_command_names_the_fault_and_exits_4(tmp_path: Path) -> None:
    plan = rehearsed(INTERLEAVED)
    assert plan.rehearsal is not None
    save_plan(plan, tmp_path / "plan.json")
    assert CliRunner().invoke(cli, ["check", str(tmp_path / "plan.json")]).exit_code == 0
    less = dataclasses.replace(plan.rehearsal, ranks=plan.rehearsal.ranks[:1])
    save_plan(dataclasses.replace(plan, rehearsal=less), tmp_path / "plan.json")
    result = CliRunner().invoke(cli, ["check", str(tmp_path / "plan.json")])
    assert result.exit_code == 4 and "no rank stands for pp 1" in result.output


def test_a_difference_of_plans_shows_what_rehearsals_showed(tmp_path: Path) -> None:
    asked = problem()
    first, second = rehearsed(PINS[0]), plan_of(asked, PINS[1])
    figures = {each.path: (each.first, each.second) for each in plan_diff(first, second).figures}
    assert first.rehearsal is not None and first.rehearsal.refined is not None
    assert figures["rehearsed step_time_s"] == (first.rehearsal.refined.step_time_s, None)
    assert figures["rehearsed mode"] == ("processor", None)
    assert not any("rehearsed" in each.path for each in plan_diff(second, second).figures)
    for name, plan in (("a.json", first), ("b.json", second)):
        save_plan(plan, tmp_path / name)
    shown = CliRunner().invoke(cli, ["diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert shown.exit_code == 0 and "rehearsed step_time_s" in shown.stdout

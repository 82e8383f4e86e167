"""Layouts that experts trained with: no plan for the same job is slower. bench/experts.py judges them all."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from bench.experts import GAP, SETS, defect, experts_layout, fastest, judge, shipped, variants
from planner.calibration.run_setup import Setups
from planner.calibration.runs import Run, RunRecompute, read_runs
from planner.strategy.estimate import Rejected, Verdict

TABLES = Path(__file__).parents[3] / "bench/data/tables.csv"
QUICK = ("mlm21-0002", "mcore-0001", "mcore-0002")


@cache
def published() -> dict[str, Run]:
    return {run.id: run for run in read_runs([TABLES]).runs}


@pytest.mark.parametrize("name", QUICK)
def test_no_plan_is_slower_than_the_experts_layout(name: str) -> None:
    row = judge(published()[name], Setups(shipped), None)
    assert row["legal"] and row["ratio"] <= 1 + GAP and defect(row) == ""


def test_what_a_run_leaves_open_is_what_suits_its_layout_best() -> None:
    run = published()["mcore-0002"]
    assert run.micro_batch is None and run.recompute is None
    tried = list(variants(run))
    assert {each.micro_batch for each in tried} == {1, 2, 4}
    assert len(tried) == 9
    layout = experts_layout(run, Setups(shipped))
    assert not isinstance(layout, Rejected)
    setup, best = layout
    assert best.verdict is Verdict.SAFE and setup.strategy.degrees.tp == run.tp
    stated = dataclasses.replace(run, micro_batch=1, recompute=RunRecompute.FULL)
    assert list(variants(stated)) == [stated]
    worse = experts_layout(stated, Setups(shipped))
    assert not isinstance(worse, Rejected) and worse[1].step_time_s > best.step_time_s


def test_every_set_has_runs_and_sweeps_count_once_a_group() -> None:
    sets = {each.name: each.runs() for each in SETS}
    assert all(sets.values())
    groups = [run.group_name for run in sets["layout-sweeps"]]
    assert len(groups) == len(set(groups)) >= 10
    two = [dataclasses.replace(published()["mcore-0001"], step_time_s=time) for time in (2.0, 1.0)]
    assert fastest(two) == [two[1]]


def test_a_slower_plan_is_a_defect_and_an_unsafe_layout_is_none() -> None:
    legal = {"broken": [], "legal": True, "ratio": 1.2}
    assert defect(legal) == "DEFECT" and defect(legal | {"ratio": None}) == "DEFECT"
    assert defect(legal | {"ratio": 1.0}) == ""
    assert defect(legal | {"legal": False}) == "not safe"
    assert defect(legal | {"broken": ["tp_within_node"], "legal": False}) == "tp_within_node"

"""The section of a report about a rehearsal: true to its figures, whatever was or was not measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from click.testing import CliRunner

from planner.cli import cli
from planner.foundation.units import format_bytes, format_seconds
from planner.report.page import build_page, render_page
from planner.report.rehearsed import rehearsed_section
from planner.report.run_record import ReportInput
from planner.strategy.estimate import Verdict
from planner.strategy.plan import Plan, load_plan, save_plan
from planner.strategy.rehearsal import (
    RankRehearsal,
    Refined,
    Rehearsal,
    RehearsalMode,
    RehearsedPass,
    RehearsedPlan,
)  # fmt: skip
from tests import report_samples as samples
from tests.html_reader import Reader


def rank_of(plan: Plan, rank: int, stage: int, factor: float = 1.1) -> RankRehearsal:
    """A rank that took `factor` times what the plan says."""
    told = plan.stage_estimates[stage]
    return RankRehearsal(
        rank=rank,
        alike=(stage,),
        stages=(stage,),
        passes=tuple(
            RehearsedPass(stage=stage, kind=kind, seconds=factor * seconds, spread=0.02, samples=3)
            for kind, seconds in (("F", told.forward_s), ("B", told.backward_s))
        ),
        update_s=0.01,
        idle_share=0.25,
        allocated_bytes=int(factor * told.memory.allocated_bytes),
        reserved_bytes=int(1.2 * factor * told.memory.allocated_bytes),
    )


def refined_of(plan: Plan, factor: float = 1.1, verdict: Verdict = Verdict.SAFE) -> Refined:
    estimate = plan.estimate
    step_s = factor * estimate.step_time_s
    return Refined(
        step_time_s=step_s,
        step_time_interval_s=(0.9 * step_s, 1.1 * step_s),
        breakdown=estimate.breakdown,
        measured_share=0.75,
        peak_memory_bytes=int(factor * estimate.peak_memory_bytes),
        peak_memory_interval_bytes=(1, 2),
        memory_limit_bytes=estimate.memory_limit_bytes,
        verdict=verdict,
    )


def rehearsal_of(plan: Plan, *ranks: RankRehearsal, **more: object) -> Plan:
    made = Rehearsal(
        mode=RehearsalMode.DEVICE,
        device="NVIDIA H100 80GB HBM3",
        created="2026-11-26T00:00:00+00:00",
        versions={"torch": "2.13.0"},
        compiled=False,
        micro_batches=2,
        ranks=ranks,
        complete=True,
        refined=refined_of(plan),
    )
    return dataclasses.replace(plan, rehearsal=dataclasses.replace(made, **more))  # type: ignore[arg-type]


def text_of(plan: Plan) -> str:
    return Reader(render_page(ReportInput(plan=plan))).text


def test_a_plan_that_was_not_rehearsed_has_no_section() -> None:
    plan = samples.plan()
    assert rehearsed_section(plan) is None
    assert "rehearsed" not in Reader(render_page(ReportInput(plan=plan))).ids


def test_predicted_and_rehearsed_stand_beside_each_other() -> None:
    plan = samples.plan()
    first = rank_of(plan, 0, 0)
    rehearsed = rehearsal_of(plan, first)
    section = build_page(ReportInput(plan=rehearsed)).rehearsed
    assert section is not None and [figure.title for figure in section.figures] == [
        "Memory of a rank", "Time of a pass",
    ]  # fmt: skip
    assert "+10.0 %" in section.sentence and "SAFE" in section.sentence
    (row,) = section.ranks.rows
    assert first.allocated_bytes is not None
    assert format_bytes(first.allocated_bytes) in row and "25 %" in row and "10 ms" in row
    predicted = plan.stage_estimates[0].memory.allocated_bytes
    assert format_bytes(predicted) in row and f"{100 * (predicted / first.allocated_bytes - 1):+.1f} %" in row
    text = text_of(rehearsed)
    assert "75 % of a rank's time" in text and format_seconds(refined_of(plan).step_time_s) in text
    assert "rehearsed" in Reader(render_page(ReportInput(plan=rehearsed))).ids


def test_shapes_alone_have_no_times() -> None:
    plan = samples.plan()
    traced = dataclasses.replace(rank_of(plan, 0, 0), passes=(), update_s=None, idle_share=None)
    section = rehearsed_section(rehearsal_of(plan, traced, mode=RehearsalMode.FAKE_TENSORS))
    assert section is not None and [figure.title for figure in section.figures] == ["Memory of a rank"]
    assert "fake tensors" in section.sentence
    assert "idle" not in section.ranks.header and "forward" not in section.ranks.header
    assert "reserved" in section.ranks.header and all(map(len, zip(*section.ranks.rows, strict=True)))


def test_a_rank_that_ran_out_is_named() -> None:
    plan = samples.plan()
    short = dataclasses.replace(rank_of(plan, 3, 0), allocated_bytes=None, ran_out="the first backward")
    refined = refined_of(plan, verdict=Verdict.NO)
    rehearsed = rehearsal_of(plan, short, refined=refined, complete=False, remarks=("the host was busy",))
    section = rehearsed_section(rehearsed)
    assert section is not None and "Memory ran out on rank 3" in section.sentence and "NO" in section.sentence
    assert "keep the model's figures" in section.sentence and "ran out" in section.ranks.rows[0]
    assert "the host was busy" in text_of(rehearsed)


def test_other_plans_and_hostile_names_are_text() -> None:
    plan = samples.plan()
    hostile = "<script>alert(1)</script>"
    other = RehearsedPlan(label=hostile, predicted_step_time_s=1.0, refined=refined_of(plan))
    rehearsed = rehearsal_of(plan, rank_of(plan, 0, 0), others=(other,), device=hostile, remarks=(hostile,))
    document = Reader(render_page(ReportInput(plan=rehearsed)))
    assert document.tags.count("script") == 1 and hostile in document.text


def test_a_rehearsal_without_a_refined_estimate_is_shown() -> None:
    plan = samples.plan()
    section = rehearsed_section(rehearsal_of(plan, rank_of(plan, 0, 0), refined=None))
    assert (
        section is not None and section.refined is None and "With what was measured" not in section.sentence
    )


def test_an_explanation_tells_the_rehearsal(tmp_path: Path) -> None:
    words = "estimate --model shardwise-demo --cluster local:4 --seq 256 --batch 16 -o"
    path = tmp_path / "plan.json"
    assert CliRunner().invoke(cli, [*words.split(), str(path)]).exit_code == 0
    plan = load_plan(path)
    save_plan(rehearsal_of(plan, rank_of(plan, 0, 0)), path)
    asked = ["explain", str(path), "--why-not", "tp=2"]
    told = " ".join(CliRunner().invoke(cli, asked).stdout.split())
    assert "1 of 4 ranks on NVIDIA H100 80GB HBM3, 75% of a rank's time measured" in told
    document = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)
    assert document["rehearsal"]["refined"]["measured_share"] == 0.75

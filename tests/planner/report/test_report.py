"""The report: complete, self-contained, safe against hostile names, and true to its plan and run."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.commands.running.report import report, write_report
from planner.cost.goodput import Job, figures_of
from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError
from planner.foundation.units import format_usd
from planner.job.problem import JobOverheads
from planner.profile.choose import ProfileUse
from planner.report.charts import CAUSE_COLOURS, COLOURS, TENANT_COLOURS
from planner.report.page import render_page
from planner.report.picture import draw_plan, groups_along, print_ranks
from planner.report.run_record import (
    ComparisonRow,
    ReportInput,
    judge_order,
    load_comparison,
    load_metrics,
    load_report_input,
    load_timeline,
)
from planner.report.sections import MAX_SLICES, memory_figure, timeline_figures
from planner.report.timeline import (
    Slice,
    SliceKind,
    build_trace,
    classify,
    first_rank_of_each,
    idle_share,
    print_trace,
    slices_of,
)
from planner.report.words import describe_error, headline
from planner.strategy.estimate import MEMORY_TENANTS, TIME_CAUSES
from planner.strategy.plan import Plan, predicted_usd, save_plan, usd_per_hour
from planner.strategy.strategy import Degrees, Schedule, Zero
from tests import report_samples as samples
from tests.html_reader import Reader

HOSTILE = "</style><script>alert('x')</script><img src=x onerror=alert(1)>&\"'{{ 7*7 }}{% raw %}"
LARGE = Degrees(
    tp=8,
    pp=8,
    chunks=2,
    schedule=Schedule.INTERLEAVED,
    dp_replicate=2,
    dp_shard=8,
    zero=Zero.OPTIMIZER,
    num_micro_batches=256,
    sequence_parallel=True,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.write_run(tmp_path_factory.mktemp("report") / "run", samples.plan())


@pytest.fixture(scope="module")
def run_page(run_folder: Path) -> str:
    source = load_report_input(run_folder)
    return render_page(source)


def plan_page(plan: Plan) -> str:
    return render_page(ReportInput(plan=plan))


# The page as a document


def test_the_page_fetches_nothing(run_page: str) -> None:
    page = Reader(run_page)
    links = [
        value
        for _, name, value in page.attributes
        if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "ping"}
    ]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    style = run_page[run_page.index("<style>") : run_page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    script = run_page[run_page.rindex("<script>") :]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|import\(|sendBeacon|eval", script)
    assert "http" not in re.sub(r"xmlns(:xlink)?=\"http://www\.w3\.org/[^\"]*\"|http-equiv", "", run_page)


def test_the_policy_forbids_every_fetch(run_page: str) -> None:
    policies = [v for tag, name, v in Reader(run_page).attributes if tag == "meta" and "default-src" in v]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none';")
    assert "http" not in policies[0] and "*" not in policies[0]


def test_links_inside_the_page_lead_somewhere(run_page: str) -> None:
    page = Reader(run_page)
    targets = {v[1:] for _, name, v in page.attributes if name == "href" and v.startswith("#")}
    assert targets and targets <= set(page.ids)
    labels = {v for _, name, v in page.attributes if name == "aria-labelledby"}
    assert labels <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_chart_has_a_text_for_those_who_cannot_see_it(run_page: str) -> None:
    charts = re.findall(r'<svg class="chart[^>]*>', run_page)
    assert len(charts) == 8
    assert all(re.search(r'role="img" aria-label="[^"]{10,}"', chart) for chart in charts)


def test_every_colour_of_the_page_is_defined(run_page: str) -> None:
    defined = set(re.findall(r"(--[a-z0-9-]+):", run_page))
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", run_page))
    assert used <= defined


def test_one_colour_for_each_cause_and_tenant() -> None:
    for fields, colours in ((TIME_CAUSES, CAUSE_COLOURS), (MEMORY_TENANTS, TENANT_COLOURS)):
        assert tuple(colours) == fields
        for mode in ("light", "dark"):
            assert len({getattr(colour, mode) for colour in colours.values()}) == len(fields)
    assert {str(kind) for kind in SliceKind} <= {colour.name for colour in COLOURS}


def test_a_plan_of_1024_ranks_stays_small() -> None:
    plan = samples.plan(LARGE, layers=126)
    page = plan_page(plan)
    Reader(page)
    assert len(page.encode()) < 5_000_000
    assert f"Shown: {MAX_SLICES:,} of 8,200 slices" in page


def test_the_same_input_gives_the_same_bytes(run_page: str, run_folder: Path) -> None:
    source = load_report_input(run_folder)
    assert render_page(source) == run_page


def test_hostile_text_stays_text() -> None:
    plan = samples.plan(name=HOSTILE)
    other = dataclasses.replace(plan.alternatives[0], reason=HOSTILE)
    plan = dataclasses.replace(
        plan,
        cluster=dataclasses.replace(plan.cluster, name=HOSTILE),
        rejected={HOSTILE: 3},
        alternatives=(other,),
        digests={HOSTILE: HOSTILE},
        not_modelled=(HOSTILE,),
    )
    row = dataclasses.replace(samples.COMPARISON[0], label=HOSTILE, strategy=HOSTILE)
    event = dataclasses.replace(plan.timeline[0], name=HOSTILE)
    plan = dataclasses.replace(plan, timeline=(*plan.timeline, event))
    page = Reader(render_page(ReportInput(plan=plan, comparison=(row, row))))
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 8


# What the page says


def test_the_headline_says_what_was_predicted_and_measured(run_page: str) -> None:
    text = Reader(run_page).text
    assert "a step should take 1.11 s (999 ms to 1.243 s)" in text
    assert "Measured: 1.16 s, inside that interval; predicted 4.3 % too low." in text
    assert "fits in memory" in text and "533 MiB 76 % of 700 MiB" in text
    assert "MFU unknown the device's peak FLOP/s is not known" in text


def test_days_dollars_and_mfu_where_they_are_known() -> None:
    plan = samples.plan()
    estimate = dataclasses.replace(plan.estimate, mfu=0.413, days=12.5, cost_usd=98765.4)
    text = Reader(plan_page(dataclasses.replace(plan, estimate=estimate))).text
    assert "MFU 41.3 %" in text and "Whole run 12.5 days" in text and "Cost $98,765" in text
    assert "Cost" not in Reader(plan_page(plan)).text


def priced_run(folder: Path, usd_per_hour: float | None, *, finished: bool = True) -> Path:
    """A run of 40 steps of which the summary, or only the last line of a killed run, knows the dollars."""
    sample = samples.plan()
    cluster = dataclasses.replace(sample.cluster, price_usd_per_hour=usd_per_hour)
    samples.write_run(folder, dataclasses.replace(sample, cluster=cluster))
    spent = None if usd_per_hour is None else usd_per_hour * 60 / 3600
    expected = None if spent is None else 2 * spent
    dollars = {"cost_usd": spent, "expected_cost_usd": expected}
    if finished:
        summary = json.loads((folder / "summary.json").read_text())
        text = json.dumps({**summary, "last_step": 40, "predicted_cost_usd": 1.0, **dollars})
        (folder / "summary.json").write_text(text)
    else:
        (folder / "summary.json").unlink()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**line, "step": line["step"] + 1, **dollars}) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("finished", [True, False])
def test_dollars_spent_stand_beside_those_predicted(tmp_path: Path, finished: bool) -> None:
    """$90 an hour: 40 steps of 1.11 s are $1.11, a minute is $1.50."""
    folder = priced_run(tmp_path, 90.0, finished=finished)
    text = Reader(render_page(load_report_input(folder))).text
    assert "Cost of 40 steps $1.11 predicted" in text and "$1.50" in text
    assert "Cost so far $1.50" in text and "Cost expected in all $3.00" in text
    result = CliRunner().invoke(report, [str(folder)])
    assert "cost   $1.50 spent in 40 steps, $1.11 predicted for them; $3.00 expected in all" in result.stdout
    document = json.loads(CliRunner().invoke(report, [str(folder), "--json"]).stdout)
    assert document["dollars"] == {
        "steps": 40,
        "spent_usd": 1.5,
        "predicted_usd": pytest.approx(1.11),
        "expected_usd": 3.0,
    }


def test_dollars_of_a_run_without_a_price_are_unknown_and_never_0(tmp_path: Path) -> None:
    folder = priced_run(tmp_path, None)
    text = Reader(render_page(load_report_input(folder))).text
    assert "Cost so far unknown" in text and "Cost of" not in text and "$" not in text
    stdout = CliRunner().invoke(report, [str(folder)]).stdout
    assert "cost   unknown: local:4 has no price" in stdout and "$" not in stdout
    dollars = json.loads(CliRunner().invoke(report, [str(folder), "--json"]).stdout)["dollars"]
    assert (dollars["spent_usd"], dollars["predicted_usd"], dollars["expected_usd"]) == (None, None, None)


def test_the_whole_run_is_told_at_its_goodput_with_its_spare_nodes() -> None:
    sample = samples.plan()
    job = figures_of(
        Job(
            step_s=sample.estimate.step_time_s,
            compute_s=0.0,
            tokens_per_step=4096,
            tokens=10**9,
            devices=4,
            nodes=1,
            rated_nodes=0.5,
            usual_failures_per_s=1e-5,
            checkpoint_bytes=1e9,
            staging_s=0.0,
            usd_per_hour=10.0,
        ),
        JobOverheads(checkpoint_every=100, restart_s=1000.0, repair_s=3600.0, spares=1),
    )
    cluster = dataclasses.replace(sample.cluster, price_usd_per_hour=10.0)
    estimate = dataclasses.replace(sample.estimate, days=3.0, cost_usd=720.0, job=job)
    priced = dataclasses.replace(sample, cluster=cluster, estimate=estimate)
    assert job.days is not None and job.cost_usd is not None and job.cost_usd > 1440
    text = Reader(plan_page(priced)).text
    assert f"Cost {format_usd(job.cost_usd)}" in text and f"goodput of {100 * job.goodput:.1f} %" in text
    assert usd_per_hour(priced) == 20.0
    assert predicted_usd(priced, 100) == pytest.approx(20 * 111 / 3600 / job.goodput)
    unknown = dataclasses.replace(
        priced,
        cluster=sample.cluster,
        estimate=dataclasses.replace(estimate, cost_usd=None, job=dataclasses.replace(job, cost_usd=None)),
    )
    assert "Cost unknown local:4 has no price" in Reader(plan_page(unknown)).text


def test_a_page_of_a_plan_alone_has_no_measured_part() -> None:
    page = Reader(plan_page(samples.plan()))
    assert {"plan", "timeline", "memory", "why", "basis"} <= set(page.ids)
    assert not {"training", "comparison"} & set(page.ids)
    assert not [v for _, name, v in page.attributes if name == "class" and "diamond" in v]
    assert "Measured:" not in page.text


def test_a_page_of_an_estimate_has_no_certificate() -> None:
    page = Reader(render_page(ReportInput(plan=samples.plan(solved=False))))
    assert not {"why", "timeline", "training", "comparison"} & set(page.ids)
    assert {"plan", "memory", "basis"} <= set(page.ids)


def test_a_page_of_a_run_has_every_section(run_page: str) -> None:
    page = Reader(run_page)
    assert {"plan", "timeline", "memory", "comparison", "training", "why", "basis"} <= set(page.ids)
    for words in (
        "no plan of the searched space is predicted to be faster",
        "96 global shapes",
        "heads divide",
    ):
        assert words in page.text
    assert "why it lost" in page.text and "gathers parameters twice a micro-batch" in page.text
    assert "the first step's compilation" in page.text and "sha256:1a2b3c4d" in page.text
    assert "72 % measured on this device" in page.text


def test_what_ran_otherwise_than_planned_is_said_at_the_top(run_folder: Path) -> None:
    source = load_report_input(run_folder)
    assert source.run is not None and source.run.summary is not None
    summary = dataclasses.replace(source.run.summary, executed_differences=("zero: 3 instead of 1",))
    steps = (dataclasses.replace(source.run.steps[0], loss=None), *source.run.steps[1:])
    run = dataclasses.replace(source.run, summary=summary, steps=steps)
    text = Reader(render_page(dataclasses.replace(source, run=run))).text
    assert "What ran differs from the plan: zero: 3 instead of 1" in text
    assert "The loss was not a finite number in 1 of 40 steps, first in step 0" in text


@pytest.mark.parametrize(
    ("predicted", "measured", "words", "tone"),
    [
        (1.0, 1.0, "predicted exactly", "good"),
        (1.05, 1.0, "predicted 5.0 % too high", "good"),
        (0.8, 1.0, "predicted 20.0 % too low", "fair"),
        (2.0, 1.0, "predicted 100.0 % too high", "bad"),
        (1.0, None, "", ""),
    ],
)
def test_errors_in_words(predicted: float, measured: float | None, words: str, tone: str) -> None:
    assert describe_error(predicted, measured) == (words, tone)


def test_a_plan_of_zeros_is_still_reported() -> None:
    plan = samples.plan()
    zeros = dataclasses.replace(
        plan.estimate,
        step_time_s=0.0,
        step_time_interval_s=(0.0, 0.0),
        breakdown=plan.estimate.breakdown * 0.0,
        memory_limit_bytes=0,
    )
    plan = dataclasses.replace(plan, estimate=zeros)
    assert "a step should take 0 us" in headline(plan, None)
    Reader(plan_page(plan))


# The picture


def test_groups_partition_the_ranks() -> None:
    shape = LARGE.grid_shape()
    for axis, size in enumerate(shape):
        groups = groups_along(shape, axis)
        assert sorted(rank for group in groups for rank in group) == list(range(LARGE.world))
        assert {len(group) for group in groups} == {size}


def test_ranks_print_short() -> None:
    assert print_ranks((3,)) == "3"
    assert print_ranks((0, 2)) == "0, 2"
    assert print_ranks((4, 5, 6)) == "4-6"
    assert print_ranks((0, 8, 16, 24)) == "0, 8, 16, 24"
    assert print_ranks(tuple(range(0, 80, 8))) == "0, 8, … 72"


def test_the_picture_shows_each_layer_once_with_its_mark() -> None:
    plan = samples.plan(dataclasses.replace(LARGE, num_micro_batches=8), layers=30)
    cells = [cell for row in draw_plan(plan).rows for stage in row.stages for cell in stage.cells]
    layers = sorted((int(cell.text), cell.mark) for cell in cells if cell.text.isdigit())
    options = [str(option) for stage in plan.strategy.stages for option in stage.recompute.options()]
    assert layers == list(enumerate(options))
    assert [cell.text for cell in cells if cell.mark == "end"] == ["E", "H"]


def test_the_picture_names_the_groups_of_a_rank() -> None:
    picture = draw_plan(samples.plan())
    chips = [chip for row in picture.rows for box in row.boxes for chip in box.chips]
    assert [chip.rank for chip in chips] == [0, 1, 2, 3]
    assert chips[2].tip == "rank 2; pipeline group 0, 2; tensor group 2, 3"
    assert [axis.groups for axis in picture.axes] == ["{0, 2}  {1, 3}", "{0, 1}  {2, 3}"]


# Timelines and bars


def test_both_timelines_have_the_same_scale(run_folder: Path) -> None:
    source = load_report_input(run_folder)
    plan = source.plan
    predicted = slices_of(plan.timeline)
    slower = tuple(
        dataclasses.replace(s, start_s=2 * s.start_s, duration_s=2 * s.duration_s) for s in predicted
    )
    figures = timeline_figures(plan, predicted, slower)
    assert [figure.title for figure in figures] == ["Predicted", "Measured"]
    widths = [_bar_widths(figure.svg) for figure in figures]
    assert len(widths[0]) == len(predicted)
    for fast, slow in zip(*widths, strict=True):
        assert slow == pytest.approx(2 * fast, rel=1e-6)


def _bar_widths(svg: str) -> list[float]:
    paths = re.findall(r'aria-roledescription="bar" d="M[^h]*h([\d.]+)', svg)
    return [float(width) for width in paths]


def test_memory_bars_of_interleaved_stages_add_up() -> None:
    degrees = dataclasses.replace(LARGE, num_micro_batches=8)
    plan = samples.plan(degrees, layers=32)
    figure = memory_figure(plan, None)
    assert figure.table is not None
    assert len(figure.table.rows) == degrees.pp
    tenants = len(MEMORY_TENANTS)
    assert len(_bar_widths(figure.svg)) == degrees.pp * tenants
    stages = plan.stage_estimates
    total = (stages[0].memory + stages[degrees.pp].memory).total_bytes
    assert figure.table.rows[0][tenants + 1] == f"{total / 2**20:.4g} MiB"


def test_a_far_limit_is_told_and_not_drawn() -> None:
    plan = samples.plan()
    assert "dashed" in memory_figure(plan, None).caption
    far = dataclasses.replace(plan.estimate, memory_limit_bytes=2**40)
    figure = memory_figure(dataclasses.replace(plan, estimate=far), None)
    assert "far beyond" in figure.caption and "stroke-dasharray" not in figure.svg


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("2F0", SliceKind.FORWARD),
        ("12B345", SliceKind.BACKWARD),
        ("0W1", SliceKind.WEIGHT_GRAD),
        ("optimizer", SliceKind.OPTIMIZER),
        ("reduce", SliceKind.DP_COMM),
        ("unshard", SliceKind.DP_COMM),
        ("data loading", SliceKind.OTHER),
    ],
)
def test_events_are_known_by_name(name: str, kind: SliceKind) -> None:
    assert classify(name) is kind


def test_idle_share_counts_overlaps_once() -> None:
    def piece(row: int, start_s: float, duration_s: float) -> Slice:
        return Slice(row=row, name="0F0", kind=SliceKind.FORWARD, start_s=start_s, duration_s=duration_s)

    assert idle_share((piece(0, 0, 2), piece(0, 1, 3), piece(1, 0, 1)), 2) == pytest.approx(3 / 8)
    assert idle_share((), 2) == 0.0


def test_one_rank_of_each_pipeline_rank_is_drawn(run_folder: Path) -> None:
    source = load_report_input(run_folder)
    assert source.run is not None
    every = slices_of(source.run.timeline)
    drawn = first_rank_of_each(every, source.plan.strategy.degrees)
    assert {s.row for s in every} == {0, 1, 2, 3} and {s.row for s in drawn} == {0, 1}
    assert [s.start_s for s in drawn if s.row == 1] == [s.start_s for s in every if s.row == 2]


# The trace


def test_the_trace_has_two_processes_with_named_threads(run_folder: Path) -> None:
    source = load_report_input(run_folder)
    assert source.run is not None
    predicted = slices_of(source.plan.timeline)
    measured = slices_of(source.run.timeline)
    trace = json.loads(print_trace(build_trace(predicted, measured, HOSTILE)))
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in {"X", "M", "s", "f"} and isinstance(event["name"], str)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["ts"] >= 0
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert names["process_name", 1, 0] == {"name": f"predicted: {HOSTILE}"}
    assert names["process_name", 2, 0] == {"name": f"measured: {HOSTILE}"}
    assert [names["thread_name", 2, rank]["name"] for rank in range(4)] == [
        f"rank {rank}" for rank in range(4)
    ]
    for pid, slices in ((1, predicted), (2, measured)):
        drawn = [
            (e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == pid
        ]
        assert drawn == [(s.row, s.name, s.start_s * 1e6, s.duration_s * 1e6) for s in slices]


def test_flows_lead_from_a_pass_to_the_same_micro_batch_on_the_next_stage() -> None:
    plan = samples.plan(Degrees(pp=4, num_micro_batches=4))
    slices = slices_of(plan.timeline)
    events = build_trace(slices, (), "x")["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == 2 * 3 * 4
    for number, start in starts.items():
        source, target = (_slice_at(slices, event) for event in (start, ends[number]))
        (stage, kind, micro_batch), reached = source.action, target.action
        assert reached == (stage + (1 if kind == "F" else -1), kind, micro_batch)
        assert start["ts"] <= ends[number]["ts"]


def _slice_at(slices: tuple[Slice, ...], event: dict[str, float]) -> Slice:
    at_s = event["ts"] / 1e6
    found = [s for s in slices if s.row == event["tid"] and s.start_s <= at_s <= s.end_s]
    assert len(found) == 1
    return found[0]


# Comparison


def _row(label: str, predicted_s: float, measured_s: float, chosen: bool = False) -> ComparisonRow:
    return ComparisonRow(
        label=label,
        strategy="tp1",
        predicted_step_time_s=predicted_s,
        measured_step_time_s=measured_s,
        predicted_peak_memory_bytes=90,
        measured_peak_memory_bytes=100,
        chosen=chosen,
    )


def test_the_order_is_judged_over_plans_that_differ() -> None:
    rows = (_row("a", 1.0, 1.0), _row("b", 2.0, 1.05, chosen=True), _row("c", 1.5, 2.0), _row("d", 1.2, 3.0))
    order = judge_order(rows)
    # a-b is a tie as measured; of a-c, a-d, b-c, b-d and c-d the first two are right.
    assert (order.pairs, order.right) == (5, 2)
    assert order.regret == pytest.approx(0.05)
    assert rows[0].memory_error == pytest.approx(-0.1)


def test_a_comparison_with_impossible_figures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    good = json.loads(json.dumps([dataclasses.asdict(_row("a", 1.0, 1.0))]))
    path.write_text(json.dumps(good))
    assert load_comparison(path) == (_row("a", 1.0, 1.0),)
    path.write_text(json.dumps([{**good[0], "measured_step_time_s": 0.0, "measured_peak_memory_bytes": -1}]))
    with pytest.raises(InputError) as error:
        load_comparison(path)
    assert len(error.value.problems) == 2
    path.write_text("[]")
    with pytest.raises(InputError, match="no plan"):
        load_comparison(path)


# Reading a run


def test_files_that_are_absent_are_left_out(tmp_path: Path) -> None:
    save_plan(samples.plan(), tmp_path / "plan.json")
    assert load_report_input(tmp_path).run is None
    (tmp_path / "metrics.jsonl").write_text("")
    source = load_report_input(tmp_path)
    assert source.run is not None and source.run.steps == ()
    assert source.run.step_time_s is None and source.run.peak_memory_bytes is None
    assert "training" not in Reader(render_page(source)).ids


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no plan\.json"):
        load_report_input(tmp_path)


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = '{"step": %d, "loss": %s, "step_time_s": %s, "timed": %s, "new_key": 1}\n'
    path.write_text(
        line % (1, "NaN", 9.0, "false")
        + line % (2, 4.0, 1.0, "true")
        + line % (3, 3.5, 1.2, "true")
        + line % (3, 3.4, 1.4, "true")
        + '{"step": 4, "lo'
    )
    steps, notes = load_metrics(path)
    assert [(s.step, s.loss, s.step_time_s) for s in steps] == [(1, None, 9.0), (2, 4.0, 1.0), (3, 3.4, 1.4)]
    assert len(notes) == 1 and "cut off" in notes[0]
    save_plan(samples.plan(), tmp_path / "plan.json")
    run = load_report_input(tmp_path).run
    assert run is not None and run.step_time_s == pytest.approx(1.2)


def test_steps_of_an_earlier_plan_are_shown_but_not_timed(tmp_path: Path) -> None:
    save_plan(samples.plan(), tmp_path / "plan.json")
    line = '{"step": %d, "loss": 2.0, "step_time_s": %s, "peak_memory_bytes": %s}\n'
    (tmp_path / "metrics.jsonl").write_text(line % (1, 9.0, [50, 60]) + line % (2, 1.5, [1, 2, 3, 4]))
    source = load_report_input(tmp_path)
    assert source.run is not None
    assert source.run.step_time_s == 1.5 and source.run.peak_memory_by_rank == (1, 2, 3, 4)
    assert "1 step ran by an earlier plan" in Reader(render_page(source)).text


def test_a_run_without_a_timed_step_says_so(tmp_path: Path) -> None:
    save_plan(samples.plan(), tmp_path / "plan.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "step_time_s": 3.0, "timed": false}\n')
    source = load_report_input(tmp_path)
    assert source.run is not None and source.run.step_time_s is None
    assert "No step was timed." in Reader(render_page(source)).text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "step_time_s": 1.0}\n{"step": 2,\n', "line 2: is not JSON"),
        ("metrics.jsonl", "[1]\n", "line 1: holds a list"),
        ("metrics.jsonl", '{"step": 1}\n', "step_time_s"),
        ("metrics.jsonl", '{"step": 1, "step_time_s": -1.0}\n', "above 0"),
        ("summary.json", '{"measured_peak_memory_bytes_by_rank": [1]}', "has 4 ranks"),
        ("summary.json", "{", "is not JSON"),
        ("summary.json", '{"measured_step_time_s": "fast"}', "measured_step_time_s"),
        ("timeline.json", '[{"rank": 7, "name": "0F0", "start_s": 0.0, "duration_s": 1.0}]', "has 4 ranks"),
        ("timeline.json", '[{"rank": 0, "name": "0F0", "start_s": 0.0, "duration_s": -1.0}]', "0 or more"),
        ("timeline.json", '{"events": []}', "timeline.json"),
        ("comparison.json", '[{"label": "a"}]', "strategy"),
    ],
)
def test_files_that_are_broken_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    save_plan(samples.plan(), tmp_path / "plan.json")
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_report_input(tmp_path)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("strategy", "pp"), 3, "stages"),
        (("strategy", "tp"), 0, "degree below 1"),
        (("stages", 0, "recompute", "none"), 5, "6 layers"),
        (("timeline", 3, "rank"), 2, "timeline.3"),
        (("timeline", 0, "duration_s"), -1.0, "timeline.0"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused(
    tmp_path: Path, key: tuple[str | int, ...], value: float, message: str
) -> None:
    path = tmp_path / "plan.json"
    save_plan(samples.plan(), path)
    document = json.loads(path.read_text())
    inner = document
    for part in key[:-1]:
        inner = inner[part]
    inner[key[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        load_report_input(path)


def test_a_timeline_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(samples.measured(samples.plan())))
    assert min(event.start_s for event in load_timeline(path)) == 0.0


# The command


def test_the_command_writes_page_and_trace(run_folder: Path, tmp_path: Path) -> None:
    page, trace = tmp_path / "out" / "page.html", tmp_path / "out" / "my.json"
    result = CliRunner().invoke(report, [str(run_folder), "-o", str(page), "--trace", str(trace), "--json"])
    assert result.exception is None
    assert json.loads(result.stdout) == {"page": str(page), "trace": str(trace)}
    assert "llama-demo-30m" in page.read_text()
    processes = {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert processes == {1, 2}


def test_the_command_defaults_beside_its_input(tmp_path: Path) -> None:
    save_plan(samples.plan(), tmp_path / "plan.json")
    result = CliRunner().invoke(report, [str(tmp_path / "plan.json")])
    assert result.exception is None
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "report.html"}


def test_the_command_refuses_what_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(report, [str(tmp_path / "nothing.json")])
    assert isinstance(result.exception, InputError) and "no such file" in str(result.exception)


def test_no_half_page_is_left_when_the_page_cannot_be_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "x")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(ReportInput(plan=samples.plan()), tmp_path / "file" / "report.html", None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FRAME = """<!DOCTYPE html><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>
window.addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const wide = [...page.body.querySelectorAll("*")].filter((node) => node.closest(".scroll") === null
    && node.id !== "tip" && node.getBoundingClientRect().right > root.clientWidth + 1);
  document.title = [root.clientWidth, root.scrollWidth, ...wide.map((node) => node.className)].join("|");
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_in_a_browser(run_page: str, tmp_path: Path, width: int) -> None:
    # A frame, since a window of Chromium is never narrower than 500 pixels.
    path = tmp_path / "frame.html"
    path.write_text(FRAME.format(width=width, page=html.escape(run_page)))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
    ]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None and title[1] == f"{width}|{width}"
    assert "CONSOLE" not in done.stderr


def test_the_profiles_behind_a_plan_are_named_with_what_does_not_fit() -> None:
    use = ProfileUse(
        device="cpu", name="mine", devices=("cpu",), measured=True, created="2025-01-01", torch="2.5.0",
        remarks=("it is 22 months old",),
    )  # fmt: skip
    plan = dataclasses.replace(samples.plan(), profiles=(use,))
    text = Reader(render_page(ReportInput(plan=plan))).text
    assert "cpu: mine, measured on cpu with torch 2.5.0, 2025-01-01; mind: it is 22 months old" in text

"""The page of hardware choices: complete, self-contained, safe against hostile names, true to its figures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable

import pytest

from planner.cost.goodput import Job, figures_of
from planner.foundation.units import DAY_S
from planner.job.objective import Goal, Minimise
from planner.job.problem import BEST, JobOverheads
from planner.report import options_bars as bars
from planner.report import options_plot as plots
from planner.report import options_tables as tables
from planner.report import options_words as words
from planner.report.charts import MARK_COLOURS
from planner.report.comparison_page import render_comparison
from planner.sizing.comparison import Comparison, Pricing
from tests import comparison_samples as samples
from tests.html_reader import Reader


@pytest.fixture(scope="module")
def usual() -> Comparison:
    return samples.comparison()


@pytest.fixture(scope="module")
def page(usual: Comparison) -> str:
    return render_comparison(usual)


# The page as a document


@pytest.mark.parametrize("build", samples.SAMPLES.values(), ids=samples.SAMPLES)
def test_every_sample_is_one_document_that_fetches_nothing(build: Callable[[], Comparison]) -> None:
    sample = build()
    text = render_comparison(sample)
    document = Reader(text)
    assert len(text.encode()) < 5_000_000
    rows = sum(value.startswith("o") and value[1:].isdigit() for value in document.ids)
    assert rows == len(sample.options)
    links = [
        value
        for _, name, value in document.attributes
        if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "ping"}
    ]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(document.ids)
    referred = [v for _, n, v in document.attributes if n in {"aria-labelledby", "aria-describedby"}]
    assert referred and set(referred) <= set(document.ids)
    assert len(document.ids) == len(set(document.ids))
    policies = [v for _, _, v in document.attributes if "default-src" in v]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none';")
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]
    script = text[text.rindex("<script>") :]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|import\(|sendBeacon|eval", script)


def test_every_colour_of_the_page_is_defined(page: str) -> None:
    defined = set(re.findall(r"(--[a-z0-9-]+):", page))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page)) - {"--natural"} <= defined  # only charts have that
    assert len(MARK_COLOURS) == len(plots.SHAPES)


def test_the_same_comparison_gives_the_same_bytes(page: str) -> None:
    assert render_comparison(samples.comparison()) == page


def test_hostile_text_stays_text() -> None:
    document = Reader(render_comparison(samples.hostile()))
    assert document.tags.count("script") == 2 and document.tags.count("style") == 1
    assert "img" not in document.tags
    assert document.text.count(samples.HOSTILE) > 50


def test_a_sample_is_as_large_as_a_whole_catalog() -> None:
    assert len(samples.many().options) > 2000


# The answer


def test_the_answer_is_the_cheapest_that_keeps_the_goal(usual: Comparison) -> None:
    picks = words.pick(usual)
    met = [o for o in usual.options if o.meets]
    assert picks.best is picks.cheapest and picks.best is not None
    assert picks.best.cost_usd == min(o.cost_usd for o in met if o.cost_usd is not None)
    assert picks.fastest is not None and picks.fastest.days == min(o.days for o in met)
    assert picks.smallest is not None and picks.smallest.devices == min(o.devices for o in met)
    sentence = words.headline(usual, picks)
    assert sentence.startswith("The cheapest way that keeps a deadline of 30 days and a budget of $4M is ")
    assert picks.best.name in sentence and words.usd(picks.best.cost_usd) in sentence
    assert words.usd_range(picks.best) in sentence and words.days_range(picks.best) in sentence


def test_within_a_budget_the_least_time_is_the_answer() -> None:
    goal = Goal(minimise=Minimise.TIME, budget_usd=4_000_000)
    sample = samples.comparison(goal=goal)
    picks = words.pick(sample)
    assert picks.best is picks.fastest
    assert words.headline(sample, picks).startswith("The soonest way that keeps a budget of $4M is ")


def test_where_nothing_meets_the_goal_the_nearest_are_named() -> None:
    sample = samples.none_meets()
    picks = words.pick(sample)
    assert picks.best is None and picks.fastest is not None and picks.cheapest is not None
    sentence = words.headline(sample, picks)
    assert sentence.startswith("No option keeps a deadline of 24 h and a budget of $100,000.")
    assert picks.fastest.name in sentence and picks.cheapest.name in sentence
    assert "plan solve" not in Reader(render_comparison(sample)).text


def test_no_option_at_all_is_said_and_explained() -> None:
    text = Reader(render_comparison(samples.empty())).text
    assert "None of the offers has a plan that fits" in text
    assert "no plan fits in 14.6 GiB a device" in text and "aws/g4dn.xlarge, aws/g4dn.12xlarge" in text


def test_unknown_prices_are_unknown_and_never_nothing() -> None:
    sample = samples.unpriced()
    text = Reader(render_comparison(sample)).text
    assert "4 options have no known price: their cost is unknown, not zero." in text
    assert not re.search(r"\$0(?![.\d]*[1-9])", text)
    assert plots.build_plot(sample) is None
    row = tables.option_rows(sample)[0]
    cost = row.cells[[key for _, key in tables.COLUMNS].index("cost")]
    assert cost.text == "unknown" and cost.value is None
    assert row.goal == "late, price unknown"


def test_doubtful_prices_are_marked(page: str, usual: Comparison) -> None:
    doubtful = [o for o in usual.options if o.rate.doubtful]
    assert page.count('class="tag doubt"') == len(doubtful) > 0
    best = words.pick(samples.comparison(options=[doubtful[0]]))
    assert best.cheapest is not None
    warned = words.warnings(
        samples.comparison(options=[doubtful[0]]), dataclasses.replace(best, best=doubtful[0])
    )
    assert any("is doubtful: twice the median" in text for text in warned)


def test_the_command_of_the_best_is_one_that_the_shell_reads_back() -> None:
    sample = samples.hostile()
    best = words.pick(sample).best
    assert best is not None
    line = shlex.split(words.solve_command(sample, best))
    assert line[:2] == ["plan", "solve"]
    assert (
        line[line.index("--cluster") + 1] == best.cluster and line[line.index("--model") + 1] == sample.model
    )


def test_the_four_choices_stand_side_by_side(usual: Comparison) -> None:
    table = tables.side_by_side(usual)
    assert [row[0] for row in table.rows] == ["AWS", "Azure", "GCP", "On-premises"]
    assert [row[3] for row in table.rows].count("the cheapest") == 1
    azure = tables.cheapest_of(usual, "azure")
    own = tables.cheapest_of(usual, words.ON_PREMISES)
    assert azure is not None and own is not None and azure.cost_usd is not None and own.cost_usd is not None
    more = words.usd(azure.cost_usd - own.cost_usd)
    assert table.rows[1][3] == f"+{more} ({100 * (azure.cost_usd / own.cost_usd - 1):+.0f} %)"
    alone = tables.side_by_side(samples.single())
    assert [row[-1] for row in alone.rows].count("no option: see what is left out") == 3


# The plot


def test_points_lie_where_their_dollars_and_days_are(usual: Comparison) -> None:
    plot = plots.build_plot(usual)
    assert plot is not None
    assert len(plot.points) == sum(o.cost_usd is not None for o in usual.options)
    assert all(0 < point.x < 100 and 0 < point.y < 100 for point in plot.points)
    by_days = sorted(plot.points, key=lambda p: p.x)
    days = [usual.options[p.row].days for p in by_days]
    assert all(a <= b * 1.001 for a, b in itertools.pairwise(days))
    by_cost = sorted(plot.points, key=lambda p: -p.y)
    costs = [usual.options[p.row].cost_usd or 0.0 for p in by_cost]
    assert all(a <= b * 1.001 for a, b in itertools.pairwise(costs))
    assert {p.row for p in plot.points if p.front} == {i for i, o in enumerate(usual.options) if o.pareto}


def test_nothing_lies_below_the_front(usual: Comparison) -> None:
    plot = plots.build_plot(usual)
    assert plot is not None and plot.front
    for point in plot.points:
        for piece in plot.front:
            level = piece.y1 == piece.y2
            if level and piece.x1 + 0.02 < point.x < piece.x2 - 0.02:
                assert point.y <= piece.y1 + 0.02


def test_limits_are_lines_and_far_ones_are_words(usual: Comparison) -> None:
    plot = plots.build_plot(usual)
    assert plot is not None and plot.deadline is not None and plot.budget is not None
    late = [p.x for p in plot.points if usual.options[p.row].days > 30]
    assert plot.deadline.at is not None and min(late) > plot.deadline.at
    dear = [p.y for p in plot.points if (usual.options[p.row].cost_usd or 0) > 4_000_000]
    assert plot.budget.at is not None and max(dear) < plot.budget.at
    far = plots.build_plot(samples.comparison(goal=Goal(deadline_s=1e6 * DAY_S, budget_usd=10.0)))
    assert far is not None and far.deadline is not None and far.budget is not None
    assert far.deadline.at is None and far.deadline.text == "deadline 1,000,000 days, outside the plot"
    assert far.budget.at is None


@pytest.mark.parametrize("low", [0.003, 0.7, 1.0, 9.9, 123.0, 4.2e5])
@pytest.mark.parametrize("factor", [1.001, 1.4, 3.0, 40.0, 1e3, 1e7])
def test_axes_have_a_few_round_ticks(low: float, factor: float) -> None:
    ticks = plots.log_ticks(plots.axis_of([low, low * factor], None), words.short_number)
    assert 2 <= len(ticks) <= plots.MOST_TICKS + 4
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)
    assert all(0 <= tick.at <= 100 for tick in ticks)


def test_options_without_end_do_not_press_the_others_together(usual: Comparison) -> None:
    endless = dataclasses.replace(usual.options[-1], days=1e14, cost_usd=1e19, pareto=False)
    plot = plots.build_plot(dataclasses.replace(usual, options=(*usual.options, endless)))
    before = plots.build_plot(usual)
    assert plot is not None and before is not None
    assert plot.points == before.points and (plot.beyond, before.beyond) == (1, 0)


def test_providers_beyond_the_shapes_share_one() -> None:
    options = [
        dataclasses.replace(
            samples.option(samples.OFFERS[0], 64, Pricing.ON_DEMAND), provider=f"cloud{index}"
        )
        for index in range(20)
    ]
    marks = plots.marks_of(options)
    assert [mark.shape for mark in marks] == list(range(len(plots.SHAPES)))
    assert marks[-1].title == "other providers" and sum(mark.count for mark in marks) == 20


def test_a_point_says_all_that_the_plan_is(usual: Comparison) -> None:
    text = words.tip(usual.options[0])
    option = usual.options[0]
    for part in (option.name, option.plan.label, "SAFE", "MFU", "goodput", words.memory_words(option)):
        assert part in text


# Bars and tables


def test_shares_of_a_jobs_time_sum_to_one(usual: Comparison) -> None:
    for option in usual.options:
        shares = bars.loss_shares(option)
        assert shares is not None
        assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
        assert shares["kept steps"] == option.goodput


def test_every_loss_of_the_goodput_model_has_its_share(usual: Comparison) -> None:
    """Against the model's own figures: evaluation, ramp-up, preemptions, spares, checkpoints, failures."""
    option = usual.options[0]
    job = Job(
        step_s=option.step_time_s, compute_s=0.7 * option.step_time_s, tokens_per_step=4_194_304,
        tokens=samples.TOKENS, devices=1024, nodes=128, rated_nodes=128, usual_failures_per_s=5e-6,
        checkpoint_bytes=1e12, staging_s=3.0,
    )  # fmt: skip
    overheads = JobOverheads(
        checkpoint_every=BEST, storage_bytes_per_s=4e10, device_spread=0.01, ramp_up_s=40_000.0,
        repair_s=30_000.0, eval_s=60.0, eval_every=500, preemptions_per_1000_node_days=9.0,
    )  # fmt: skip
    figures = figures_of(job, overheads)
    shares = bars.loss_shares(dataclasses.replace(option, losses=figures, goodput=figures.goodput))
    assert shares is not None and figures.days is not None
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert shares["ramp-up"] == pytest.approx(40_000 / (figures.days * DAY_S), rel=1e-6)
    others = {"failures", "preemptions", "waiting for a node", "evaluation", "checkpoints", "stragglers"}
    assert all(shares[name] > 0 for name in others) and "other" not in shares


def test_a_steps_pieces_are_the_whole_step(usual: Comparison) -> None:
    figure = bars.step_bars(tables.few(usual, words.pick(usual)))
    assert figure is not None
    for row in figure.rows:
        assert sum(piece.share for piece in row.pieces) == pytest.approx(1)


def test_break_even_and_sensitivity_say_what_is_unknown(usual: Comparison) -> None:
    rows = tables.break_even_table(usual).rows
    assert rows[0][4] == "from 31 % in use" and rows[0][5] == "11.0 months"
    assert rows[1][4] == "never: renting is cheaper at full use" and rows[1][5] == "not in its years of use"
    assert "unknown to unknown" in tables.sensitivity_table(samples.unpriced()).rows[0]


def test_every_price_has_its_date_and_source_once(usual: Comparison) -> None:
    table = tables.price_table(usual.options)
    assert len(table.rows) == len({(o.provider, o.instance, o.rate.pricing) for o in usual.options})
    unknown = [row for row in table.rows if row[3] == "unknown"]
    assert len(unknown) == 1 and unknown[0][4] == "unknown"
    assert all(row[7].startswith("catalog of") for row in table.rows if row not in unknown)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"), (0.5, "$0.50"), (55.04, "$55.04"), (1234.4, "$1,234"), (999_999, "$999,999"),
        (1_234_567, "$1.235M"), (2.5e9, "$2.5B"), (-1.5e6, "-$1.5M"),
    ],
)  # fmt: skip
def test_dollars(value: float | None, text: str) -> None:
    assert words.usd(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (28.14, "28.1"), (1234.6, "1,235"), (99.96, "100")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert words.short_number(value) in (text, f"{text}.0")


def test_samples_survive_json(usual: Comparison) -> None:
    from planner.foundation.decode import decode_json, to_json

    assert decode_json(Comparison, to_json(usual), source="sample") == usual
    assert json.loads(to_json(usual))["options"]

"""The page: one HTML document that needs nothing but itself.

Its content security policy forbids every fetch, all text is escaped by the template, and the only markup
that is passed through are the charts that this program drew.

The templates of the pages, with every text escaped.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from planner.foundation.frozen import frozen
from planner.foundation.units import format_seconds
from planner.report import sections, verification, words
from planner.report.charts import COLOURS, Colour
from planner.report.picture import Picture, draw_plan
from planner.report.rehearsed import RehearsedSection, rehearsed_section
from planner.report.run_record import ReportInput, RunRecord
from planner.report.timeline import Slice, first_rank_of_each, slices_of
from planner.strategy.plan import Plan

if TYPE_CHECKING:
    from jinja2 import Environment, Template


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("planner.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template(name: str) -> Template:
    """A template of the folder `templates`."""
    return _environment().get_template(name)


@frozen
class Share:
    """A part of a whole, drawn as a piece of one bar."""

    name: str
    title: str
    share: float
    text: str


@frozen
class RuleCount:
    """How many candidates a rule took out; `share` is of the rule that took most."""

    rule: str
    count: int
    share: float


@frozen
class Page:
    """All that the template shows. An empty tuple or None leaves its section out."""

    title: str
    cluster: str
    verdict: str
    headline: str
    warnings: tuple[str, ...]
    tiles: tuple[words.Tile, ...]
    sentences: tuple[str, ...]
    facts: tuple[words.Fact, ...]
    strategy: str
    picture: Picture
    timelines: tuple[sections.Figure, ...]
    memory: sections.Figure
    time: sections.Figure
    rehearsed: RehearsedSection | None
    run_facts: tuple[words.Fact, ...]
    training: tuple[sections.Figure, ...]
    comparison: verification.Verification | None
    certificate: tuple[str, ...]
    certificate_facts: tuple[words.Fact, ...]
    rules: tuple[RuleCount, ...]
    alternatives: words.Table | None
    coverage: tuple[Share, ...]
    profiles: tuple[str, ...]
    not_modelled: tuple[str, ...]
    digests: tuple[words.Fact, ...]
    versions: tuple[words.Fact, ...]
    colours: tuple[Colour, ...]


COVERAGE_WORDS = (
    ("measured", "measured on this device"),
    ("interpolated", "interpolated between measurements"),
    ("fitted", "from fitted constants"),
    ("datasheet", "from datasheets"),
)


def render_page(source: ReportInput) -> str:
    """The report as HTML."""
    return template("page.html.j2").render(page=build_page(source))


def build_page(source: ReportInput) -> Page:
    """Everything that the page says, in order."""
    plan, run = source.plan, source.run
    solver = plan.solver
    return Page(
        title=plan.model.name,
        cluster=plan.cluster.name,
        verdict=str(plan.estimate.verdict),
        headline=words.headline(plan, run),
        warnings=words.run_warnings(run),
        tiles=words.headline_tiles(plan, run),
        sentences=words.plan_sentences(plan),
        facts=words.model_facts(plan),
        strategy=plan.strategy.degrees.label(),
        picture=draw_plan(plan),
        timelines=sections.timeline_figures(plan, slices_of(plan.timeline), _measured_slices(plan, run)),
        memory=sections.memory_figure(plan, run),
        time=sections.time_figure(plan, run),
        rehearsed=rehearsed_section(plan),
        run_facts=words.run_facts(run) if run else (),
        training=sections.training_figures(plan, run) if run else (),
        comparison=verification.verify(source.comparison) if source.comparison else None,
        certificate=words.certificate_sentences(solver) if solver else (),
        certificate_facts=_certificate_facts(plan),
        rules=_rule_counts(plan),
        alternatives=sections.alternatives_table(plan) if plan.alternatives else None,
        coverage=_coverage(plan),
        profiles=tuple(f"{use.device}: {use.name}, {use.text()}" for use in plan.profiles),
        not_modelled=plan.not_modelled,
        digests=tuple(words.Fact(name=name, value=value) for name, value in sorted(plan.digests.items())),
        versions=words.version_facts(run),
        colours=COLOURS,
    )


def _measured_slices(plan: Plan, run: RunRecord | None) -> tuple[Slice, ...]:
    return first_rank_of_each(slices_of(run.timeline), plan.strategy.degrees) if run else ()


def _certificate_facts(plan: Plan) -> tuple[words.Fact, ...]:
    solver = plan.solver
    if solver is None:
        return ()
    facts = (
        ("Status", solver.status),
        ("Objective", format_seconds(solver.objective_s)),
        ("Lower bound", format_seconds(solver.lower_bound_s)),
        ("Gap", words.percent(solver.gap, 2)),
        ("Shapes", f"{solver.shapes:,}"),
        ("Pruned", f"{solver.pruned:,}"),
        ("MILPs solved", f"{solver.milps:,}"),
        ("Solver time", format_seconds(solver.wall_s)),
        ("Verified", "yes" if solver.verified else "no"),
    )
    return tuple(words.Fact(name=name, value=value) for name, value in facts)


def _rule_counts(plan: Plan) -> tuple[RuleCount, ...]:
    most = max(plan.rejected.values(), default=0)
    ordered = sorted(plan.rejected.items(), key=lambda item: (-item[1], item[0]))
    return tuple(
        RuleCount(rule=rule.replace("_", " "), count=count, share=count / most if most else 0.0)
        for rule, count in ordered
    )


def _coverage(plan: Plan) -> tuple[Share, ...]:
    coverage = plan.estimate.coverage
    return tuple(
        Share(name=name, title=title, share=share, text=words.percent(share, 0))
        for name, title in COVERAGE_WORDS
        if (share := getattr(coverage, name)) > 0
    )

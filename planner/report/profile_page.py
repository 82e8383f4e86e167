"""The page of `plan show profile`: what was measured on a device, one HTML document that needs nothing else.

Like the report, its content security policy forbids every fetch and the template escapes all text.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.profile.coverage import sampled_classes
from planner.profile.profile import Profile
from planner.report import profile_figures as figures
from planner.report import profile_tables as tables
from planner.report import profile_words as words
from planner.report.charts import COLOURS, MARK_COLOURS, Colour
from planner.report.page import template
from planner.report.profile_layers import LayerSection, formula_figures, layer_sections
from planner.report.profile_lines import ProfileLines
from planner.report.profile_operators import operator_figure
from planner.report.profile_rates import rate_figures
from planner.report.sections import Figure
from planner.report.words import Fact, Tile


@frozen
class ProfilePage:
    """All that the template shows. An empty tuple or None leaves its section out.

    `drifts` says that times are told as if the machine had kept one speed.
    """

    name: str
    where: str
    headline: str
    warnings: tuple[str, ...]
    tiles: tuple[Tile, ...]
    facts: tuple[Fact, ...]
    layers: tuple[LayerSection, ...]
    drifts: bool
    comms: tuple[Figure, ...]
    rates: tuple[Figure, ...]
    quality: tuple[Figure, ...]
    constants: tuple[tables.ConstantRow, ...]
    moved: Figure | None
    blocks: tuple[tables.BlockTable, ...]
    colours: tuple[Colour, ...]


def render_profile(profile: Profile, models: Sequence[ModelSpec], today: datetime.date) -> str:
    """The profile as HTML; `models` beside those of the catalog say what its layers are."""
    return template("profile.html.j2").render(page=build_profile_page(profile, models, today))


def build_profile_page(profile: Profile, models: Sequence[ModelSpec], today: datetime.date) -> ProfilePage:
    """Everything that the page says, in order."""
    classes, lines = sampled_classes(profile, models), ProfileLines(profile)
    spread = figures.spread_figure(profile, classes)
    return ProfilePage(
        name=profile.name,
        where=profile.device_title or profile.device,
        headline=words.headline(profile, classes, today),
        warnings=words.warnings(profile, today),
        tiles=words.tiles(profile, classes),
        facts=words.facts(profile, classes, today),
        layers=layer_sections(profile, classes, lines),
        drifts=any(sample.reference_s for sample in profile.layers),
        comms=figures.comm_figures(profile, lines),
        rates=rate_figures(profile),
        quality=(
            *formula_figures(profile, classes, lines),
            *(figure for figure in (operator_figure(profile), spread) if figure is not None),
        ),
        constants=tables.constant_rows(profile),
        moved=figures.constant_figure(profile),
        blocks=tables.block_tables(profile),
        colours=(*COLOURS, *MARK_COLOURS),
    )

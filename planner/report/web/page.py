"""The interactive page: the form, what is wrong with it, and the comparison below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.foundation.errors import Problem
from planner.foundation.frozen import frozen
from planner.report.comparison_page import build_options_page
from planner.report.palette import COLOURS, MARK_COLOURS
from planner.report.templating import template
from planner.report.web.asked import FIELDS
from planner.sizing.comparison import Comparison


@frozen
class WebPage:
    """The form around the comparison: what was typed, what is wrong, what there is to choose from."""

    values: Mapping[str, str]
    problems: tuple[Problem, ...]
    query: str
    nonce: str
    models: tuple[str, ...]
    choices: Mapping[str, Sequence[str]]


class _NoAnswer:
    """What the base of the page needs where there is no comparison."""

    model = "Which hardware?"
    colours = (*COLOURS, *MARK_COLOURS)


def render_web(web: WebPage, comparison: Comparison | None) -> str:
    """The page as HTML."""
    page = None if comparison is None else build_options_page(comparison)
    return template("web.html.j2").render(
        page=page or _NoAnswer, answered=page is not None, web=web, labels=FIELDS
    )

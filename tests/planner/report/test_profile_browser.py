"""The page of a profile in use: nothing is fetched, all can be read, on a desk, a phone, in the dark."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from planner.report.profile_page import render_profile
from tests import profile_samples as samples
from tests.browser import CONTRAST, Watched, open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    for name in ("rich", "hostile", "a100-published-runs"):
        page = render_profile(samples.SAMPLES[name](), (), datetime.date(2026, 12, 24))
        (made / f"{name}.html").write_text(page, encoding="utf-8")
    return made


@pytest.mark.parametrize("name", ["rich", "hostile", "a100-published-runs"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_the_page_reads_everywhere(
    browser: Browser, folder: Path, name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    watched, address = Watched(page), (folder / f"{name}.html").as_uri()
    page.goto(address)
    assert watched.errors == [] and watched.requests == [address]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for summary in page.locator("details summary").all():
        summary.click()
    assert page.evaluate(CONTRAST) == []
    context.close()


def test_a_dot_tells_its_numbers(browser: Browser, folder: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((folder / "rich.html").as_uri())
    dot = page.locator('#layers [aria-label^="tp 4, 4 x 8,192 tokens: forward"]').first
    told = dot.get_attribute("aria-label")
    dot.hover()
    assert page.inner_text("#tip") == told
    page.close()

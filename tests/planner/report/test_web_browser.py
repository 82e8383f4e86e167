"""`plan web` in a browser: an input changes, and the plot, the table and the bars move with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import CONTRAST, Watched, open_browser
from tests.web_server import Sampled, Served, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page as first opened; it may ask its own server alone, and the console stays silent."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    watched = Watched(opened)
    opened.goto(served.address)
    yield opened
    assert [e for e in watched.errors if "400" not in e] == []
    assert all(request.startswith(served.address) for request in watched.requests)
    opened.close()


def points(page: Page) -> list[tuple[str, str]]:
    found: list[list[str]] = page.evaluate(
        """Array.from(document.querySelectorAll('#points use'),
                      (point) => [point.getAttribute('x'), point.getAttribute('y')])"""
    )
    return [(x, y) for x, y in found]


def shows(page: Page, selector: str, text: str) -> None:
    """Waits for a text, without evaluating any: the page's policy forbids that."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text)


def answered(page: Page) -> None:
    shows(page, "#state", "Answered in")


def test_an_input_moves_the_plot_the_table_and_the_bars(page: Page, served: Served) -> None:
    before, headline = points(page), page.inner_text(".lead")
    bars = page.locator("#where .meters li").count()
    assert before and bars and "30 days" in headline
    page.fill("[name=deadline]", "400d")
    answered(page)
    assert points(page) != before and "400 days" in page.inner_text(".lead")
    assert page.locator("#points use").count() == len(before)
    page.evaluate("document.getElementById('state').textContent = ''")
    page.fill("[name=device]", "")
    answered(page)
    assert 0 < len(points(page)) < len(before)
    assert "deadline=400d" in page.url and "device=&" in page.url
    assert served.sampled.compared == ["30d", "400d", "400d"]
    page.click("#all-options th[data-key=days] button")
    assert page.get_attribute("#all-options th[data-key=days]", "aria-sort") == "ascending"


def test_filters_survive_an_answer(page: Page) -> None:
    page.select_option("#f-provider", "gcp")
    shows(page, "#count", " of ")
    page.fill("[name=deadline]", "90d")
    answered(page)
    assert page.input_value("#f-provider") == "gcp"
    shows(page, "#count", " of ")


def test_a_fault_is_shown_and_the_last_answer_stays(page: Page) -> None:
    headline = page.inner_text(".lead")
    page.fill("[name=deadline]", "soon")
    page.wait_for_selector("#problems li")
    assert page.inner_text("#problems") == "--deadline: 'soon' is <b>no time</b>. Fix: such as 30d."
    assert page.inner_text(".lead") == headline
    page.fill("[name=deadline]", "20d")
    answered(page)
    assert page.locator("#problems li").count() == 0


def test_fast_typing_shows_the_last_answer(browser: Browser) -> None:
    with serving(Sampled(slow_s=0.0)) as running:
        page = browser.new_page()
        page.goto(running.address)
        running.sampled.slow_s = 30.0
        page.fill("[name=deadline]", "50d")
        shows(page, "#state", "Computing")
        while running.sampled.compared[-1] != "50d":
            page.wait_for_timeout(10)
        running.sampled.slow_s = 0.0
        page.fill("[name=deadline]", "60d")
        answered(page)
        assert "60 days" in page.inner_text(".lead")
        assert running.sampled.given_up == ["50d"]
        page.close()


def test_plan_and_tables_are_downloaded(page: Page, tmp_path: Path) -> None:
    with page.expect_download() as plan:
        page.locator("#all-options .plan-of").first.click()
    assert plan.value.suggested_filename == "plan.json"
    plan.value.save_as(tmp_path / "plan.json")
    asked = json.loads((tmp_path / "plan.json").read_text())
    assert asked["cluster"] == page.locator("#all-options .plan-of").first.get_attribute("value")
    for name in ("CSV", "JSON"):
        with page.expect_download() as file:
            page.click(f".downloads a:has-text('{name}')")
        assert file.value.suggested_filename == f"comparison.{name.lower()}"


def test_without_scripts_the_button_asks(browser: Browser, served: Served) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(served.address)
    page.fill("[name=deadline]", "45d")
    page.click("#go")
    assert "45 days" in page.inner_text(".lead")
    page.close()


def test_a_server_that_is_gone_is_told(browser: Browser) -> None:
    with serving() as running:
        page = browser.new_page()
        page.goto(running.address)
    page.fill("[name=deadline]", "33d")
    shows(page, "#state", "does not answer")
    page.close()


def test_a_phone_scrolls_down_alone_and_text_stands_out(browser: Browser, served: Served) -> None:
    for scheme in ("light", "dark"):
        page = browser.new_page(
            viewport={"width": 360, "height": 740}, color_scheme="dark" if scheme == "dark" else "light"
        )
        page.goto(served.address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate(CONTRAST) == []
        page.close()

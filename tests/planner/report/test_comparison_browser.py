"""The page of hardware choices in use: sorted, filtered, hovered, by keyboard, on a phone, on paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from planner.report import options_tables as tables
from planner.report import options_words as words
from planner.report.comparison_page import render_comparison
from planner.sizing.comparison import Comparison
from tests import comparison_samples as samples
from tests.browser import CONTRAST, Watched, open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    for name, build in samples.SAMPLES.items():
        (made / f"{name}.html").write_text(render_comparison(build()), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def usual() -> Comparison:
    return samples.comparison()


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """A page; what it says to the console or asks of the network fails the test."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    watched = Watched(page)
    page.goto(address)
    yield page
    assert watched.errors == []
    assert watched.requests == [address]
    page.close()


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    with opened(browser, (folder / "usual.html").as_uri()) as usual:
        yield usual


@pytest.fixture
def short(browser: Browser, folder: Path) -> Iterator[Page]:
    with opened(browser, (folder / "short.html").as_uri()) as page:
        yield page


def column(page: Page, key: str) -> list[str]:
    """What the visible rows hold in a column, in order: the number that it sorts by, or its text."""
    found: list[str] = page.evaluate(
        """(key) => {
          const table = document.getElementById("all-options");
          const at = Array.from(table.tHead.rows[0].cells).findIndex((cell) => cell.dataset.key === key);
          return Array.from(table.tBodies[0].rows).filter((row) => row.checkVisibility()).map((row) => {
            const cell = row.cells[at];
            return cell.classList.contains("number") ? cell.dataset.v || "" : cell.innerText;
          });
        }""",
        key,
    )
    return found


def show_all(page: Page) -> None:
    while page.locator("#more").is_visible():
        page.click("#more")


def visible_points(page: Page) -> int:
    return int(page.locator("#points use:not(.off)").count())


# Sorting and filtering


def test_columns_of_numbers_sort_both_ways_and_unknown_stays_last(short: Page) -> None:
    page, rows = short, len(samples.short().options)
    keys = ("devices", *(key for _, key in tables.COLUMNS), "memory")
    for key, (way, sign) in itertools.product(keys, (("ascending", 1), ("descending", -1))):
        head = page.locator(f"#all-options th[data-key={key}]")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        assert page.locator("#all-options th[aria-sort]").count() == 1
        cells = column(page, key)
        known = [sign * float(cell) for cell in cells if cell]
        assert known == sorted(known) and len(cells) == rows and len(known) >= rows - 2
        assert cells[len(known) :] == [""] * (len(cells) - len(known))


def test_columns_of_words_sort_both_ways(short: Page) -> None:
    page = short
    for key in ("name", "provider", "pricing", "verdict", "goal"):
        button = page.locator(f"#all-options th[data-key={key}] button")
        button.click()
        up = column(page, key)
        button.click()
        down = column(page, key)
        first = [next(group) for _, group in itertools.groupby(up)]
        assert len(first) == len(set(up)) and (len(first) > 1 or key == "verdict")
        assert [next(group) for _, group in itertools.groupby(down)] == first[::-1]


def test_filters_leave_rows_and_points_that_match(page: Page, usual: Comparison) -> None:
    options = usual.options

    def expect(matching: list[bool], what: str) -> None:
        count = sum(matching)
        page.wait_for_function(
            "(text) => document.getElementById('count').textContent.startsWith(text)",
            arg="No option matches" if count == 0 else f"{count} of {len(options)} options",
            timeout=5000,
        )
        show_all(page)
        assert len(column(page, "name")) == count, what
        drawn = sum(m and o.cost_usd is not None for m, o in zip(matching, options, strict=True))
        assert visible_points(page) == drawn, what

    page.select_option("#f-provider", "gcp")
    expect([o.provider == "gcp" for o in options], "provider")
    page.select_option("#f-pricing", "spot")
    expect([o.provider == "gcp" and str(o.rate.pricing) == "spot" for o in options], "and pricing")
    page.click("#f-clear")
    page.select_option("#f-device", "b200-sxm")
    expect([o.device == "b200-sxm" for o in options], "device")
    page.click("#f-clear")
    page.fill("#f-low", "256")
    page.fill("#f-high", "768")
    expect([256 <= o.devices <= 768 for o in options], "counts")
    page.click("#f-clear")
    page.check("#f-pareto")
    expect([o.pareto for o in options], "Pareto")
    page.check("#f-meets")
    expect([o.pareto and o.meets for o in options], "and the goal")
    page.click("#f-clear")
    page.fill("#f-text", "P5en RESERVED")
    expect([o.instance.startswith("p5en") and "reserved" in o.rate.pricing for o in options], "text")
    page.fill("#f-text", "no such thing")
    expect([False for _ in options], "nothing")
    page.click("#f-clear")
    assert page.inner_text("#count").startswith(f"{len(options)} options, the first 100 shown")
    assert page.get_attribute("#count", "aria-live") == "polite"


def test_two_thousand_rows_sort_and_filter(browser: Browser, folder: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    watched = Watched(page)
    page.goto((folder / "many.html").as_uri())
    page.click("#all-options th[data-key=days] button")
    days = [float(value) for value in column(page, "days")]
    assert len(days) == 100 and days == sorted(days)
    page.click("#more")
    assert len(column(page, "days")) == 300
    page.check("#f-meets")
    sample = samples.many()
    met = sum(o.meets for o in sample.options)
    page.wait_for_function("document.getElementById('count').textContent.includes(' of ')")
    assert page.inner_text("#count").startswith(f"{met:,} of {len(sample.options):,} options")
    assert watched.errors == []
    page.close()


# Points


def test_hovering_shows_the_plan(page: Page, usual: Comparison) -> None:
    row = next(i for i, o in enumerate(usual.options) if o.pareto)
    page.locator(f"#points use[data-row='{row}']").hover()
    assert page.inner_text("#tip") == words.tip(usual.options[row])
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


@pytest.mark.parametrize(("name", "width"), [("many", 360), ("usual", 1400)])
def test_marks_stand_where_the_axes_say(browser: Browser, folder: Path, name: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((folder / f"{name}.html").as_uri())
    off = page.evaluate(
        """() => {
          const box = document.querySelector(".plot-area").getBoundingClientRect();
          return Array.from(document.querySelectorAll("#points use"), (point) => {
            const own = point.getBoundingClientRect();
            const part = (name) => parseFloat(point.getAttribute(name)) / 100;
            return Math.max(Math.abs(own.left + own.width / 2 - box.left - part("x") * box.width),
                            Math.abs(own.top + own.height / 2 - box.top - part("y") * box.height));
          });
        }"""
    )
    assert len(off) > 100 and max(off) < 3
    page.close()


def test_the_keyboard_reaches_points_and_their_rows(page: Page, usual: Comparison) -> None:
    def focused() -> int:
        return int(page.evaluate("Number(document.activeElement.dataset.row ?? -1)"))

    for _ in range(30):
        page.keyboard.press("Tab")
        if focused() >= 0:
            break
    first = focused()
    assert first >= 0 and usual.options[first].pareto
    assert page.inner_text("#tip") == words.tip(usual.options[first])
    page.keyboard.press("ArrowRight")
    second = focused()
    assert second != first and usual.options[second].days >= usual.options[first].days
    assert page.inner_text("#tip") == words.tip(usual.options[second])
    page.keyboard.press("ArrowDown")
    along = focused()
    assert usual.options[along].pareto
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("End")
    last = focused()
    priced = [o.days for o in usual.options if o.cost_usd is not None]
    assert usual.options[last].days == max(priced)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == f"o{last}"
    assert page.locator(f"#o{last}").is_visible()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.tagName") != "BODY"


def test_all_points_are_one_stop_of_the_tab_key(page: Page) -> None:
    assert page.locator("#points use[tabindex='0']").count() == 1


# Everywhere


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_a_phone_scrolls_down_alone(browser: Browser, folder: Path, name: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    watched = Watched(page)
    page.goto((folder / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert watched.errors == [] and len(watched.requests) == 1
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Browser, folder: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme="dark" if scheme == "dark" else "light")
    page.goto((folder / "usual.html").as_uri())
    assert page.evaluate(CONTRAST) == []
    page.add_style_tag(content=".note { color: #777 !important }")
    assert page.evaluate(CONTRAST) != []
    page.close()


def test_paper_has_the_rows_of_the_screen_and_nothing_to_click(page: Page, usual: Comparison) -> None:
    page.emulate_media(media="print")
    assert len(column(page, "name")) == 100
    assert page.inner_text("#count") == f"{len(usual.options)} options, the first 100 shown"
    page.emulate_media(media="screen")
    show_all(page)
    page.emulate_media(media="print")
    assert len(column(page, "name")) == len(usual.options)
    for selector in ("#filters", "#more", "#mode", "nav", ".skip"):
        assert page.locator(selector).is_hidden(), selector
    assert page.locator("#basis details table").is_visible()
    page.emulate_media(media="screen")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000


def test_without_scripts_all_of_it_is_there(browser: Browser, folder: Path, usual: Comparison) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto((folder / "usual.html").as_uri())
    assert page.locator("#all-options tbody tr").count() == len(usual.options)
    assert page.locator("#all-options tbody tr").last.is_visible()
    assert page.locator("#filters").is_hidden() and page.locator("#mode").is_hidden()
    assert page.locator("#points use").first.is_visible()
    page.close()

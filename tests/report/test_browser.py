"""The page in Chromium, without a network: silent, one request, everything drawn, inert."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from stability_search.report import render_html
from tests.report.study_reports import HOSTILE, hostile_report, report_of
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    stable_study,
)

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = Path(__file__).with_name("vendor") / "axe.min.js"
MAKERS = [stable_study, hopeless_study, interrupted_study, empty_study]
COLOURS = (
    "[...document.querySelectorAll('.plot .main-svg')].map((e) => e.style.background)"
    ".filter((colour) => colour.startsWith('rgb('))"
)


class Watched:
    """A page and everything it said or asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", self._dismiss)
        page.on("request", lambda request: self.asked.append(request.url))

    def _dismiss(self, dialog: Dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: Path, html: str) -> None:
        path.write_bytes(html.encode("utf-8", "backslashreplace"))
        self.page.goto(path.as_uri())
        self.wait_for_drawing(1)

    def wait_for_drawing(self, count: int) -> None:
        # A selector, not a function: the page's policy forbids Playwright to evaluate text in it.
        self.page.locator(f"html[data-drawn='{count}']").wait_for(state="attached")


OpenPage = Callable[..., Watched]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        reason = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    contexts = []

    def open_(html: str, *, scheme: str = "light", width: int = 1280) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.open(tmp_path / "report.html", html)
        return watched

    yield open_
    for context in contexts:
        context.close()


def check_quiet(watched: Watched) -> None:
    assert watched.said == []
    assert len(watched.asked) == 1
    assert watched.asked[0].startswith("file://")


def check_drawn(watched: Watched) -> None:
    drawn = watched.page.evaluate(
        "[...document.querySelectorAll('.plot')].map((p) => [p.id, p.querySelectorAll("
        "'.main-svg').length, p.querySelectorAll('path.point, .points path, .barlayer path')"
        ".length, p.getBoundingClientRect().width])"
    )
    for name, layers, marks, width in drawn:
        assert layers > 0, name
        assert marks > 0, name
        assert width > 100, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_every_figure_is_drawn_in_silence(
    open_page: OpenPage, make: Callable[[], StudyCase], scheme: str
) -> None:
    watched = open_page(render_html(report_of(make())), scheme=scheme)
    check_drawn(watched)
    check_quiet(watched)


@pytest.mark.parametrize("width", [320, 400, 1600])
def test_the_page_never_scrolls_sideways(open_page: OpenPage, width: int) -> None:
    watched = open_page(render_html(report_of(stable_study())), width=width)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    check_quiet(watched)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(open_page: OpenPage, text: str) -> None:
    watched = open_page(render_html(hostile_report(stable_study, text)))
    for summary in watched.page.query_selector_all("details:not([open]) > summary"):
        summary.click()
    assert watched.page.evaluate("document.querySelectorAll('img, iframe, .plot a').length") == 0
    check_quiet(watched)


def test_the_figures_follow_the_colour_scheme(open_page: OpenPage) -> None:
    watched = open_page(render_html(report_of(stable_study())))
    light = watched.page.evaluate(COLOURS)
    watched.page.emulate_media(color_scheme="dark")
    watched.wait_for_drawing(2)
    dark = watched.page.evaluate(COLOURS)
    assert light
    assert set(light).isdisjoint(dark)
    check_quiet(watched)


def test_print_is_light_and_opens_every_table(open_page: OpenPage) -> None:
    watched = open_page(render_html(report_of(stable_study())), scheme="dark")
    dark = watched.page.evaluate(COLOURS)
    assert dark
    watched.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert watched.page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert set(watched.page.evaluate(COLOURS)).isdisjoint(dark)
    watched.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert set(watched.page.evaluate(COLOURS)) == set(dark)
    assert watched.page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    check_quiet(watched)


def test_trials_sort_by_number_with_nothing_last(open_page: OpenPage) -> None:
    watched = open_page(render_html(report_of(stable_study())))
    heading = watched.page.locator(".sortable th button", has_text="probe_last")
    column = watched.page.evaluate(
        "[...document.querySelectorAll('.sortable th')].findIndex("
        "(th) => th.textContent === 'probe_last')"
    )
    cells = (
        "[...document.querySelectorAll('.sortable tbody tr')].map("
        f"(tr) => tr.cells[{column}].dataset.key ?? tr.cells[{column}].textContent)"
    )
    for is_falling in (False, True):
        heading.click()
        values = watched.page.evaluate(cells)
        filled = [float(value) for value in values if value]
        assert filled == sorted(filled, reverse=is_falling)
        assert values[: len(filled)] == [value for value in values if value]
    check_quiet(watched)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make", [stable_study, hopeless_study], ids=lambda f: f.__name__)
def test_axe_finds_no_serious_violation(
    open_page: OpenPage, make: Callable[[], StudyCase], scheme: str
) -> None:
    watched = open_page(render_html(report_of(make())), scheme=scheme)
    watched.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = watched.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        (
            v["id"],
            [(n["target"], n["any"][0]["message"] if n["any"] else "") for n in v["nodes"]][:4],
        )
        for v in found["violations"]
        if v["impact"] in {"serious", "critical"}
    ]
    assert serious == []


def test_a_script_that_the_policy_does_not_name_is_refused(open_page: OpenPage) -> None:
    html = render_html(report_of(empty_study()))
    watched = open_page(html.replace("</body>", "<script>alert('in')</script></body>"))
    assert not any(text.startswith("dialog") for text in watched.said)
    assert any("Content Security Policy" in text for text in watched.said)

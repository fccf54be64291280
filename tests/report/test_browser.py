"""The page in Chromium, without a network: silent, one request, everything drawn, inert."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from stability_search.report import render_html
from tests.report.study_reports import HOSTILE, hostile_report, report_with_steps
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


@cache
def page_of(make: Callable[[], StudyCase]) -> str:
    return render_html(report_with_steps(make()))


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
        "'.main-svg').length, p.querySelectorAll('path.point, .points path, .barlayer path, "
        "path.js-line, .heatmaplayer image').length, p.getBoundingClientRect().width])"
    )
    for name, layers, marks, width in drawn:
        assert layers > 0, name
        assert marks > 0, name
        assert width > 100, name


def serious_violations(watched: Watched) -> list[object]:
    watched.page.evaluate(AXE.read_text(encoding="utf-8"))
    found = watched.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        (
            v["id"],
            [(n["target"], n["any"][0]["message"] if n["any"] else "") for n in v["nodes"]][:4],
        )
        for v in found["violations"]
        if v["impact"] in {"serious", "critical"}
    ]


@pytest.mark.parametrize(
    ("make", "scheme"),
    [*((make, "light") for make in MAKERS), (stable_study, "dark"), (hopeless_study, "dark")],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_every_figure_is_drawn_in_silence_and_axe_finds_no_serious_violation(
    open_page: OpenPage, make: Callable[[], StudyCase], scheme: str
) -> None:
    watched = open_page(page_of(make), scheme=scheme)
    check_drawn(watched)
    check_quiet(watched)
    if make in {stable_study, hopeless_study}:  # axe takes seconds; the others show less
        assert serious_violations(watched) == []


def test_the_page_never_scrolls_sideways(open_page: OpenPage) -> None:
    watched = open_page(page_of(stable_study), width=320)
    for width in (320, 400, 1600):  # rising: a figure follows a moment later
        watched.page.set_viewport_size({"width": width, "height": 900})
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    check_quiet(watched)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(open_page: OpenPage, text: str) -> None:
    watched = open_page(render_html(hostile_report(stable_study, text)))
    for summary in watched.page.query_selector_all("details:not([open]) > summary"):
        summary.click()
    watched.page.locator("button.opens").first.press("Enter")
    watched.page.locator("dialog[open] .curve .main-svg").first.wait_for()
    counted = "document.querySelectorAll('img, iframe, .plot a, .curve a').length"
    assert watched.page.evaluate(counted) == 0
    check_quiet(watched)


def test_print_is_light_and_opens_every_table(open_page: OpenPage) -> None:
    watched = open_page(page_of(stable_study), scheme="dark")
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
    watched = open_page(page_of(stable_study))
    heading = watched.page.locator("#all-trials th button", has_text="probe_last")
    column = watched.page.evaluate(
        "[...document.querySelectorAll('#all-trials th')].findIndex("
        "(th) => th.textContent === 'probe_last')"
    )
    cells = (
        "[...document.querySelectorAll('#all-trials tbody tr')].map("
        f"(tr) => tr.cells[{column}].dataset.key ?? tr.cells[{column}].textContent)"
    )
    for is_falling in (False, True):
        heading.click()
        values = watched.page.evaluate(cells)
        filled = [float(value) for value in values if value]
        assert filled == sorted(filled, reverse=is_falling)
        assert values[: len(filled)] == [value for value in values if value]
    check_quiet(watched)


def open_failed_trial(watched: Watched) -> str:
    """Open the drawer of the first trial with bad steps, by keyboard; return its name."""
    row = watched.page.locator("#trial tbody tr", has_text="killed for bad steps").first
    button = row.locator("button.opens")
    button.press("Enter")
    watched.page.locator("dialog[open] .curve .main-svg").first.wait_for()
    return button.inner_text()


def test_the_drawer_works_by_keyboard_and_says_what_happened(
    open_page: OpenPage,
) -> None:
    watched = open_page(page_of(stable_study))
    name = open_failed_trial(watched)
    page = watched.page
    assert page.locator("#drawer-title").inner_text() == name
    assert page.locator("#drawer-steps tbody tr").count() == 9  # each of its bad steps
    assert "loss is NaN" in page.locator("#drawer-steps tbody tr").first.inner_text()
    assert page.locator("dialog .curve").count() == 5  # loss, norm, scale, attention, evidence
    command = page.locator("#drawer-command").inner_text()
    assert f'run.step_file("{name}", 1)' in command
    assert "{" not in command
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    page.locator("dialog:not([open])").wait_for(state="attached")
    assert page.evaluate("document.activeElement.textContent") == name
    # Every other trial of the table opens too, without its steps.
    shown = "new Set([...document.querySelectorAll('#trial .opens')].map((b) => b.dataset.trial))"
    other = page.evaluate(
        f"(() => {{ const shown = {shown}; return [...document.querySelectorAll("
        "'#all-trials .opens')].find((b) => !shown.has(b.dataset.trial)).dataset.trial; })()"
    )
    page.locator(f"#all-trials .opens[data-trial='{other}']").press("Enter")
    page.locator("dialog[open]").wait_for()
    assert "The page does not hold the steps" in page.locator("#drawer-note").inner_text()
    assert "learning_rate" in page.locator("#drawer-facts").inner_text()
    assert page.locator("dialog .curve").count() == 0
    check_quiet(watched)


@pytest.mark.parametrize(("scheme", "width"), [("light", 400), ("dark", 1600)])
def test_the_open_drawer_is_accessible_and_fits(
    open_page: OpenPage, scheme: str, width: int
) -> None:
    watched = open_page(page_of(stable_study), scheme=scheme, width=width)
    open_failed_trial(watched)
    inside = watched.page.locator("dialog .inside")
    assert inside.evaluate("(e) => e.scrollWidth <= e.clientWidth")
    assert serious_violations(watched) == []
    check_quiet(watched)


def test_figures_and_drawer_follow_the_colour_scheme_and_no_drawer_is_printed(
    open_page: OpenPage,
) -> None:
    watched = open_page(page_of(stable_study))
    open_failed_trial(watched)
    line = "document.querySelector('dialog .js-line').style.stroke"
    light, plots = watched.page.evaluate(line), watched.page.evaluate(COLOURS)
    watched.page.emulate_media(color_scheme="dark")
    watched.wait_for_drawing(2)
    assert watched.page.evaluate(line) != light
    assert plots
    assert set(plots).isdisjoint(watched.page.evaluate(COLOURS))
    assert watched.page.locator("dialog").is_visible()
    watched.page.emulate_media(media="print")
    assert not watched.page.locator("dialog").is_visible()
    assert not watched.page.locator("#trial").is_visible()
    check_quiet(watched)


def test_a_script_that_the_policy_does_not_name_is_refused(open_page: OpenPage) -> None:
    html = page_of(empty_study)
    watched = open_page(html.replace("</body>", "<script>alert('in')</script></body>"))
    assert not any(text.startswith("dialog") for text in watched.said)
    assert any("Content Security Policy" in text for text in watched.said)

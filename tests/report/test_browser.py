"""The page in Chromium, without a network: silent, one request, everything drawn, inert."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from stability_search.report import render_html
from tests.report.browsing import OpenPage, Watched, check_quiet
from tests.report.study_reports import report_with_steps
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    stable_study,
)

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

AXE = Path(__file__).with_name("vendor") / "axe.min.js"
MAKERS = [stable_study, hopeless_study, interrupted_study, empty_study]
FEW_ROWS = (
    "for (const body of document.querySelectorAll('tbody')) "
    "[...body.rows].slice(5).forEach((row) => row.remove())"
)
COLOURS = (
    "[...document.querySelectorAll('.plot .main-svg')].map((e) => e.style.background)"
    ".filter((colour) => colour.startsWith('rgb('))"
)


@cache
def page_of(make: Callable[[], StudyCase]) -> str:
    return render_html(report_with_steps(make()))


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


def serious_violations(watched: Watched, *rules: str) -> list[object]:
    """Return what axe objects to, by some rules or all; the rows of a table are alike: five do."""
    watched.page.evaluate(FEW_ROWS)
    watched.page.evaluate(AXE.read_text(encoding="utf-8"))
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    found = watched.page.evaluate("(options) => axe.run(document, options)", options)
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
        rules = ["color-contrast"] if scheme == "dark" else []  # nothing else differs
        assert serious_violations(watched, *rules) == []


def test_the_page_never_scrolls_sideways(open_page: OpenPage) -> None:
    watched = open_page(page_of(stable_study), width=320)
    for width in (320, 400, 1600):  # rising: a figure follows a moment later
        watched.page.set_viewport_size({"width": width, "height": 900})
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    check_quiet(watched)


def test_print_is_light_and_opens_every_table(open_page: OpenPage) -> None:
    watched = open_page(page_of(stable_study), scheme="dark")
    dark = watched.page.evaluate(COLOURS)
    assert dark
    group = "[...document.querySelectorAll('details.snippet')].map((e) => [e.name, e.open])"
    before = watched.page.evaluate(group)
    assert len(before) > 1
    watched.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert watched.page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert set(watched.page.evaluate(COLOURS)).isdisjoint(dark)
    watched.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert set(watched.page.evaluate(COLOURS)) == set(dark)
    assert watched.page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    assert watched.page.evaluate(group) == before  # of a group one is open, after it too
    check_quiet(watched)


def test_trials_sort_by_number_with_nothing_last(open_page: OpenPage) -> None:
    watched = open_page(page_of(interrupted_study))
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
    rules = ["color-contrast"] if scheme == "dark" else []
    assert serious_violations(watched, *rules) == []
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

"""Hostile text in every place of the page: no element is made of it, and it is shown as text."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files

import jinja2
import pytest

from stability_search.inert import inert, plain
from stability_search.report import page, render_html
from stability_search.report.context import View
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    layout,
    plot_text,
    scatter,
)
from tests.hostile_strings import HOSTILE_STRINGS, share, tame_strings
from tests.report.browsing import OpenPage, check_quiet
from tests.report.packed_reports import Pack
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    stable_study,
)

BUNDLE = (files("stability_search.report") / "assets" / "plotly-cartesian.min.js").read_text(
    encoding="utf-8"
)
PACKS: tuple[tuple[Callable[[], StudyCase], int, int], ...] = (
    (stable_study, 0, 2),
    (stable_study, 1, 2),
    (hopeless_study, 0, 1),
)


class Kinds(HTMLParser):
    """Counts the elements of a document by name and names of attributes.

    Marks of code in a sentence may be made of its backticks: they only change the letters.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.feed(html.replace(BUNDLE, ""))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = (tag, *sorted(name for name, _ in attrs if name != "data-key"))
        self.found[kind] += kind != ("code",)


@cache
def packed(make: Callable[[], StudyCase], part: int, parts: int) -> Pack:
    return Pack(make(), share(HOSTILE_STRINGS, part, parts))


@cache
def tame_kinds(make: Callable[[], StudyCase], part: int, parts: int) -> Counter[tuple[str, ...]]:
    return Kinds(render_html(Pack(make(), share(tame_strings(), part, parts)).report())).found


@pytest.mark.parametrize(
    ("make", "part", "parts"), PACKS[1:], ids=lambda one: getattr(one, "__name__", one)
)
def test_no_text_becomes_an_element_or_an_attribute(
    make: Callable[[], StudyCase], part: int, parts: int
) -> None:
    found = Kinds(render_html(packed(make, part, parts).report())).found
    assert found == tame_kinds(make, part, parts)


def unescaped() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stability_search.report", "templates"),
        autoescape=False,  # noqa: S701 - the fault that the test plants
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def test_the_twin_a_page_that_does_not_escape_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack, tame = packed(empty_study, 0, 1).report(), tame_kinds(empty_study, 0, 1)
    assert Kinds(render_html(pack)).found == tame
    with monkeypatch.context() as patched:
        patched.setattr(page, "_template", unescaped)
        assert Kinds(render_html(pack)).found != tame
    monkeypatch.setattr(page, "script_json", json.dumps)
    drawn = packed(stable_study, 0, 2).report()
    assert Kinds(render_html(drawn)).found != tame_kinds(stable_study, 0, 2)


TAGS = (
    "a body button circle clippath code dd defs details dialog div dl dt figcaption figure g h1 "
    "h2 h3 head header html image li link main meta nav noscript ol p path pre rect script "
    "section span strong style summary svg table tbody td text th thead title tr tspan ul"
)
FOREIGN = """(tags) => [...document.querySelectorAll('*')].filter((e) =>
  !tags.split(' ').includes(e.localName.toLowerCase())
  || [...e.attributes].some((a) => /^(on|src$|srcdoc$|action$|formaction$)/.test(a.name))
  || (e.localName === 'a' && !/^#[a-z-]+$/.test(e.getAttribute('href')))
  || (e.localName === 'image' && !e.href.baseVal.startsWith('data:image/png;base64,'))
  || (e.localName === 'script' && e.attributes.length > 2)
  || (e.localName === 'style' && e.parentElement !== document.head)
).map((e) => e.outerHTML.slice(0, 200))"""
FORMED = "[...document.querySelectorAll('#plot-raw-0 a, #plot-raw-0 tspan[style]')].length"
POINT_AT_ALL = """(count) => Plotly.Fx.hover(document.getElementById('plot-corpus-0'),
  [...Array(count).keys()].map((i) => ({curveNumber: 0, pointNumber: i})))"""
# Texts of the page by place; the table of trials by its columns.
SHOWN = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
  const places = {
    'title of the document': [document.title],
    'names of study and task': all('.meta dd'),
    'sentences of the verdict': all('.card .lead, .card .why li'),
    'warnings': all('.warnings li'),
    'names of targets': all('.targets .name'),
    'names of settings': all('.chips dt'),
    'space file': all('#appendix pre code'),
    'names of the environment': all('#appendix .how dt'),
    'values of the environment': all('#appendix .how dd'),
    'finding of a figure': all('#figure-corpus figcaption'),
    'table of a figure': all('#figure-corpus td'),
    'ticks of a figure': all('#plot-corpus-0 .ytick text'),
    'labels under the pointer': all('#plot-corpus-0 .hoverlayer .hovertext text'),
  };
  const table = document.getElementById('all-trials');
  const columns = {'values of settings': [], 'trials, trial_id': [], 'trials, reason': [],
    'trials, first_nonfinite_module': [], 'trials, warnings': []};
  [...table.tHead.rows[0].cells].forEach((heading, i) => {
    const name = /^set\\d ~|clip_norm/.test(heading.textContent) ? 'values of settings'
      : 'trials, ' + heading.textContent;
    const cells = [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
    columns[name]?.push(...cells);
  });
  return {...places, ...columns};
}"""
IN_DRAWER = """() => {
  const places = {'bad steps, reason': [], 'bad steps, module': [], 'bad steps, phase': []};
  const drawer = document.getElementById('drawer');
  for (const row of document.querySelectorAll('#trial tbody tr')) {
    if (row.cells[2].textContent.startsWith('0 of')) continue;
    row.querySelector('.opens').click();
    for (const step of drawer.querySelectorAll('#drawer-steps tbody tr')) {
      places['bad steps, reason'].push(step.cells[2].textContent);
      places['bad steps, module'].push(step.cells[3].textContent);
      places['bad steps, phase'].push(step.cells[4].textContent);
    }
    drawer.close();
  }
  return places;
}"""


def corpus_figure(name: str, neutral: Callable[[str], str], texts: Sequence[str]) -> Figure:
    """Return a figure that draws every text as a tick, and as a label under the pointer."""
    places = list(range(len(texts)))
    shown = [neutral(text) for text in texts]
    axis: Spec = {"tickvals": places, "ticktext": shown, "title": {"text": shown[0]}}
    spec = {
        "data": [scatter(places, places, color="@stable", hover=shown)],
        "layout": layout({"title": {"text": shown[-1]}}, axis),
    }
    return Figure(
        name=name,
        finding=" ~ ".join(texts),
        panels=(Panel(title=texts[0], spec=spec, height=40 * len(texts)),),
        table=DataTable(columns=("text",), rows=tuple((text,) for text in texts)),
    )


def with_corpus(texts: Sequence[str]) -> Callable[[View], Section]:
    """Return a part of the page with two such figures, the second not made neutral."""
    markup = [text for text in texts if text.startswith(("<a", "<b>", "<span"))]
    figures = (
        corpus_figure("corpus", plot_text, texts),
        corpus_figure("raw", lambda text: text, markup),
    )

    def build(_view: View) -> Section:
        return Section(name="corpus", title="Corpus", question="Is it inert?", figures=figures)

    return build


def one_line(text: str) -> str:
    """Return text without what a reader of a page does not see: breaks, and marks of code."""
    return " ".join(text.replace("`", "").split())


def is_shown(text: str, shown: str) -> bool:
    """Say whether a text is there for a reader: whole, or cut as in a figure."""
    forms = {one_line(inert(text, keeps="\n\t")), one_line(plain(text))}
    forms |= {f"{form[:59]}\u2026" for form in forms if len(form) > 60}
    return any(form in shown for form in forms)


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_every_hostile_text_is_shown_as_text_in_every_place(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, seen, pages = page._PARTS, {}, []  # noqa: SLF001 - a part of the test's own
    for make, part, num_parts in PACKS:
        texts = share(HOSTILE_STRINGS, part, num_parts)
        monkeypatch.setattr(page, "_PARTS", (*parts, with_corpus(texts)))
        watched = open_page(render_html(packed(make, part, num_parts).report()))
        assert watched.page.evaluate(FORMED) > 0  # the twin: what is not neutral takes form
        watched.page.evaluate("document.getElementById('plot-raw-0').remove()")
        watched.page.evaluate(POINT_AT_ALL, len(texts))
        places = {**watched.page.evaluate(SHOWN), **watched.page.evaluate(IN_DRAWER)}
        watched.page.evaluate(
            "for (const e of document.querySelectorAll('details')) e.open = true"
        )
        assert watched.page.evaluate(FOREIGN, TAGS) == []
        check_quiet(watched)
        pages.append(watched)
        for place, found in places.items():
            shown = one_line("\n".join(found))
            seen.setdefault(place, set()).update(t for t in texts if is_shown(t, shown))
    missing = {place: set(HOSTILE_STRINGS) - found for place, found in seen.items()}
    assert {place: left for place, left in missing.items() if left} == {}
    figures = (sum("dialog" in said for one in pages for said in one.said),
               sum(len(one.asked) - 1 for one in pages),
               sum("Security Policy" in said for one in pages for said in one.said))  # fmt: skip
    print(f"\n{len(HOSTILE_STRINGS)} strings x {len(seen)} places, dialogs {figures[0]}, "
          f"requests {figures[1]}, policy violations {figures[2]}")  # fmt: skip


IMAGE = "<img src=http://hostile.example/pixel.png onerror=alert(1)>"


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_twin_text_that_is_not_escaped_asks_and_is_refused_by_the_policy(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_template", unescaped)
    html = render_html(Pack(empty_study(), (IMAGE,)).report())
    watched = open_page(html)
    assert watched.page.evaluate(FOREIGN, TAGS) != []
    assert any("Content Security Policy" in text for text in watched.said)
    assert not any(text.startswith("dialog") for text in watched.said)
    watched = open_page(html.replace("Content-Security-Policy", "no-policy"))
    assert any(text.startswith("dialog") for text in watched.said)
    assert any(url.startswith("http://hostile.example/") for url in watched.asked)

"""`report --figures`: every figure of the page as a file, or nothing and the way out."""

import struct
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stability_search.errors import UsageError
from stability_search.report import figure_files, render_html
from stability_search.report.figure_files import find_browser, write_figures
from tests.hostile_strings import PAGE
from tests.report.browsing import chromium
from tests.report.packed_reports import Pack
from tests.report.study_reports import report_with_steps
from tests.study_rows import empty_study, hopeless_study, stable_study

browsing = [pytest.mark.browser, pytest.mark.timeout(300)]


def page_in(folder: Path, html: str) -> Path:
    path = folder / "report.html"
    path.write_bytes(html.encode("utf-8", "backslashreplace"))
    return path


def write(page: Path, kind: str, browser: str) -> tuple[Path, ...]:
    """Write the figures from a thread of their own: the suite's browser has the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(write_figures, page, kind, browser).result()


def size_of(png: bytes) -> tuple[int, int]:
    """Return width and height of a PNG; fails where it is none."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def check_alone(svg: bytes) -> None:
    """Check that an SVG needs nothing but itself and runs nothing."""
    for element in ET.fromstring(svg).iter():  # noqa: S314 - it was drawn here
        name = element.tag.rpartition("}")[2]
        assert name not in {"script", "a", "foreignObject", "iframe", "style"}
        for key, value in element.attrib.items():
            assert not key.startswith("on")
            if key.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))
            assert "url(" not in value or "url(#" in value


def test_without_playwright_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_files, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"Playwright must be installed.*\[figures\]"):
        find_browser()


def test_without_a_browser_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"Chromium must be on the path.*nothing is downloaded"):
        find_browser()


@pytest.mark.parametrize("missing", ["playwright", "browser"])
def test_nothing_is_drawn_or_written_without_what_draws(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from stability_search.cli import main
    from stability_search.search import closing

    def render(_path: Path) -> None:
        raise AssertionError("the report was drawn")

    monkeypatch.setattr(closing, "render_run", render)
    if missing == "playwright":
        monkeypatch.setattr(figure_files, "find_spec", lambda _name: None)
    else:
        monkeypatch.setenv("PATH", "")
    assert main(["report", str(tmp_path), "--figures", "png"]) == 2
    assert "--figures" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_twin_an_svg_with_a_link_is_found_out() -> None:
    link = b'<svg xmlns="http://www.w3.org/2000/svg"><a href="http://hostile.example/"/></svg>'
    with pytest.raises(AssertionError):
        check_alone(link)
    check_alone(link.replace(b"<a href", b"<g id"))


class TestDrawn:
    pytestmark = browsing

    def drawn(self, folder: Path, html: str, kind: str) -> dict[str, bytes]:
        written = write(page_in(folder, html), kind, chromium())
        made = folder / "figures"
        assert {path.parent for path in written} == {made}
        assert {path.name for path in written} == {path.name for path in made.iterdir()}
        assert len(written) == html.count('class="plot"') + 1  # and the captions
        return {path.name: path.read_bytes() for path in written}

    def test_every_figure_with_data_becomes_a_png_twice_the_size_of_the_page(
        self, tmp_path: Path
    ) -> None:
        found = self.drawn(tmp_path, render_html(report_with_steps(stable_study())), "png")
        captions = found.pop("figures.md").decode()
        assert len(found) > 20
        for name, content in found.items():
            width, height = size_of(content)
            assert width in {1440, 2160}, name
            assert height >= 400, name
            assert name in captions

    def test_an_svg_with_hostile_text_stands_alone_and_is_the_same_each_time(
        self, tmp_path: Path
    ) -> None:
        html = render_html(Pack(hopeless_study(), PAGE).report())
        found = self.drawn(tmp_path, html, "svg")
        again = self.drawn(tmp_path, html, "svg")
        assert [name for name in found if found[name] != again[name]] == []
        del found["figures.md"]
        for content in found.values():
            check_alone(content)
        text = found["scale-1.svg"].decode()
        assert ">Loss scale<" in text
        assert ">killed for bad steps<" in text
        assert "rgb(255, 255, 255)" in text

    def test_a_study_without_data_has_no_figures_and_says_so(self, tmp_path: Path) -> None:
        page = page_in(tmp_path, render_html(report_with_steps(empty_study())))
        (captions,) = write(page, "png", chromium())
        assert captions.read_text() == "No figure has data yet.\n"

    def test_a_browser_that_does_not_draw_leaves_nothing(self, tmp_path: Path) -> None:
        page = page_in(tmp_path, "<p>no page of ours</p>")
        with pytest.raises(UsageError, match="must draw the figures, but did not"):
            write(page, "png", "/bin/false")
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

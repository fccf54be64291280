"""The figures of a page as files for a paper or a slide, drawn by the reader's own Chromium."""

import base64
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from stability_search.errors import UsageError
from stability_search.files import cannot_write, write_whole
from stability_search.inert import markdown

FOLDER = "figures"
_SCALE = 2  # pixels of a PNG per pixel of the page
_PATIENCE_MS = 120_000  # a page of 10,000 trials on a busy machine
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
          "microsoft-edge", "msedge")  # fmt: skip
_EXTRA = "pip install 'stability-search[figures]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """One drawing of the page.

    Attributes:
        name: Of its file, without the ending.
        finding: The sentence of its figure.
        content: The file.
    """

    name: str
    finding: str
    content: bytes


def find_browser() -> str:
    """Return the browser that draws figures.

    Raises:
        UsageError: Playwright is not installed, or no Chromium is on the path.
    """
    if find_spec("playwright") is None:
        raise UsageError(
            "--figures: Playwright must be installed, but is not.", hint=f"Run {_EXTRA}."
        )
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise UsageError(
            f"--figures: a Chromium must be on the path as one of {', '.join(_NAMES)}, but none "
            "is.",
            hint="Install it (Debian: apt-get install chromium); nothing is downloaded here.",
        )
    return found


def write_figures(page: Path, kind: str, browser: str) -> tuple[Path, ...]:
    """Write every figure with data as a file, with light colours on white, and their captions.

    All are drawn before the first is written.

    Args:
        page: `report.html`; the files go to the folder `figures` beside it.
        kind: `png`, of two pixels for one of the page, or `svg`.
        browser: What `find_browser` returned.

    Returns:
        The files; `figures.md` with a caption each comes last.

    Raises:
        UsageError: The browser does not start or does not draw.
        StoppedEarlyError: A file could not be written.
    """
    pictures = _drawn(page, kind, browser)
    folder = page.parent / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    contents: dict[str, bytes | str] = {f"{one.name}.{kind}": one.content for one in pictures}
    contents["figures.md"] = _captions(pictures, kind)
    for name, content in contents.items():
        write_whole(folder / name, content)
    return tuple(folder / name for name in contents)


def _drawn(page: Path, kind: str, browser: str) -> list[_Picture]:
    from playwright.sync_api import Error, sync_playwright

    script = (files("stability_search.report") / "assets" / "figures.js").read_text("utf-8")
    with sync_playwright() as playwright:
        try:
            with playwright.chromium.launch(executable_path=browser) as chromium:
                # The page is our own, without a network; its policy refuses the picture's blob.
                tab = chromium.new_context(
                    viewport={"width": 1280, "height": 900},
                    color_scheme="light",
                    offline=True,
                    bypass_csp=True,
                ).new_page()
                tab.goto(page.resolve().as_uri())
                tab.locator("html[data-drawn]").wait_for(state="attached", timeout=_PATIENCE_MS)
                found = tab.evaluate(script, {"format": kind, "scale": _SCALE})
        except Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"--figures: {browser} must draw the figures, but did not: {reason}.",
                hint=f"Try `{browser} --version`, or open {page} and print it.",
            ) from None
    return [_picture(one) for one in found]


def _picture(found: dict[str, Any]) -> _Picture:
    head, _, body = str(found["url"]).partition(",")
    content = base64.b64decode(body) if head.endswith(";base64") else unquote(body).encode()
    return _Picture(name=found["name"], finding=found["finding"], content=content)


def _captions(pictures: Sequence[_Picture], kind: str) -> str:
    """Return the finding of each figure below the names of its files."""
    names: dict[str, list[str]] = {}
    for one in pictures:
        names.setdefault(one.finding, []).append(f"{one.name}.{kind}")
    lines = [f"**{', '.join(own)}**: {markdown(finding)}\n" for finding, own in names.items()]
    return "\n".join(lines or ["No figure has data yet.\n"])

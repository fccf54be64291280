"""One browser for every test that opens a page; a context of its own for each page."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.report.browsing import FLAGS, OpenPage, Watched, chromium

_PATIENCE_MS = 120_000  # a net for hangs on a busy machine


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    contexts = []

    def open_(html: str, *, scheme: str = "light", width: int = 1280) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        context.set_default_timeout(_PATIENCE_MS)
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.open(tmp_path / "report.html", html)
        return watched

    yield open_
    for context in contexts:
        context.close()

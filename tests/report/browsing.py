"""A page in Chromium, without a network, and everything it said or asked for."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Dialog, Page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


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


def chromium() -> str:
    """Return the path of Chromium; skip without one, or fail where that must not be."""
    found = shutil.which("chromium")
    if found is None:
        reason = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def check_quiet(watched: Watched) -> None:
    assert watched.said == []
    assert len(watched.asked) == 1
    assert watched.asked[0].startswith("file://")

"""A training in miniature takes less time than its picture, or than a slow disk's promises."""

import os
import signal
import sys
import types
from collections.abc import Iterator

import pytest

from stability_search.training import command


@pytest.fixture
def real_picture() -> None:
    """Let the test draw a picture."""


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if "real_picture" not in request.fixturenames:
        fake = types.ModuleType("stability_search.training.curves")
        fake.draw = lambda *_: b"a picture"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.fixture(autouse=True)
def _sigterm_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a SIGTERM to this process stop the training in it, and never the tests."""
    monkeypatch.setattr(command, "_TERMINATE_S", 600.0)


@pytest.fixture(autouse=True)
def _keeps_signals() -> Iterator[None]:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before

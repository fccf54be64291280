"""A training in miniature takes less time than its picture, or than a slow disk's promises."""

import os
import signal
import sys
import types
from collections.abc import Iterator

import pytest


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
def _keeps_signals() -> Iterator[None]:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before

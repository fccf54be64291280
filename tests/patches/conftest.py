"""Patches that are taken out again, whatever a test does in between."""

import gc
from collections.abc import Callable, Iterator

import pytest

from stability_search.patches import PatchSettings, install, uninstall

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def sees_only_objects_of_its_own() -> Iterator[None]:
    """Hide what other tests have left from a search for objects, which is slow besides."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def patched(capsys: pytest.CaptureFixture[str]) -> Iterator[Install]:
    """Put the patches in with the settings given; what that says is not what a test reads."""

    def put_in(**settings: object) -> None:
        install(PatchSettings(**settings))  # type: ignore[arg-type]
        capsys.readouterr()

    yield put_in
    uninstall()

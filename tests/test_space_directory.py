"""Who may write to a directory, beside somebody who only looks at it."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from stability_search import space_directory
from stability_search.errors import LockedError
from stability_search.space_directory import only_writer


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    """Return a descriptor of the directory, as another process has one."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_somebody_who_only_asks_for_the_lock_is_waited_for(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.flock(other, fcntl.LOCK_SH)  # as `status` does
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr(space_directory, "time", SimpleNamespace(sleep=pause))
    with only_writer(tmp_path):
        assert pauses == [0.01] * 3


def test_another_writer_is_not_waited_for_longer_than_a_moment(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.flock(other, fcntl.LOCK_EX)
    pauses: list[float] = []
    monkeypatch.setattr(space_directory, "time", SimpleNamespace(sleep=pauses.append))

    with pytest.raises(LockedError, match="another process is writing"), only_writer(tmp_path):
        pytest.fail("two writers")
    assert sum(pauses) == pytest.approx(0.2, abs=0.02)

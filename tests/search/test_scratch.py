"""Folders of drivers that were killed are removed, and nothing else is."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search.search import scratch
from stability_search.search.scratch import Scratch


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let temporary files be in an empty folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def live() -> Iterator[Scratch]:
    """Return the folder of a driver that lives."""
    folder = Scratch()
    (folder.path / "session" / "logs").mkdir(parents=True)
    yield folder
    folder.close()


def kill(driver: Scratch) -> Path:
    """Do to a driver's folder what its death does."""
    driver._lock.close()  # noqa: SLF001 - as the system does
    return driver.path


def drive() -> None:
    """Begin as a driver and end as one."""
    Scratch().close()


def test_a_driver_leaves_nothing_behind(place: Path) -> None:
    folder = Scratch()
    (folder.path / "session" / "logs").mkdir(parents=True)
    folder.close()
    folder.close()  # as a second signal does
    assert list(place.iterdir()) == []


def test_what_a_killed_driver_left_is_removed_by_the_next(live: Scratch, place: Path) -> None:
    (live.path / "session_latest").symlink_to("session")
    left = kill(live)
    drive()
    assert not left.exists()
    assert list(place.iterdir()) == []


def test_the_folder_of_a_driver_that_lives_stays_whatever_its_process_is_called(
    live: Scratch,
) -> None:
    drive()
    drive()
    assert (live.path / "session" / "logs").is_dir()


def test_what_a_driver_started_does_not_keep_its_folder(live: Scratch) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as outlives:  # noqa: S607 - the system's
        left = kill(live)
        drive()
        assert outlives.poll() is None
        assert not left.exists()


def test_what_last_processes_of_a_killed_driver_write_is_removed_in_the_end(
    live: Scratch,
) -> None:
    left = kill(live)
    following = Scratch()
    assert not (left / "session").exists()
    (left / "session" / "logs").mkdir(parents=True)  # one of Ray's was still there
    following.close()
    drive()
    assert not left.exists()


def test_a_folder_that_could_not_be_removed_is_left_to_the_next_driver(
    live: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_in_part(folder: Path, **_: object) -> None:
        (folder / scratch._MARKER).unlink()  # noqa: SLF001 - something is written meanwhile

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_in_part)
        live.close()
    assert live.path.exists()
    drive()
    assert not live.path.exists()


@pytest.mark.parametrize(
    "name",
    [
        "stability-3999999-results",
        "stability-2026-11-22",
        "stability-20261122123456789-x",
        "stability-\u00b2-x",
        "stability-ray-results",
        "stability-ray-1-x",
    ],
)
def test_a_folder_of_the_users_stays_whatever_its_name(name: str, place: Path) -> None:
    (place / name).mkdir()
    (place / name / "study.db").write_text("mine")
    drive()
    drive()
    assert (place / name / "study.db").read_text() == "mine"


def test_neither_another_users_folder_nor_a_link_is_touched(
    live: Scratch, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = kill(live)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: -1)
        drive()
    assert (left / "session").is_dir()
    elsewhere = left.rename(place / "elsewhere")
    left.symlink_to(elsewhere)
    drive()
    assert (elsewhere / "session").is_dir()
    left.unlink()


def test_paths_of_rays_sockets_are_as_short_as_they_must_be(live: Scratch) -> None:
    session = "session_2026-11-22_23-59-59_123456_4194304/sockets/plasma_store"
    assert len(f"/tmp/{live.path.name}/{session}") < 107 - len(".12")  # noqa: S108 - counted only

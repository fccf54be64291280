"""A file is there whole or not at all."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search import files
from stability_search.errors import StoppedEarlyError
from stability_search.files import remove_parts, write_whole


def raising(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, "injected")

    return fail


@pytest.mark.parametrize("content", [b"", b"\x00\xff\r\n", b"x" * 1_000_000])
def test_bytes_arrive_as_they_are(tmp_path: Path, content: bytes) -> None:
    write_whole(tmp_path / "a.bin", content)
    assert (tmp_path / "a.bin").read_bytes() == content


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "a\r\n\u00e4\n")
    assert (tmp_path / "a.txt").read_bytes() == b"a\r\n\xc3\xa4\n"


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "a\ud800b")
    assert (tmp_path / "a.txt").read_text() == r"a\ud800b"


def test_an_existing_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old and longer")
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("step", ["_write_synced", "_sync_folder"])
def test_a_failed_write_is_exit_6_and_leaves_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    write_whole(tmp_path / "a.txt", "old")
    monkeypatch.setattr(files, step, raising(code))
    with pytest.raises(StoppedEarlyError, match=r"a\.txt: could not be written: injected"):
        write_whole(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_file_survives_a_disk_that_fills_up_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a.txt", "old")
    monkeypatch.setattr(files, "_write_synced", write_half)
    with pytest.raises(StoppedEarlyError, match="No space left") as caught:
        write_whole(tmp_path / "a.txt", "new")
    assert caught.value.exit_code == 6
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoppedEarlyError, match=r"nowhere.*No such file or directory"):
        write_whole(tmp_path / "nowhere" / "a.txt", "x")


def test_only_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.txt.123.part", "a.part", ".hidden", "a.txt"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.part", "a.txt"]

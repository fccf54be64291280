"""What a hostile cluster may list, and what may lie where its files go: no more is touched."""

import hashlib
import json
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from stability_search.cluster import fetching
from stability_search.cluster.result import record_name
from stability_search.errors import (
    InfrastructureError,
    StabilitySearchError,
    StoppedEarlyError,
    UsageError,
)
from tests.cluster.fake_jobs import FakeJobs
from tests.cluster.fetched_runs import bring, files_of, num_read

DEEP = "[" * 5000  # more than a reader of JSON goes down


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


ENTRY = {"path": "a", "num_bytes": 1, "sha256": sha256(b"x")}
FILE, UNLISTED = {"a": b"x"}, "list of its files cannot be used"


def lists(jobs: FakeJobs, text: str, contents: dict[str, bytes]) -> None:
    """Let a cluster list and serve whatever it likes."""
    served = {record_name("s", f"run/{path}"): content for path, content in contents.items()}
    jobs.files = {record_name("s", "listing.json"): text.encode(), **served}


def entries(contents: dict[str, bytes]) -> str:
    return json.dumps(
        [
            {"path": path, "num_bytes": len(content), "sha256": sha256(content)}
            for path, content in contents.items()
        ]
    )


def test_the_twin_an_honest_listing_is_taken(jobs: FakeJobs, home: Path) -> None:
    lists(jobs, json.dumps([ENTRY]), FILE)

    assert bring(jobs, home).num_new == 1
    assert files_of(home) == FILE


@pytest.mark.parametrize(
    "path",
    [
        *("../a", "/etc/passwd", "a/../../b", "a//b", "", ".", "a\\b", "a\0b", "steps/.."),
        *(".fetched", ".Fetched", "steps/.fetched", "study.db-journal", ".fetched.7.part"),
        *("a\nb", "a\x1b[2J", "\ud800", ".fe\u200ctched", "\u202egpj.exe", "\u3164"),
        *("n" * 201, "\u00e9" * 101, "n/" * 501 + "n"),
    ],
)
def test_a_path_that_no_file_of_a_run_has_is_refused(
    jobs: FakeJobs, home: Path, path: str
) -> None:
    lists(jobs, json.dumps([{**ENTRY, "path": path}]), FILE)

    with pytest.raises(InfrastructureError, match=UNLISTED) as caught:
        bring(jobs, home)
    assert "\n" not in str(caught.value)
    assert files_of(home) == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}1", "{}", "[1]", "[{}]", "null", DEEP, f"[{json.dumps(ENTRY)}, 1]"),
        json.dumps([ENTRY, ENTRY]),
        *(
            json.dumps([{**ENTRY, "num_bytes": value}])
            for value in (float("inf"), float("nan"), -1, 1.0, True, "1", None, 2**63)
        ),
        *(json.dumps([{**ENTRY, "sha256": value}]) for value in ("0", 1, None, "G" * 64)),
        *(json.dumps([{**ENTRY, "path": value}]) for value in (1, None, ["a"])),
    ],
)
def test_a_listing_that_is_none_is_one_line(jobs: FakeJobs, home: Path, text: str) -> None:
    lists(jobs, text, FILE)

    with pytest.raises(InfrastructureError, match=UNLISTED):
        bring(jobs, home)
    assert files_of(home) == {}


def test_a_cluster_cannot_say_what_is_ours_and_have_it_removed(jobs: FakeJobs, home: Path) -> None:
    victim = home.parent / "victim.txt"
    victim.parent.mkdir(parents=True)
    victim.write_text("precious")
    mark = json.dumps({"name": "s", "paths": ["../victim.txt"], "ledgers": []}).encode()
    lists(jobs, entries({".fetched": mark}), {".fetched": mark})

    for _ in range(2):
        with pytest.raises(InfrastructureError, match=UNLISTED):
            bring(jobs, home)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("path", ["../victim.txt", "/victim.txt", ".fetched", 7])
def test_a_mark_that_names_anything_else_is_not_believed(
    jobs: FakeJobs, home: Path, path: object
) -> None:
    bring(jobs, home)
    mark = json.loads((home / ".fetched").read_text())
    (home / ".fetched").write_text(json.dumps({**mark, "paths": [*mark["paths"], path]}))

    with pytest.raises(UsageError, match="it is not empty, and would be written over"):
        bring(jobs, home)
    assert (home / ".fetched").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", DEEP, '{"name": "s"}', "\udcff"])
def test_a_mark_that_cannot_be_read_is_none(jobs: FakeJobs, home: Path, text: str) -> None:
    bring(jobs, home)
    (home / ".fetched").write_text(text, errors="surrogateescape")

    with pytest.raises(UsageError, match="it is not empty"):
        bring(jobs, home)


def test_nothing_is_written_or_removed_behind_a_link_that_leads_out(
    jobs: FakeJobs, run: Path, home: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.parquet").write_text("precious")
    home.mkdir(parents=True)
    (home / ".fetched").write_text('{"name": "s", "paths": ["steps/a.parquet"], "ledgers": []}')
    (home / "steps").symlink_to(elsewhere)
    refused = r"a link leads out of the copy"

    with pytest.raises(UsageError, match=refused):  # it would be read anew
        bring(jobs, home)
    (run / "steps" / "a.parquet").unlink()
    with pytest.raises(UsageError, match=refused):  # it would be removed
        bring(jobs, home)

    assert [path.name for path in elsewhere.iterdir()] == ["a.parquet"]
    assert (elsewhere / "a.parquet").read_text() == "precious"


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(
    jobs: FakeJobs, home: Path, tmp_path: Path
) -> None:
    bring(jobs, home)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (home / "space.yaml").unlink()
    (home / "space.yaml").symlink_to(precious)

    bring(jobs, home)

    assert precious.read_text() == "precious"
    assert not (home / "space.yaml").is_symlink()


def test_files_that_are_in_each_others_way_are_one_line(jobs: FakeJobs, home: Path) -> None:
    contents = {"a": b"x", "a/b": b"y"}
    lists(jobs, entries(contents), contents)

    with pytest.raises(StabilitySearchError, match=r"cannot be made|could not be written"):
        bring(jobs, home)


def test_more_than_the_disk_has_room_for_is_refused_before_it_comes(
    jobs: FakeJobs, home: Path
) -> None:
    lists(jobs, json.dumps([{**ENTRY, "num_bytes": 2**62}]), FILE)

    with pytest.raises(StoppedEarlyError, match="MiB are to come, but"):
        bring(jobs, home)
    assert num_read(jobs) == 0


def test_no_more_is_read_of_a_file_than_was_listed(jobs: FakeJobs, home: Path) -> None:
    """What never ends would fill the disk; each block is 1,000 bytes."""
    num_blocks = 0

    def endless(_node_id: str, _name: str) -> Generator[bytes]:
        nonlocal num_blocks
        while True:
            num_blocks += 1
            yield b"x" * 1000

    content = b"x" * 2500
    lists(jobs, entries({"a": content}), {})
    jobs.read_blocks = endless  # type: ignore[method-assign]

    bring(jobs, home)

    assert files_of(home) == {"a": content}
    assert num_blocks == 3


def test_ctrl_c_does_not_wait_for_files_that_are_on_their_way(
    jobs: FakeJobs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked_for = threading.Event()

    def read(_node_id: str, name: str) -> Generator[bytes]:
        if name.endswith("run.log"):
            assert is_asked_for.wait(20)
            raise KeyboardInterrupt
        while True:  # for ever, were it not for the signal
            is_asked_for.set()
            yield b"x"

    large = {"path": "large", "num_bytes": 2**60, "sha256": sha256(b"")}
    log = {"path": "run.log", "num_bytes": 1, "sha256": sha256(b"")}
    lists(jobs, json.dumps([log, large]), {})
    monkeypatch.setattr(fetching, "_refuse_without_room", lambda *_: None)
    jobs.read_blocks = read  # type: ignore[method-assign]

    with pytest.raises(KeyboardInterrupt):
        bring(jobs, home)
    assert not list(home.glob(".*.part"))

"""In a job beside a study's, on its node: make its run directory ready to be read from afar.

    python -m stability_search.cluster.snapshot ORDER

Ray's interface reads files of a node's log folder. So a link to the run directory is put there,
with a consistent copy of the ledger, which may be written to meanwhile, and a list of every
file's size and hash.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stability_search.cluster.listing import RUN_LINK, ListedFile, is_file_of_run, listing_text
from stability_search.cluster.result import own_log_folder, record_name
from stability_search.files import PART_SUFFIX, write_whole
from stability_search.search.run_directory import RunDirectory

LISTING = "listing.json"  # in the study's folder among Ray's logs
NO_DIRECTORY = 98  # exit code: this node has no run directory of that name
_BUSY_S = 30.0  # the driver's commit is waited for


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotOrder:
    """What a snapshot is told.

    Attributes:
        name: The study's name.
        folder: Where run directories are on the node.
        status_format: Form of a `status` to be made; empty for a listing of all files.
    """

    name: str
    folder: str
    status_format: str = ""

    def to_text(self) -> str:
        """Return it as one word of a command line, before quoting."""
        return json.dumps(asdict(self))


def status_file(chosen: str) -> str:
    """Return the name of a file with a status in one of its forms."""
    return f"status.{chosen}"


def take_snapshot(directory: Path, folder: Path) -> None:
    """Make a run directory ready to be read; a running study goes on undisturbed.

    Args:
        directory: The run directory.
        folder: The study's folder among Ray's logs; made if missing.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _put_link(folder / RUN_LINK, directory)
    run = RunDirectory(path=directory)
    found = []
    if run.ledger.is_file():  # first: every trial that it knows has its step file by now
        copy = folder / run.ledger.name
        _copy_ledger(run.ledger, copy)
        found.append(_listed(copy, run.ledger.name))
    for path in _files_of(directory):
        name = path.relative_to(directory).as_posix()
        if path != run.ledger and is_file_of_run(name):
            with contextlib.suppress(FileNotFoundError):  # replaced this very moment
                found.append(_listed(path, name))
    write_whole(folder / LISTING, listing_text(found))


def _put_link(link: Path, target: Path) -> None:
    part = link.with_name(f".{link.name}.{os.getpid()}{PART_SUFFIX}")
    part.symlink_to(target, target_is_directory=True)
    part.replace(link)


def _files_of(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def _copy_ledger(ledger: Path, copy: Path) -> None:
    """Copy a ledger between two commits; one that is damaged is copied as it is."""
    part = copy.with_name(f".{copy.name}.{os.getpid()}{PART_SUFFIX}")
    part.unlink(missing_ok=True)
    try:
        source = sqlite3.connect(f"{ledger.as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(part)) as target:
            source.execute("BEGIN")
            source.execute("SELECT 1 FROM sqlite_master").fetchall()  # `backup` waits for ever
            source.backup(target)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise  # half of a commit is no copy
        part.write_bytes(ledger.read_bytes())
    part.replace(copy)


def _listed(path: Path, name: str) -> ListedFile:
    with path.open("rb") as file:
        found = hashlib.sha256()
        num_bytes = 0
        while block := file.read(2**20):
            found.update(block)
            num_bytes += len(block)
    return ListedFile(path=name, num_bytes=num_bytes, sha256=found.hexdigest())


def _write_status(directory: Path, folder: Path, chosen: str) -> int:
    words = ["status", str(directory), "--format", chosen]
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "stability_search", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(folder / status_file(chosen), done.stdout or done.stderr)
    return done.returncode


def main(words: Sequence[str]) -> int:
    """Take the snapshot; exit 0, or 98 where there is no run directory.

    Args:
        words: An order, as `SnapshotOrder.to_text` returned it.
    """
    order = SnapshotOrder(**json.loads(words[0]))
    directory = Path(order.folder).expanduser() / order.name
    folder = own_log_folder() / Path(record_name(order.name, LISTING)).parent
    if not directory.is_dir():
        return NO_DIRECTORY
    if order.status_format:
        return _write_status(directory, folder, order.status_format)
    take_snapshot(directory, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

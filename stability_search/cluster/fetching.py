"""A run directory comes home: file by file, checked by hash, and never twice.

A short job on the node of the study's driver lists the files (`snapshot`); each is then read
through Ray's interface. What is there already and right is left alone, so a fetch that broke off
goes on, and a running study can be fetched again and again.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from stability_search.cluster.copies import (
    is_there,
    place_in_copy,
    read_mark,
    refuse_to_replace,
    remove_gone,
    write_mark,
)
from stability_search.cluster.jobs import Job, Jobs
from stability_search.cluster.listing import LEDGER, ListedFile
from stability_search.cluster.looking import list_files
from stability_search.cluster.result import record_name
from stability_search.cluster.submitting import known_attempt
from stability_search.errors import InfrastructureError, StoppedEarlyError
from stability_search.files import PART_SUFFIX, cannot_write, put_in_place
from stability_search.space_directory import make_folder, only_writer

_ROUNDS = 3  # a running study replaces files while they are read
_AT_ONCE = 4
_KEPT = "Call fetch again: what has come is kept."


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What came home.

    Attributes:
        directory: The copy.
        num_files: Files of the run directory.
        num_new: Those that were read now; the others were there already.
        num_bytes: Bytes that were read now.
        seconds: That reading took.
    """

    directory: Path
    num_files: int
    num_new: int
    num_bytes: int
    seconds: float


def fetch(
    jobs: Jobs,
    name: str,
    directory: Path,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Fetched:
    """Bring a study's run directory home; the study may be running.

    Args:
        jobs: The cluster.
        name: The study's name.
        directory: Where to; empty, missing, or an earlier copy of the same study.
        clock: Seconds of a clock that does not run backwards.
        sleep: Waits so many seconds.

    Raises:
        UsageError: There is no such study, or something else is in the directory.
        InfrastructureError: The cluster or the study's node does not answer, or what came does
            not match its hash.
        StoppedEarlyError: The disk is full, or would be.
    """
    job = known_attempt(jobs, name)
    with _no_empty_folder_left(directory):
        return _fetch(jobs, job, name, directory, clock=clock, sleep=sleep)


@contextlib.contextmanager
def _no_empty_folder_left(directory: Path) -> Iterator[None]:
    """Make a folder; remove it again where nothing came."""
    is_ours = not directory.exists()
    make_folder(directory)
    try:
        yield
    except BaseException:
        if is_ours:
            with contextlib.suppress(OSError):  # something came
                directory.rmdir()
        raise


def _fetch(  # noqa: PLR0913 - as `fetch`, and which attempt
    jobs: Jobs,
    job: Job,
    name: str,
    directory: Path,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Fetched:
    read_mark(directory, name)  # nothing of a folder that is no copy is touched
    reader = _Reader(jobs=jobs, node_id=job.node_id, name=name, directory=directory)
    with only_writer(directory):
        mark = read_mark(directory, name)
        began, num_new, num_bytes = clock(), 0, 0
        for _ in range(_ROUNDS):
            listing = list_files(jobs, job, name, sleep)
            refuse_to_replace(directory, mark, listing)
            mark = write_mark(directory, mark, listing)
            missing = [one for one in listing if not is_there(directory, one)]
            _refuse_without_room(directory, missing)
            with _saying_what_is_kept():
                read = reader.read_all(missing)
            num_new += len(read)
            num_bytes += sum(one.num_bytes for one in read)
            if len(read) == len(missing):
                remove_gone(directory, mark, listing)
                return Fetched(
                    directory=directory,
                    num_files=len(listing),
                    num_new=num_new,
                    num_bytes=num_bytes,
                    seconds=clock() - began,
                )
    raise InfrastructureError(
        f"{name}: {len(missing) - len(read)} of {len(listing)} files did not come as they were "
        f"listed, in {_ROUNDS} attempts.",
        hint=_KEPT,
    )


@contextlib.contextmanager
def _saying_what_is_kept() -> Iterator[None]:
    try:
        yield
    except InfrastructureError as error:
        hint = f"{error.hint} {_KEPT}".strip()
        raise InfrastructureError(error.message, hint=hint) from error


def _refuse_without_room(directory: Path, missing: Sequence[ListedFile]) -> None:
    needed, free = sum(one.num_bytes for one in missing), shutil.disk_usage(directory).free
    if needed > free:
        raise StoppedEarlyError(
            f"{directory}: {needed / 2**20:,.0f} MiB are to come, but {free / 2**20:,.0f} MiB are "
            "free there.",
            hint="Free some space, or choose another directory by --output.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """Reads files of one study into its copy.

    Attributes:
        jobs: The cluster.
        node_id: The node that has the files.
        name: The study's name.
        directory: The copy.
        is_over: Set once nothing more shall be read.
    """

    jobs: Jobs
    node_id: str
    name: str
    directory: Path
    is_over: threading.Event = field(default_factory=threading.Event)

    def read_all(self, files: Sequence[ListedFile]) -> list[ListedFile]:
        """Read files, several at once; return those that came and match their hash.

        The ledger comes last, and only if all others did: it speaks of them.
        """
        before = [one for one in files if one.path != LEDGER]
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            tasks = [pool.submit(self._read, one) for one in before]
            try:
                read = [one for one, task in zip(before, tasks, strict=True) if task.result()]
            except BaseException:
                self.is_over.set()  # else Ctrl-C would wait for the last byte
                raise
            finally:
                for task in tasks:
                    task.cancel()
        if len(read) == len(before):
            read += [one for one in files if one.path == LEDGER and self._read(one)]
        return read

    def _read(self, one: ListedFile) -> bool:
        """Read one file, and keep it if it matches its hash."""
        path = place_in_copy(self.directory, one.path)
        make_folder(path.parent)
        part = self.directory / f".{secrets.token_hex(8)}{PART_SUFFIX}"
        try:
            with part.open("xb") as file:
                if self._copy(one, file) != one.sha256:
                    return False
                file.flush()
                os.fsync(file.fileno())
            put_in_place(part, path)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            part.unlink(missing_ok=True)
        return True

    def _copy(self, one: ListedFile, file: BinaryIO) -> str:
        """Copy as many bytes as were listed, or what there is; return their hash."""
        found, left = hashlib.sha256(), one.num_bytes
        source = record_name(self.name, one.source)
        with contextlib.closing(self.jobs.read_blocks(self.node_id, source)) as blocks:
            while left and not self.is_over.is_set() and (block := next(blocks, b"")):
                kept = block[:left]
                file.write(kept)
                found.update(kept)
                left -= len(kept)
        return found.hexdigest()

"""A run directory comes home: file by file, checked by hash, and never twice.

A short job on the node of the study's driver lists the files (`snapshot`); each is then read
through Ray's interface. What is there already and right is left alone, so a fetch that broke off
goes on, and a running study can be fetched again and again.
"""

import concurrent.futures
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_search.cluster.copies import LEDGER, is_there, read_mark, remove_gone, write_mark
from stability_search.cluster.jobs import Jobs
from stability_search.cluster.looking import list_files
from stability_search.cluster.result import record_name
from stability_search.cluster.snapshot import ListedFile
from stability_search.cluster.submitting import known_attempt
from stability_search.errors import InfrastructureError
from stability_search.files import write_whole
from stability_search.space_directory import make_folder, only_writer

_ROUNDS = 3  # a running study replaces files while they are read
_AT_ONCE = 4


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
        StoppedEarlyError: The disk is full.
    """
    job = known_attempt(jobs, name)
    make_folder(directory)
    with only_writer(directory):
        mark = read_mark(directory, name)
        began, num_new, num_bytes = clock(), 0, 0
        for _ in range(_ROUNDS):
            listing = list_files(jobs, job, name, sleep)
            mark = write_mark(directory, mark, listing)
            missing = [one for one in listing if not is_there(directory, one)]
            read = _read_all(jobs, job.node_id, name, missing, directory)
            num_new, num_bytes = num_new + len(read), num_bytes + sum(read)
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
        hint="Call fetch again: what has come is kept.",
    )


def _read_all(
    jobs: Jobs, node_id: str, name: str, files: Sequence[ListedFile], directory: Path
) -> list[int]:
    """Read files, several at once; return the sizes of those that match their hash.

    The ledger comes last, and only if all others did: it speaks of them.
    """
    before = [one for one in files if one.path != LEDGER]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(_read, jobs, node_id, name, one, directory) for one in before]
        try:
            sizes = [done.result() for done in tasks]
        finally:
            for task in tasks:
                task.cancel()
    if None not in sizes:
        ledgers = [one for one in files if one.path == LEDGER]
        sizes += [_read(jobs, node_id, name, one, directory) for one in ledgers]
    return [size for size in sizes if size is not None]


def _read(jobs: Jobs, node_id: str, name: str, one: ListedFile, directory: Path) -> int | None:
    content = jobs.read_file(node_id, record_name(name, one.source))[: one.num_bytes]
    if hashlib.sha256(content).hexdigest() != one.sha256:
        return None
    path = directory / one.path
    make_folder(path.parent)
    write_whole(path, content)
    return one.num_bytes

"""What processes of a study leave behind on this machine, and how that is ended.

A worker may be killed while it hangs, and its children outlive it: a data loader's worker that
waits for a lock holds the dead process's connections open, so that nobody would hear of its end.
Every worker heads a process group of its own, which is killed as one. What has left the group, by
`setsid`, is found by a mark in its environment once the study is over.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

MARK = "STABILITY_SEARCH_DRIVER"  # variable that every process of a study inherits

_PASSES = 3  # a process may fork while its parent is being killed


def lead_group() -> None:
    """Make this process the head of a group that its children belong to."""
    with contextlib.suppress(PermissionError):  # it leads a session, and so a group, already
        os.setpgid(0, 0)


def kill_group(pid: int) -> None:
    """Kill a process that leads a group, and all of the group even where it is gone itself.

    Args:
        pid: The process, on this machine, > 1.

    Raises:
        ValueError: It is the system's first process, or none.
    """
    if pid <= 1:  # 0 would be the caller's own group
        raise ValueError(f"pid: a process that we started must be given, but got {pid}.")
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def ended_at_last() -> Iterator[None]:
    """Mark every process that is started meanwhile, and end what is left of them at the end."""
    mark, before = new_mark(), os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        os.environ.pop(MARK)
        if before is not None:  # a study within a trial of another
            os.environ[MARK] = before
        kill_marked(mark)


def new_mark() -> str:
    """Return a value of `MARK` that no other study on this machine has."""
    return f"{os.getpid()}-{os.urandom(8).hex()}"


def kill_marked(mark: str) -> int:
    """Kill every process that carries the mark and that this process is no ancestor of.

    A process that was started with another environment cannot be found; neither can any where
    there is no /proc.

    Args:
        mark: What `new_mark` returned and `MARK` was while the study's processes were started.

    Returns:
        How many were killed.
    """
    killed: set[int] = set()
    for _ in range(_PASSES):
        orphans = _marked_orphans(mark)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not orphans - killed:
            break
        killed |= orphans
    return len(killed)


def _marked_orphans(mark: str) -> set[int]:
    entry = f"{MARK}={mark}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = entry in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if is_marked and not _descends_from(int(folder.name), os.getpid()):
            found.add(int(folder.name))
    return found


def _descends_from(pid: int, ancestor: int) -> bool:
    while pid not in {0, 1, ancestor}:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])  # a name may hold spaces and brackets
    return pid == ancestor

"""A driver's folder for temporary files, and the removal of those that killed drivers left behind.

A folder says by a file in it whose it is: its driver keeps that file locked for as long as it
lives. Process ids say nothing where containers share the place of temporary files.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "stability-ray-"  # short: paths of Ray's sockets end at 107 bytes
_MARKER = ".stability-search-driver"


class Scratch:
    """A folder of this driver's own; `close` it.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        remove_stale()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        part = self.path / f"{_MARKER}.part"
        self._lock = part.open("wb")  # no process that is started inherits it
        with contextlib.suppress(OSError):  # without locks there, nobody else removes the folder
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(self.path / _MARKER)  # marked once it is locked, never before

    def close(self) -> None:
        """Remove the folder, and once more what killed drivers left; a second call is harmless."""
        _remove(self.path)
        self._lock.close()
        remove_stale()


def remove_stale() -> None:
    """Remove what drivers of this user left behind that were killed and could not do it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # no folder of a driver, or its driver lives
            if _is_own(folder):
                _remove_unlocked(folder)


def _is_own(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _remove_unlocked(folder: Path) -> None:
    """Empty a folder, or remove it if it is empty: its driver's last processes may still write.

    Raises:
        OSError: It is not marked, or its driver lives.
    """
    with (folder / _MARKER).open("r+b") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entries = [entry for entry in folder.iterdir() if entry.name != _MARKER]
        if not entries:
            _remove(folder)
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is gone, as it should be
        (folder / _MARKER).touch()  # something was written meanwhile: left to the next driver

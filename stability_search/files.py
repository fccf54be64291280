"""One way to write a file: beside its target, to the disk, then renamed over it.

A reader sees the old file or the new one, never half of either, whatever kills the writer.
"""

import contextlib
import os
from pathlib import Path

from stability_search.errors import StoppedEarlyError

PART_SUFFIX = ".part"  # of the file beside the target, while it is written


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, and survives a power cut.

    Args:
        path: The file; replaced if it exists. Its folder must exist.
        content: Bytes as they are, or text written as UTF-8 with its line ends unchanged; what
            UTF-8 cannot hold (a lone surrogate) is written as an escape.

    Raises:
        StoppedEarlyError: The file could not be written: disk full, over quota, not permitted,
            or a disk error. The target is as it was and nothing is left beside it.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        _write_synced(part, data)
        put_in_place(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a file that is already on the disk to its final name, for good.

    Raises:
        StoppedEarlyError: It could not be renamed.
    """
    try:
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> StoppedEarlyError:
    """Say that a file could not be written and what to do about it."""
    return StoppedEarlyError(
        f"{path}: could not be written: {error.strerror or error}.",
        hint="Free some space or restore access; every finished trial is kept.",
    )


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody else writes to."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        part.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself can be lost in a power cut.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

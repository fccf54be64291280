"""The list of a run directory's files, as one machine writes it and another believes it.

Whoever owns the cluster writes it: every value is checked before anything is done with it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from stability_search.files import PART_SUFFIX
from stability_search.inert import is_in_sight

LEDGER = "study.db"
MARK = ".fetched"  # of a copy: ours, and never a file of a run
RUN_LINK = "run"  # in the study's folder among Ray's logs, to the run directory

_JOURNAL = "-journal"
_MOST_BYTES_OF_NAME, _MOST_BYTES_OF_PATH = 200, 1000  # file systems take 255 and 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedFile:
    """One file of a run directory.

    Attributes:
        path: Its place in the directory; see `is_file_of_run`.
        num_bytes: Its size when it was listed; a log may have grown since.
        sha256: Hash of so many first bytes.
    """

    path: str
    num_bytes: int
    sha256: str

    @property
    def source(self) -> str:
        """Where it can be read, seen from the study's folder among Ray's logs."""
        return LEDGER if self.path == LEDGER else f"{RUN_LINK}/{self.path}"

    @classmethod
    def from_json(cls, data: Any) -> Self:  # noqa: ANN401 - JSON
        """Read one entry of a listing.

        Raises:
            ValueError: It is something else, or its path is no file of a run directory.
        """
        try:
            path, num_bytes, sha256 = data["path"], data["num_bytes"], data["sha256"]
        except (TypeError, KeyError) as error:
            raise ValueError("no entry of a listing") from error
        if type(num_bytes) is not int or not 0 <= num_bytes < 2**63:
            raise ValueError("a number of bytes is needed, but got something else")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError("a SHA-256 is needed, but got something else")
        return cls(path=checked_path(path), num_bytes=num_bytes, sha256=sha256)


def is_file_of_run(path: str) -> bool:
    """Say whether a path may be that of a file of a run directory.

    It leads out of no directory on any system, can be shown and written as it is, has a length
    that file systems take, and is none of the names that passing files and our own mark have.

    Args:
        path: With slashes, from the directory.
    """
    if not is_in_sight(path) or "\\" in path or len(path.encode()) > _MOST_BYTES_OF_PATH:
        return False  # what is in sight can be encoded
    return all(
        part not in {"", ".", ".."}
        and len(part.encode()) <= _MOST_BYTES_OF_NAME
        and part.casefold() != MARK  # also where `.Fetched` is the same file
        and not part.casefold().endswith((PART_SUFFIX, _JOURNAL))
        for part in path.split("/")
    )


def checked_path(path: Any) -> str:  # noqa: ANN401 - JSON
    """Return a path that somebody else wrote.

    Raises:
        ValueError: It is none of a file of a run directory; see `is_file_of_run`.
    """
    if not isinstance(path, str) or not is_file_of_run(path):
        shown = f"{path[:99]!r}" if isinstance(path, str) else "something else"
        raise ValueError(f"a path within the run directory is needed, but got {shown}")
    return path


def listing_text(files: Sequence[ListedFile]) -> str:
    """Return a list of files as one JSON document."""
    return json.dumps([asdict(one) for one in files])


def read_listing(text: bytes) -> tuple[ListedFile, ...]:
    """Read what `listing_text` returned.

    Raises:
        ValueError: It is something else, or names a file twice.
    """
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise ValueError("no list of files") from error
    if not isinstance(data, list):
        raise ValueError("no list of files")  # noqa: TRY004 - of a text, not of an argument
    files = tuple(ListedFile.from_json(one) for one in data)
    if len({one.path for one in files}) < len(files):
        raise ValueError("it names a file twice")
    return files

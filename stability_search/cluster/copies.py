"""What a folder is a copy of: which files were fetched, and that nobody has changed them since."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stability_search.cluster.snapshot import ListedFile
from stability_search.errors import UsageError
from stability_search.files import write_whole

LEDGER = "study.db"
_MARK = ".fetched"  # in the copy


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyMark:
    """What stands in a copy beside the files.

    Attributes:
        name: The study.
        paths: Every file that was ever fetched.
        ledgers: Hashes that the ledger may have: of before and of after the latest fetch.
    """

    name: str
    paths: tuple[str, ...] = ()
    ledgers: tuple[str, ...] = ()


def read_mark(directory: Path, name: str) -> CopyMark:
    """Return the mark of an earlier fetch, or a new one for an empty folder.

    Raises:
        UsageError: Something else is there, or somebody went on with the copy.
    """
    if not any(directory.iterdir()):
        return CopyMark(name=name)
    try:
        data = json.loads((directory / _MARK).read_text())
        paths, ledgers = tuple(data["paths"]), tuple(data["ledgers"])
        mark = CopyMark(name=str(data["name"]), paths=paths, ledgers=ledgers)
    except (OSError, ValueError, TypeError, KeyError):
        mark = CopyMark(name="")
    ledger = directory / LEDGER
    is_untouched = not ledger.is_file() or _sha256(ledger) in mark.ledgers
    if mark.name == name and is_untouched:
        return mark
    what = "its study.db changed since it was fetched" if mark.name == name else "it is not empty"
    raise UsageError(
        f"{directory}: {what}, and would be written over.", hint="Choose another by --output."
    )


def write_mark(directory: Path, mark: CopyMark, listing: Sequence[ListedFile]) -> CopyMark:
    """Say what will be there, before it is."""
    ledger = directory / LEDGER
    hashes = [one.sha256 for one in listing if one.path == LEDGER]
    hashes += [_sha256(ledger)] if ledger.is_file() else []
    paths = sorted({*mark.paths, *(one.path for one in listing)})
    new = CopyMark(name=mark.name, paths=tuple(paths), ledgers=tuple(hashes))
    write_whole(directory / _MARK, json.dumps(asdict(new)))
    return new


def remove_gone(directory: Path, mark: CopyMark, listing: Sequence[ListedFile]) -> None:
    """Remove what the study has removed since, such as a choice that did not hold."""
    for path in set(mark.paths) - {one.path for one in listing}:
        (directory / path).unlink(missing_ok=True)


def is_there(directory: Path, one: ListedFile) -> bool:
    """Say whether a file of the listing is in the copy, and right."""
    path = directory / one.path
    if not path.is_file() or path.stat().st_size != one.num_bytes:
        return False
    return _sha256(path) == one.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

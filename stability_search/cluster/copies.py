"""What a folder is a copy of: which files were fetched, and that nobody has changed them since."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stability_search.cluster.listing import LEDGER, MARK, ListedFile, checked_path
from stability_search.errors import UsageError
from stability_search.files import cannot_write, write_whole
from stability_search.records.verdict import Verdict, VerdictKind

# What `report` writes from the ledger at any time, here as there; a test holds the two together.
MADE_AGAIN = frozenset(
    {
        *("trials.parquet", "trials.csv", "configurations.parquet", "configurations.csv"),
        *("report.html", "report.md", "report.json", "best.yaml"),
    }
)
_MAX_SHOWN = 5


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
    is_untouched = False
    try:
        if not any(directory.iterdir()):
            return CopyMark(name=name)
        data = json.loads((directory / MARK).read_text())
        mark = CopyMark(
            name=str(data["name"]),
            paths=tuple(checked_path(path) for path in data["paths"]),
            ledgers=tuple(data["ledgers"]),
        )
        ledger = directory / LEDGER
        is_untouched = not ledger.is_file() or _sha256(ledger) in mark.ledgers
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        mark = CopyMark(name="")
    if mark.name == name and is_untouched:
        return mark
    what = "its study.db changed since it was fetched" if mark.name == name else "it is not empty"
    raise UsageError(
        f"{directory}: {what}, and would be written over.", hint="Choose another by --output."
    )


def refuse_to_replace(directory: Path, mark: CopyMark, listing: Sequence[ListedFile]) -> None:
    """Refuse a listing that names what somebody else put into the copy.

    What our own `report` wrote there is nobody's: it can be made again.

    Args:
        directory: The copy.
        mark: What was fetched, or was about to be.
        listing: What is to come.

    Raises:
        UsageError: A file of another content is there that no fetch brought; see also
            `place_in_copy`.
    """
    known = set(mark.paths)
    new = [one for one in listing if one.path not in known]
    there = [one.path for one in new if _is_taken(directory, one)]
    if there:
        shown = ", ".join(there[:_MAX_SHOWN])
        rest = f" and {len(there) - _MAX_SHOWN} more" if len(there) > _MAX_SHOWN else ""
        raise UsageError(
            f"{directory}: {shown}{rest}: not fetched, and would be written over.",
            hint="Move it elsewhere, or choose another directory by --output.",
        )


def _is_taken(directory: Path, one: ListedFile) -> bool:
    place = place_in_copy(directory, one.path)
    if place.is_symlink():  # `report` makes none
        return not is_there(directory, one)
    is_ours = one.path in MADE_AGAIN and place.is_file()
    return place.exists() and not is_ours and not is_there(directory, one)


def copied_study(directory: Path) -> str:
    """Return the name of the study that a folder is an untouched copy of; empty for none.

    Args:
        directory: A run directory; it may be anything.
    """
    try:
        name = str(json.loads((directory / MARK).read_text())["name"])
        return read_mark(directory, name).name
    except (OSError, ValueError, TypeError, KeyError, RecursionError, UsageError):
        return ""


def unfinished_study(directory: Path, verdict: Verdict | None) -> str:
    """Return the name of the study that a folder is a copy of and that may still run elsewhere.

    Args:
        directory: A run directory; it may be anything.
        verdict: How the study ended, by what is known there; None where nothing is.

    Returns:
        Its name; empty where the study had ended when it was fetched, or goes on here.
    """
    if verdict is not None and (verdict.kind is not VerdictKind.INCOMPLETE or verdict.is_running):
        return ""
    return copied_study(directory)


def write_mark(directory: Path, mark: CopyMark, listing: Sequence[ListedFile]) -> CopyMark:
    """Say what will be there, before it is."""
    ledger = directory / LEDGER
    hashes = [one.sha256 for one in listing if one.path == LEDGER]
    hashes += [_sha256(ledger)] if ledger.is_file() else []
    paths = sorted({*mark.paths, *(one.path for one in listing)})
    new = CopyMark(name=mark.name, paths=tuple(paths), ledgers=tuple(hashes))
    write_whole(directory / MARK, json.dumps(asdict(new)))
    return new


def remove_gone(directory: Path, mark: CopyMark, listing: Sequence[ListedFile]) -> None:
    """Remove what the study has removed since, such as a choice that did not hold.

    Raises:
        UsageError: See `place_in_copy`.
    """
    for path in sorted(set(mark.paths) - {one.path for one in listing}):
        place = place_in_copy(directory, path)
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(place, error) from error


def is_there(directory: Path, one: ListedFile) -> bool:
    """Say whether a file of the listing is in the copy, and right.

    Raises:
        UsageError: See `place_in_copy`.
    """
    path = place_in_copy(directory, one.path)
    try:
        return path.stat().st_size == one.num_bytes and _sha256(path) == one.sha256
    except OSError:  # not there, or it cannot be read
        return False


def place_in_copy(directory: Path, path: str) -> Path:
    """Return where a file of a study lies in its copy.

    Args:
        directory: The copy.
        path: A checked path of the study's.

    Raises:
        UsageError: A link in the copy leads out of it; what lies there is nobody's to change.
    """
    place = directory / path
    try:
        is_inside = place.parent.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # a circle of links
        is_inside = False
    if not is_inside:
        raise UsageError(
            f"{place.parent}: a link leads out of the copy, where nothing is written or removed.",
            hint="Remove the link, or choose another directory by --output.",
        )
    return place


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Data on standard output, and paths as a person would write them."""

from pathlib import Path

from stability_search.cli.outlets import data_sink
from stability_search.errors import StoppedEarlyError


def print_data(*lines: str) -> None:
    """Write data, as opposed to messages.

    Raises:
        StoppedEarlyError: It could not be written, and not because its reader had enough.
    """
    with data_sink() as out:
        out.write(*lines)
        if out.failure:
            raise StoppedEarlyError(f"Standard output cannot be written: {out.failure}.")


def short_path(path: Path) -> str:
    """Return a path as seen from here, where it lies below; else whole."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

"""Data on standard output, and paths as a person would write them."""

import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from stability_search.cli.outlets import data_sink
from stability_search.errors import StoppedEarlyError

_LEAST_WIDTH = 20


def print_data(*lines: str) -> None:
    """Write data, as opposed to messages.

    Raises:
        StoppedEarlyError: It could not be written, and not because its reader had enough.
    """
    with data_sink() as out:
        out.write(*lines)
        if out.failure:
            raise StoppedEarlyError(f"Standard output cannot be written: {out.failure}.")


def folded(lines: Iterable[str]) -> list[str]:
    """Break lines between words where standard output is a terminal; leave them whole elsewhere.

    Args:
        lines: Inert text to be read; a command to be copied must not be among it.
    """
    lines = list(lines)
    if sys.stdout is None or not sys.stdout.isatty():
        return lines
    width = shutil.get_terminal_size().columns
    return [part for line in lines for part in _broken(line, width)]


def _broken(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line,
        max(width, _LEAST_WIDTH),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def short_path(path: Path) -> str:
    """Return a path as seen from here, where it lies below; else whole."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

"""Rows as CSV text that a spreadsheet does not execute."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

from stability_search.inert import inert
from stability_search.records.values import Scalar

# Blank and unseen characters may stand before it; the last four are full-width forms of + - = @.
_FORMULA_START = re.compile(
    r"^[\s\x00-\x1f\xad\u200b-\u200f\u2060\ufeff]*[=+\-@|%\t\r\n\uff0b\uff0d\uff1d\uff20]"
)


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Scalar]]) -> str:
    """Return a table as CSV.

    Args:
        header: The names of the columns.
        rows: Their values; None is the empty cell.

    Returns:
        Lines that end in a line feed. Text that starts like a formula has an apostrophe in front,
        and what cannot be seen in it is spelled out, line ends too: a row is a line.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_text(name) for name in header])
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Scalar) -> Scalar:
    if value is None:
        return ""
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    return f"'{inert(value)}" if _FORMULA_START.match(value) else inert(value)

"""The three forms in which a reading command prints what it found."""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from stability_search.cli.printing import print_data
from stability_search.inert import inert
from stability_search.records.values import Json, Scalar
from stability_search.spreadsheet import csv_text


class Format(StrEnum):
    """How data is printed: for a reader, a program, or a spreadsheet."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


FormatOption = Annotated[
    Format, typer.Option("--format", help="For a reader, a program, or a spreadsheet.")
]


def print_formatted(
    chosen: Format, *, lines: Sequence[str], rows: Sequence[Mapping[str, Json]], document: Json
) -> None:
    """Print one finding in the form that was asked for.

    Args:
        chosen: The form.
        lines: The finding for a reader; hostile text in it is made inert here.
        rows: The finding for a spreadsheet, with the same keys in every row; null is empty. Of
            no rows nothing is printed, not even a header.
        document: The finding for a program.

    Raises:
        StoppedEarlyError: Standard output cannot be written.
        ValueError: A number in the form that was asked for is not finite.
    """
    match chosen:
        case Format.TABLE:
            print_data(*(inert(line) for line in lines))
        case Format.JSON:
            print_data(_json(document, indent=2))
        case Format.CSV if rows:
            print_data(*_csv(rows).splitlines())


def _json(value: Json, *, indent: int | None = None) -> str:
    """Return strict JSON in ASCII, with nothing in it that a terminal acts on."""
    return json.dumps(value, indent=indent, allow_nan=False)


def _csv(rows: Sequence[Mapping[str, Json]]) -> str:
    names = tuple(rows[0])
    cells = ([_cell(row[name]) for name in names] for row in rows)
    return csv_text(names, cells)


def _cell(value: Json) -> Scalar:
    if value is None or isinstance(value, str | bool | int):
        return value
    return float(_json(value)) if isinstance(value, float) else _json(value)

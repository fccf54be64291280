"""The three forms in which a reading command prints what it found."""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from stability_search.cli.inert import inert
from stability_search.cli.printing import print_data
from stability_search.records import Json, Scalar
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
        rows: The finding for a spreadsheet, with the same keys in every row; null is empty.
        document: The finding for a program; its numbers must be finite.

    Raises:
        StoppedEarlyError: Standard output cannot be written.
        ValueError: The document holds a number that is not finite.
    """
    match chosen:
        case Format.TABLE:
            print_data(*(inert(line) for line in lines))
        case Format.JSON:
            print_data(json.dumps(document, indent=2, allow_nan=False))
        case Format.CSV:
            print_data(*_csv(rows).splitlines())


def _csv(rows: Sequence[Mapping[str, Json]]) -> str:
    header = tuple(rows[0]) if rows else ()
    return csv_text(header, ([_cell(row[name]) for name in header] for row in rows))


def _cell(value: Json) -> Scalar:
    if isinstance(value, str):
        return inert(value)
    return json.dumps(value, allow_nan=False) if isinstance(value, list | dict) else value

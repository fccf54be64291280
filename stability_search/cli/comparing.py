"""The command `compare`: two runs beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.formats import Format, FormatOption, print_formatted
from stability_search.cli.options import Work

FirstArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, shown as A.")]
SecondArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Another, shown as B.")]


def compare(
    *, first: FirstArgument, second: SecondArgument, chosen: FormatOption = Format.TABLE
) -> Work:
    """Compare two runs: what was asked, the verdicts, the seeds they share.

    Tests whether q differs where the runs can be compared, else says why they cannot be.
    Exit: 0, or 2 where a run cannot be read.
    """

    def work() -> int:
        from stability_search import comparison

        found = comparison.compare(first, second)
        print_formatted(
            chosen,
            lines=comparison.as_lines(found),
            rows=comparison.as_rows(found),
            document=comparison.as_document(found),
        )
        return 0

    return work

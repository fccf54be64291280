"""The option `--figures` of `report`: the figures of the page as files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import short_path
from stability_search.inert import inert


class FigureFormat(StrEnum):
    """What the figures are written as."""

    PNG = "png"
    SVG = "svg"


FiguresOption = Annotated[
    FigureFormat | None,
    typer.Option(
        "--figures",
        help="Also write every figure to RUN/figures, for a paper or a slide; needs the extra "
        "[figures] and a Chromium of your own.",
        show_default=False,
    ),
]


class Drawing:
    """Draws the figures of a page that is yet to be written.

    Args:
        kind: What they are written as.

    Raises:
        UsageError: What draws them is not installed.
    """

    def __init__(self, kind: FigureFormat) -> None:
        from stability_search.report.figure_files import find_browser

        self._kind = kind
        self._browser = find_browser()

    def draw(self, directory: Path) -> None:
        """Write the figures of a run, and say so."""
        from stability_search.report.figure_files import write_figures

        *pictures, captions = write_figures(
            directory / "report.html", str(self._kind), self._browser
        )
        folder = inert(short_path(captions.parent))
        message_sink().write(f"figures: {len(pictures)} in {folder}, captions in {captions.name}")

"""The three files of a report, each whole or not at all."""

import json
from pathlib import Path

from stability_search.files import write_whole
from stability_search.report.context import Report, View
from stability_search.report.document import document_of
from stability_search.report.markdown import summary_of
from stability_search.report.page import page_of


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write `report.html`, `report.md` and `report.json`.

    All three are made before the first is written, so that a fault in one leaves the old three.

    Args:
        report: What to write.
        folder: The run directory; exists.

    Returns:
        The three files.

    Raises:
        StoppedEarlyError: The disk is full or the folder cannot be written.
    """
    view = View(report)
    texts = {
        "report.html": page_of(view),
        "report.md": summary_of(view),
        "report.json": json.dumps(document_of(view), allow_nan=False, indent=2) + "\n",
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return tuple(folder / name for name in texts)

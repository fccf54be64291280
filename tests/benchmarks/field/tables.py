"""The field's tables, as Markdown, and their place in a document."""

import re
from collections.abc import Mapping
from pathlib import Path

from stability_search.records.values import Json
from tests.benchmarks.field.measuring import Measured, Row

_COUNT = re.compile(r" in \d+ of \d+ steps")
_HEADER = """\
| loop | steps | survived | learned | ended at step | steps lost | probe loss | metrics |
|---|---|---|---|---|---|---|---|"""


def table(measured: Measured) -> str:
    """Write one case: its rows, then what the search chose."""
    rows = [_line(row) for row in measured.rows]
    settings = "" if measured.settings is None else _shown(measured.settings)
    took = "" if measured.study_s is None else f" The study took {measured.study_s / 60:.1f} min."
    choice = (
        f"Choice: {settings}. Margin: {measured.margin}."
        if measured.settings is not None
        else f"No choice: {measured.verdict}"
    )
    head = (
        f"Report {measured.case.report}, `{measured.case.space}.yaml`. Ignoring the input "
        f"costs a probe loss of {measured.e0:.4g}.{took}"
    )
    return "\n".join([head, "", _HEADER, *rows, "", choice])


def _line(row: Row) -> str:
    learned = "" if row.learned is None else f"{row.learned}/{row.num_seeds}"
    ended = ", ".join(str(step) for step in row.failed_at)
    if row.failures:
        # How many steps it took differs from seed to seed; how it failed does not.
        kinds = dict.fromkeys(_COUNT.sub("", failure) for failure in row.failures)
        ended += f" ({'; '.join(kinds)})"
    loss = "" if row.probe_loss is None else f"{row.probe_loss:.4g}"
    metrics = ", ".join(f"{name} {value:.3g}" for name, value in row.metrics.items())
    return (
        f"| {row.name} | {row.num_steps} | {row.survived}/{row.num_seeds} | {learned} | {ended} "
        f"| {100 * row.lost:.3g} % | {loss} | {metrics} |"
    )


def _shown(settings: Mapping[str, Json]) -> str:
    parts = []
    for name, value in settings.items():
        if value is not None:
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            parts.append(f"{name} {text}")
    return ", ".join(parts)


def write_into(path: Path, name: str, text: str) -> None:
    """Put a table between its two marks in a document.

    Args:
        path: The document.
        name: Of the case; the marks are `<!-- field NAME -->` and `<!-- end -->`.
        text: The table.

    Raises:
        ValueError: The document has no such marks.
    """
    whole = path.read_text(encoding="utf-8")
    begin = f"<!-- field {name} -->\n"
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition("<!-- end -->")
    if not (found and closed):
        raise ValueError(f"{path}: it must hold {begin.strip()} and <!-- end -->, but does not.")
    path.write_text(f"{before}{begin}{text}\n{closed}{after}", encoding="utf-8")

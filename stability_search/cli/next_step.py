"""The command that a reader of a verdict wants next, as a terminal shows it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.cli.printing import short_path
from stability_search.errors import StabilitySearchError, StoppedEarlyError, UserCodeError
from stability_search.inert import inert
from stability_search.next_command import next_command
from stability_search.records.verdict import Verdict

if TYPE_CHECKING:
    from stability_search.settings.study import SearchSettings


def next_step(directory: Path, verdict: Verdict | None) -> str:
    """Return what to do next, as one line.

    Args:
        directory: The run directory.
        verdict: How the run ended or stopped; None where it was killed.
    """
    run = short_path(directory)
    run = f"./{run}" if run.startswith("~") else run  # a folder of that name
    code = None if verdict is None else verdict.exit_code
    return inert(
        next_command(
            verdict,
            run,
            budgets=_budgets(directory) if code == StoppedEarlyError.exit_code else None,
            made_by=_made_by(directory) if code == UserCodeError.exit_code else "",
        )
    )


def _budgets(directory: Path) -> "SearchSettings | None":
    from stability_search import space as spaces

    try:
        return spaces.load(directory / "space.yaml").study.search
    except (StabilitySearchError, OSError):
        return None


def _made_by(directory: Path) -> str:
    try:
        known = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    return known if isinstance(known, str) else ""

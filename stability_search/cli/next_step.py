"""The command that a reader of a verdict wants next."""

import shlex
from pathlib import Path

from stability_search.cli.inert import inert
from stability_search.cli.printing import short_path
from stability_search.errors import UserCodeError
from stability_search.records import Verdict, VerdictKind


def next_step(directory: Path, verdict: Verdict | None) -> str:
    """Return what to do next, as one line.

    Args:
        directory: The run directory.
        verdict: How the run ended or stopped; None where it was killed.
    """
    resume = f"stability-search resume {_quoted(directory)}"
    if verdict is None:
        return resume
    match verdict.kind:
        case VerdictKind.STABLE:
            best = _quoted(directory / "best.yaml")
            return f"stability-search train --space {best} --steps 10000  # your own length"
        case VerdictKind.NONE:
            return "change the space file as the report says, then run it again"
        case VerdictKind.INCOMPLETE if verdict.is_running:
            return f"stability-search status {_quoted(directory)}"
        case VerdictKind.INCOMPLETE if verdict.exit_code == UserCodeError.exit_code:
            return "mend the task, then run again with another --output"
        case VerdictKind.INCOMPLETE:
            more = "raise what ended it: --set search.step_budget=... or search.time_budget_s=..."
            return f"{resume}  # {more}" if "budget" in verdict.reason else resume


def _quoted(path: Path) -> str:
    return inert(shlex.quote(short_path(path)))

"""The command that a reader of a verdict wants next, as a terminal shows it."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.cli.printing import short_path
from stability_search.errors import StabilitySearchError, StoppedEarlyError, UserCodeError
from stability_search.inert import inert
from stability_search.next_command import next_command
from stability_search.records.verdict import Verdict

if TYPE_CHECKING:
    from stability_search.settings.study import StudySettings
    from stability_search.spending import Spent

_FETCH = "stability-search fetch {name} --address URL  # or submit it again, if it stopped there"
_COPY = (
    "warning: {run} is a copy of {name}, which had not ended on its cluster when it was fetched; "
    "go on here only if it has stopped there: both must not go on"
)


def next_step(directory: Path, verdict: Verdict | None) -> str:
    """Return what to do next, as one line.

    Args:
        directory: The run directory.
        verdict: How the run ended or stopped; None where it was killed.
    """
    from stability_search.cluster.copies import unfinished_study

    if copied := unfinished_study(directory, verdict):
        return inert(_FETCH.format(name=shlex.quote(copied)))
    run = short_path(directory)
    run = f"./{run}" if run.startswith("~") else run  # a folder of that name
    code = None if verdict is None else verdict.exit_code
    is_stopped = code == StoppedEarlyError.exit_code
    study, spent = _budgets(directory) if is_stopped else (None, None)
    return inert(
        next_command(
            verdict,
            run,
            study=study,
            spent=spent,
            made_by=_made_by(directory) if code == UserCodeError.exit_code else "",
        )
    )


def copy_warnings(directory: Path) -> list[str]:
    """Return what to know before a copy goes on here whose study may still run on a cluster.

    Args:
        directory: What is to go on; it may be anything.

    Returns:
        One line, or none.
    """
    from stability_search.cluster.copies import copied_study, unfinished_study

    if not copied_study(directory):
        return []
    name = unfinished_study(directory, _verdict_in(directory))
    return [inert(_COPY.format(run=short_path(directory), name=name))] if name else []


def _verdict_in(directory: Path) -> Verdict | None:
    from stability_search.search.closing import known_verdict
    from stability_search.search.ledger import Ledger
    from stability_search.search.run_directory import RunDirectory

    try:
        return known_verdict(Ledger(RunDirectory(path=directory).ledger))
    except StabilitySearchError:  # who goes on with it says why it cannot be read
        return None


def _budgets(directory: Path) -> tuple["StudySettings | None", "Spent | None"]:
    """Return what a study might spend and what it has spent, as far as its files say."""
    from stability_search import space as spaces
    from stability_search.search.ledger import Ledger
    from stability_search.search.run_directory import RunDirectory
    from stability_search.spending import ended_trial, spent_by

    run = RunDirectory(path=directory)
    study = spent = None
    with contextlib.suppress(StabilitySearchError, OSError):
        space = spaces.load(run.space)
        study = space.study
        ended = map(ended_trial, Ledger(run.ledger).rows())
        spent = spent_by(ended, has_search=space.has_space)
    return study, spent


def _made_by(directory: Path) -> str:
    try:
        known = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    return known if isinstance(known, str) else ""

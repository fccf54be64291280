"""The command that goes on from a verdict: the same one in a terminal and on the page."""

import shlex
from typing import TYPE_CHECKING

from stability_search.errors import StoppedEarlyError, UserCodeError
from stability_search.records.verdict import Verdict, VerdictKind

if TYPE_CHECKING:
    from stability_search.settings.study import StudySettings
    from stability_search.spending import Spent

_DIGITS = 15  # of a budget in seconds: as many as a float has


def next_command(  # noqa: PLR0911 - one per end of a study
    verdict: Verdict | None,
    run: str,
    *,
    study: "StudySettings | None",
    spent: "Spent | None",
    made_by: str,
) -> str:
    """Return what to type next.

    Args:
        verdict: How the study ended or stopped; None where it was killed.
        run: The run directory as its reader types it; a leading `~/` is left to the shell.
        study: The study's blocks, with what it might spend; None where that is unknown.
        spent: What it has spent; None where that is unknown.
        made_by: The command line that made the run; empty where that is unknown.

    Returns:
        One command for a shell, with a comment where a reader has to do something first. A path
        in it is quoted, which makes it no safer to print than it was.
    """
    run = run.rstrip("/")
    resume = f"stability-search resume {_quoted(run)}"
    again = f"stability-search run --space {_quoted(run + '/space.yaml')}"
    if verdict is None:
        return resume
    match verdict.kind:
        case VerdictKind.STABLE:
            best = _quoted(run + "/best.yaml")
            return f"stability-search train --space {best} --steps 10000  # your own length"
        case VerdictKind.NONE:
            return f"{again}  # change it first, as the report says"
        case VerdictKind.INCOMPLETE if verdict.is_running:
            return f"stability-search status {_quoted(run)}"
        case VerdictKind.INCOMPLETE if verdict.exit_code == UserCodeError.exit_code:
            return f"{_without_output(made_by) or again}  # mend the task first"
        case VerdictKind.INCOMPLETE if verdict.exit_code == StoppedEarlyError.exit_code:
            return f"{resume}{_larger(study, spent)}"
        case VerdictKind.INCOMPLETE:
            return resume


def _larger(study: "StudySettings | None", spent: "Spent | None") -> str:
    """Return the options that raise every budget; empty where there was none to run out of."""
    if study is None:
        return ""
    from stability_search.spending import larger_seconds, larger_steps

    text = ""
    if (steps := larger_steps(study, spent)) is not None:
        text += f" --set search.step_budget={steps}"
    if (seconds := larger_seconds(study, spent)) is not None:
        text += f" --set search.time_budget_s={seconds:.{_DIGITS}g}"
    return text


def _without_output(made_by: str) -> str:
    """Return the command that made a run without its output; empty where it was another one."""
    try:
        words = shlex.split(made_by)
    except ValueError:  # a quotation that does not end
        return ""
    if words[:2] != ["stability-search", "run"]:
        return ""
    if "--output" in words:
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    return " ".join(_quoted(word) for word in words if not word.startswith("--output="))


def _quoted(word: str) -> str:
    """Quote a word for a shell, leaving a leading `~/` to be expanded."""
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)

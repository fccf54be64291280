"""What can go wrong for a user: one message, one way out, one exit code.

StabilitySearchError
  UsageError            exit 2: a command or a file that cannot be honoured
    LockedError         another process is writing there
    SpaceError          every problem of a space file, each with file, line and column
  InfrastructureError   exit 4: machines failed too often
  UserCodeError         exit 5: the task failed in the same way in every early trial
  StoppedEarlyError     exit 6: out of disk, or out of budget before `confirm` could finish
"""

from dataclasses import dataclass
from typing import ClassVar


class StabilitySearchError(Exception):
    """A failure a user can act on: printed as one line, never as a traceback.

    Args:
        message: The rule and the value received.
        hint: The way out; empty where the message holds it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Join message and hint into the printed line."""
        glue = "\n" if "\n" in self.message else " "  # a hint never continues a listing
        return f"{self.message}{glue}{self.hint}".strip()


class UsageError(StabilitySearchError):
    """A command line, a run directory or a setting that cannot be honoured."""


class LockedError(UsageError):
    """Another process is writing to a directory that takes one writer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong in a space file.

    Attributes:
        where: `file:line:column`, or the option (`--set trial.steps=0`) that caused it.
        key: Dotted key, for example `space.learning_rate`; empty for the whole file.
        message: Rule, value received, way out.
        excerpt: The source line with a caret under the value; empty where there is none.
    """

    where: str
    key: str
    message: str
    excerpt: str = ""

    def __str__(self) -> str:
        """Render the line, and the excerpt below it."""
        head = (
            f"{self.where}  {self.key}: {self.message}"
            if self.key
            else (f"{self.where}  {self.message}")
        )
        return f"{head}\n{self.excerpt}" if self.excerpt else head


class SpaceError(UsageError):
    """Every problem of one space file."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        body = "\n".join(str(problem) for problem in problems)
        super().__init__(f"{body}\n{count}; nothing was started")
        self.problems = problems


class InfrastructureError(StabilitySearchError):
    """Machines, not configurations, failed too often."""

    exit_code = 4


class UserCodeError(StabilitySearchError):
    """The user's task failed in the same way in every early trial."""

    exit_code = 5


class StoppedEarlyError(StabilitySearchError):
    """Out of disk or out of budget; what was finished is kept."""

    exit_code = 6

"""What a tracker is told: a study, each of its trials, and how it ended.

Every number is finite and every text is one line without control characters, the home directory
or a host's name; what was not measured is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stability_search.records.values import Scalar
from stability_search.space import Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyLog:
    """A study as it begins, or goes on.

    Attributes:
        directory: Its run directory.
        study_id: Stays the same when the study is resumed; no two studies share it.
        name: The study's name.
        facts: Task, seed and numbers of steps and trials, as text.
        parameters: Settings that vary, and where they may go.
    """

    directory: Path
    study_id: str
    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepScalars:
    """The numbers of one step.

    Attributes:
        step: Attempted step, from 1.
        time_s: When it ended, seconds since 1970.
        values: By tag, as `scalars.step_scalars` names them.
    """

    step: int
    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialLog:
    """One finished trial, or attempt at one.

    Attributes:
        name: Name of its step file: the `trial_id`, with `-attempt2` and so on after a loss.
        stage: `pilot`, `search` or `confirm`.
        outcome: How it ended.
        settings: Every named setting; None where it is off or inactive.
        numbers: Final numbers, named like the columns of the tables.
        texts: What else is known of it, named likewise.
        started_s: When it began, seconds since 1970.
        ended_s: When it ended.
        num_steps: Attempted steps.
        curve: Its steps; empty where there are too many trials for curves.
    """

    name: str
    stage: str
    outcome: str
    settings: Mapping[str, Scalar]
    numbers: Mapping[str, float]
    texts: Mapping[str, str]
    started_s: float
    ended_s: float
    num_steps: int
    curve: Sequence[StepScalars] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyEnd:
    """How a study ended.

    Attributes:
        verdict: `stable`, `none` or `incomplete`.
        exit_code: Exit code of the command.
        reason: Why there is no choice; empty for `stable`.
        choice: `config_id` of the choice; empty where there is none.
        margin: Doublings of the learning rate that it survives: `2`, or `at least 3` where no
            more were tried; empty where none were.
        settings: The choice's settings.
        numbers: The choice's score, margin and so on, named like the columns.
        files: Report and `best.yaml`, as far as they were written.
    """

    verdict: str
    exit_code: int
    reason: str = ""
    choice: str = ""
    margin: str = ""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


class Tracker(Protocol):
    """Logs a study to one tool. Told one thing at a time, in order; may raise anything."""

    def begin(self, study: StudyLog) -> frozenset[str]:
        """Open the study, or the one that is there, and name the trials it holds already."""

    def add_trial(self, trial: TrialLog) -> None:
        """Log one finished trial."""

    def finish(self, end: StudyEnd) -> None:
        """Log how the study ended."""

    def stop(self) -> None:
        """Log that the study is over though nobody says how it ended: its process is gone."""

    def close(self) -> None:
        """Free what the tool holds; called once, also after an error."""


def shown(value: Scalar) -> str:
    """Return the value of a setting as a space file writes it.

    Example:
        >>> shown(None), shown(True), shown(0.5), shown(1024)
        ('null', 'true', '0.5', '1024')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)

"""What a check of a machine found: one line of `doctor`."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: What was looked at.
        state: Whether a study can run with it.
        found: What is there.
        fix: What to do; empty where nothing need be done.
    """

    name: str
    state: State
    found: str
    fix: str = ""

"""The end of a training in which nothing is trained, and by what name any end is kept."""

from enum import StrEnum

from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.training.history import History

MOST_IDLE_STEPS = 50  # as many as no sound training gives up in a row, and soon enough to matter


class Standstill(StrEnum):
    """The rule of its own that a long training has; a trial is over before it matters."""

    NOTHING_TRAINED = "nothing_trained"


def standstill(history: History) -> tuple[Standstill, str] | None:
    """Say that too many steps in a row have changed no parameter; None while they have not.

    Bad steps are the kill rule's business, which is faster; this is for steps of bad data, of
    which no other rule hears.

    Args:
        history: What the training has shown, the present step included.
    """
    if history.num_idle_steps < MOST_IDLE_STEPS:
        return None
    words = f"the last {MOST_IDLE_STEPS} steps changed no parameter"
    return Standstill.NOTHING_TRAINED, f"nothing was trained: {words}"


def is_untrained(history: History, num_steps: int) -> bool:
    """Say whether no step of a training that took all of its steps changed a parameter.

    Args:
        history: What it showed.
        num_steps: Attempted steps.
    """
    return history.num_idle_steps + history.labels[StepLabel.CALIBRATION] >= num_steps


def rule_named(word: str) -> Outcome | Standstill | None:
    """Return the rule that `TrainEnd.outcome` names; None for an alarm."""
    for kind in (Outcome, Standstill):
        if word in set(kind):
            return kind(word)
    return None

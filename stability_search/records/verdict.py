"""How a study ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from stability_search.records.values import Record


class VerdictKind(StrEnum):
    """The one-word end of a study."""

    STABLE = "stable"
    NONE = "none"
    INCOMPLETE = "incomplete"


class ChoiceReason(StrEnum):
    """Why the choice is the choice."""

    WINNER = "winner"  # better than every other by an exact paired test
    TIED = "tied"  # one of a tied set: largest margin, then score, then lowest learning rate
    ONLY = "only"  # nothing else met the bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict(Record):
    """How a study ended. Configurations are named by `config_id`.

    Attributes:
        kind: `stable`, `none` or `incomplete`.
        exit_code: Exit code of the command.
        is_running: True if it has not ended, and the verdict is of what is known so far.
        choice: What to train with; None unless `stable`.
        choice_reason: Why this one; None unless `stable`.
        fastest: Lowest last probe loss among those that meet the bar; None if there is none.
        tied: The tied set, the choice included; empty unless `choice_reason` is `tied`.
        closest: What came closest where nothing met the bar; None otherwise.
        confirmed: Configurations that had all seeds, best first.
        unfinished: Candidates whose confirmation did not end.
        spared: Candidates left out of confirm: by the yardstick with which it began they could not
            have scored 2 % more than the choice, or missed the bar at every rate.
        missed: What the closest missed, in plain words.
        reason: One sentence on why there is no choice, or no verdict; empty for `stable`.
        warnings: What a reader must know beside the verdict, one sentence each.
    """

    kind: VerdictKind
    exit_code: int
    is_running: bool = False
    choice: str | None = None
    choice_reason: ChoiceReason | None = None
    fastest: str | None = None
    tied: tuple[str, ...] = ()
    closest: str | None = None
    confirmed: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    reason: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the verdict again from what `to_json` returned."""
        tuples = {
            key: tuple(data.get(key, ()))  # earlier versions knew no `spared`
            for key in ("tied", "confirmed", "unfinished", "spared", "missed", "warnings")
        }
        reason = data["choice_reason"]
        return cls(
            **{
                **cls._known(data),
                **tuples,
                "kind": VerdictKind(data["kind"]),
                "choice_reason": None if reason is None else ChoiceReason(reason),
            }
        )

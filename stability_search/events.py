"""What a study tells while it runs: one event at a time, to whoever watches.

An event is news, never the truth: the ledger is. Nothing reads events back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from stability_search.records import Json

SCHEMA = "stability-search/events/1"


class EventName(StrEnum):
    """What can happen, with the fields that come with it."""

    STUDY_STARTED = "study_started"  # run_directory, device, trials, slots, space
    STAGE_STARTED = "stage_started"  # stage, planned (null where the number is not known ahead)
    TRIAL_STARTED = "trial_started"  # trial_id, stage, settings
    # trial_id, step, num_planned_steps, num_bad_steps, scale, grad_norm, loss
    TRIAL_PROGRESS = "trial_progress"
    # trial_id, stage, outcome, reason, q, num_steps, num_planned_steps, wall_s, settings
    TRIAL_FINISHED = "trial_finished"
    TRIAL_RETRIED = "trial_retried"  # trial_id, attempt, reason
    NODE_QUARANTINED = "node_quarantined"  # node, reason
    MESSAGE = "message"  # level (info, warning, error), text
    STUDY_FINISHED = "study_finished"  # verdict, exit_code, report


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened in a study.

    Attributes:
        name: One of `EventName`.
        time: When it happened: UTC, ISO 8601.
        fields: What it says, named like the columns of the tables; numbers may be non-finite
            here and are null in `to_json`.
    """

    name: str
    time: str
    fields: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a name nobody listens to.

        Raises:
            ValueError: `name` is no `EventName`.
        """
        if self.name not in _NAMES:
            known = ", ".join(sorted(_NAMES))
            raise ValueError(f"name: one of {known} must hold, but got {self.name!r}.")

    def number(self, key: str) -> float | None:
        """Return a finite number; None where the field is missing or holds anything else."""
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if math.isfinite(value) else None

    def text(self, key: str) -> str:
        """Return a string; empty where the field is missing or holds anything else."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else ""

    def settings(self) -> Mapping[str, Json]:
        """Return the trial's settings; empty where the event has none."""
        value = self.fields.get("settings")
        return value if isinstance(value, Mapping) else {}

    def to_json(self) -> dict[str, Json]:
        """Return the event as a dict that `json.dumps(..., allow_nan=False)` accepts."""
        fields = {str(key): _finite(value) for key, value in self.fields.items()}
        return {"schema": SCHEMA, "event": str(self.name), "time": self.time, **fields}


_NAMES = frozenset(str(name) for name in EventName)

# A mapping of settings may be any Mapping, and a tuple may stand for a list.
_Loose: TypeAlias = "Json | tuple[_Loose, ...] | Mapping[str, _Loose]"


def _finite(value: _Loose) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

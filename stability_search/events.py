"""What a study tells while it runs: one event at a time, to whoever watches.

An event is news, never the truth: the ledger is. Nothing reads events back.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeAlias

from stability_search.records.values import Json

SCHEMA = "stability-search/events/1"


class EventName(StrEnum):
    """What can happen; `FIELDS` says what comes with it."""

    STUDY_STARTED = "study_started"
    STAGE_STARTED = "stage_started"
    TRIAL_STARTED = "trial_started"
    TRIAL_PROGRESS = "trial_progress"
    TRIAL_FINISHED = "trial_finished"
    TRIAL_RETRIED = "trial_retried"
    NODE_QUARANTINED = "node_quarantined"
    MESSAGE = "message"
    STUDY_FINISHED = "study_finished"


FIELDS: Mapping[EventName, tuple[str, ...]] = {
    EventName.STUDY_STARTED: ("run_directory", "device", "trials", "slots", "space", "outcomes"),
    EventName.STAGE_STARTED: ("stage", "planned", "planned_at_most", "finished"),
    EventName.TRIAL_STARTED: (
        *("trial_id", "stage", "config_id", "seed", "attempt", "node", "num_planned_steps"),
        "settings",
    ),
    EventName.TRIAL_PROGRESS: (
        *("trial_id", "step", "num_planned_steps", "num_bad_steps", "scale", "grad_norm", "loss"),
    ),
    EventName.TRIAL_FINISHED: (
        *("trial_id", "stage", "config_id", "seed", "attempt", "node", "outcome", "reason", "q"),
        *("num_planned_steps", "num_steps", "num_bad_steps", "wall_s", "settings"),
    ),
    EventName.TRIAL_RETRIED: ("trial_id", "attempt", "reason"),
    EventName.NODE_QUARANTINED: ("node", "reason"),
    EventName.MESSAGE: ("level", "text"),
    EventName.STUDY_FINISHED: ("verdict", "exit_code", "config_id", "reason", "report"),
}
"""What comes with each event, every time. A field that `OWN_FIELDS` does not explain is a column
of `trials` or of a step."""

OWN_FIELDS: Mapping[str, str] = {
    "run_directory": "Path of the run directory.",
    "space": "Path of the space file.",
    "trials": "Trials the search plans; 0 without a search.",
    "slots": "Trials at once.",
    "planned": "Trials the stage plans; null where results decide it, as in `confirm`.",
    "planned_at_most": "Most trials the stage can take.",
    "outcomes": "Attempts that an earlier run had finished, by outcome.",
    "finished": "Trials of the stage that an earlier run had finished.",
    "settings": "The settings that vary, by name; all where none does.",
    "level": "`info`, `warning` or `error`.",
    "text": "The message.",
    "verdict": "`stable`, `none` or `incomplete`.",
    "exit_code": "Exit code of the command.",
    "report": "Path of `report.html`; null where there was no time to write it.",
}
"""What fields say that are no column. In `study_finished`, `config_id` is the choice or what came
closest, and `reason` why there is no choice; null and empty where that says nothing."""


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


Listener: TypeAlias = Callable[[Event], None]
"""Hears what happens in a study."""


def ignore(_event: Event) -> None:
    """Listen to nothing."""


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


def stamp(when: datetime) -> str:
    """Return a time in UTC as events and the ledger write it."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def message(level: str, text: str) -> Event:
    """Return an event that says something in words, now.

    Args:
        level: `info`, `warning` or `error`.
        text: What happened.
    """
    fields: dict[str, Json] = {"level": level, "text": text}
    return Event(name=EventName.MESSAGE, time=stamp(datetime.now(UTC)), fields=fields)


def as_markdown() -> str:
    """Return events and fields as Markdown, as they stand in `search/README.md`."""
    lines = ["| event | fields |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{one}`' for one in FIELDS[name])} |" for name in FIELDS]
    lines += ["", "| field | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in OWN_FIELDS.items()]
    return "\n".join(lines) + "\n"

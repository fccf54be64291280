"""Steps of a training, and what a watch says of them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from stability_search.alarms.alarm import Alarm
from stability_search.alarms.watch import AlarmWatch
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.alarms import AlarmSettings

CALM = StepRecord(
    step=0,
    label=StepLabel.OK,
    loss=1.0,
    is_loss_finite=True,
    grad_norm=1.0,
    is_grad_finite=True,
    clipped=False,
    is_applied=True,
    learning_rate=0.1,
    scale=None,
)
BAD: dict[str, Any] = {
    "label": StepLabel.BAD,
    "loss": None,
    "is_loss_finite": False,
    "grad_norm": None,
    "is_applied": False,
}
OVERFLOW: dict[str, Any] = {
    "label": StepLabel.BAD,
    "grad_norm": None,
    "is_grad_finite": False,
    "is_applied": False,
}
Change = dict[str, Any]
Risen = list[tuple[str, int, int]]


def steps(*changes: Change, first: int = 1, falling: bool = True) -> list[StepRecord]:
    """Return calm steps, each changed; their losses fall unless a change says otherwise."""
    return [
        replace(CALM, **{"step": step, "loss": 1 / step if falling else 1.0, **change})
        for step, change in enumerate(changes, start=first)
    ]


def watch(epoch_steps: int | None = 10, *, planned: int = 1000, **thresholds: Any) -> AlarmWatch:  # noqa: ANN401 - any threshold
    settings = AlarmSettings(epoch_steps=epoch_steps, **thresholds)
    return AlarmWatch(settings, num_planned_steps=planned)


def seen(by: AlarmWatch, records: Iterable[StepRecord]) -> list[Alarm]:
    return [alarm for record in records for alarm in by.see(record)]


def risen(by: AlarmWatch, records: Iterable[StepRecord]) -> Risen:
    return [(alarm.name, alarm.step, alarm.epoch) for alarm in seen(by, records)]


def overflow_after(num_ok: int, *gaps: int) -> list[Change]:
    """Return `ok` fp16 steps, then overflows with so many `ok` steps before each further one."""
    changes: list[Change] = [FP16] * num_ok + [{**FP16, **OVERFLOW}]
    for gap in gaps:
        changes += [FP16] * gap + [{**FP16, **OVERFLOW}]
    return changes


FP16: Change = {"scale": 1024.0}

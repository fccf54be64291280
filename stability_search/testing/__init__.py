"""What anyone can run on a task of their own: contract checks, and faults planted on purpose."""

from stability_search.testing.faults import (
    EVERY_STEP,
    BrokenLoss,
    BrokenModule,
    GradientOverflow,
    NanBatch,
    NanParameter,
    OutOfMemory,
    Raises,
    Sleep,
)
from stability_search.testing.planting import Fault, PlantedFaults, plant
from stability_search.testing.rehearsal import Rehearsal, rehearse
from stability_search.testing.task_check import check_task

__all__ = [
    "EVERY_STEP",
    "BrokenLoss",
    "BrokenModule",
    "Fault",
    "GradientOverflow",
    "NanBatch",
    "NanParameter",
    "OutOfMemory",
    "PlantedFaults",
    "Raises",
    "Rehearsal",
    "Sleep",
    "check_task",
    "plant",
    "rehearse",
]

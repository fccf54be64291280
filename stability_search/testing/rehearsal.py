"""A short training of a user's own task under guard, with faults planted in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stability_search.assembly import build_engine, other_random_states_kept, training_stream
from stability_search.engine.losses import is_out_of_memory
from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.base import Task
from stability_search.testing.faults import first_step
from stability_search.testing.planting import Fault, plant
from stability_search.trial import NoFaults


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What became of a rehearsal.

    Attributes:
        records: Every attempted step.
        ended: Outcome and reason where the engine, or a lack of memory, ended it before its last
            step; None if it was trained to the end.
    """

    records: tuple[StepRecord, ...]
    ended: tuple[Outcome, str] | None


def rehearse(  # noqa: PLR0913 - what decides a training, and a default for each
    task: Task,
    settings: EngineSettings,
    *faults: Fault,
    num_steps: int = 20,
    batch_size: int = 2,
    accumulation_steps: int = 1,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Rehearsal:
    """Train a task for a few steps, as a trial would, and let faults happen to it.

    Args:
        task: The task; one that keeps nothing of a trial can be rehearsed again and again.
        settings: How its steps are taken.
        faults: What happens to it; none rehearses the task itself.
        num_steps: Attempted steps, >= 1.
        batch_size: Samples of a micro-batch, >= 1.
        accumulation_steps: Micro-batches of a step, >= 1.
        seed: Seed of model, batches and training, >= 0; a trial of equal seed and settings takes
            the same steps.
        device: Where it is trained.

    Returns:
        Its steps, and what ended it early. The global random states are left as they were found.

    Raises:
        ValueError: A number is below 1, or a fault's steps begin after the last one.
        UsageError: The model cannot honour a setting, or has not what a fault names.
        Exception: Whatever the task raises that is neither a numerical failure nor a lack of
            memory.

    Example:
        >>> from stability_search.settings.engine import EngineSettings
        >>> from stability_search.tasks.teacher import Teacher
        >>> from stability_search.testing import NanBatch, rehearse
        >>> settings = EngineSettings(learning_rate=1e-3)
        >>> rehearsal = rehearse(Teacher(), settings, NanBatch(step=2), num_steps=3)
        >>> [record.label.value for record in rehearsal.records]
        ['ok', 'data', 'ok']
    """
    _require_positive(
        num_steps=num_steps, batch_size=batch_size, accumulation_steps=accumulation_steps
    )
    _require_within(num_steps, faults)
    planted = plant(*faults) if faults else NoFaults()
    place = torch.device(device)
    # Seeding reaches every GPU; fork_rng without their names warns of two or more.
    gpus = range(torch.cuda.device_count())
    records: list[StepRecord] = []
    with (
        torch.random.fork_rng(gpus, device_type="cuda"),
        other_random_states_kept(),
        build_engine(task, settings, seed=seed, device=place) as engine,
    ):
        stream = training_stream(task, batch_size=batch_size, seed=seed, device=place)
        try:
            while len(records) < num_steps and engine.ended is None:
                window = [next(stream) for _ in range(accumulation_steps)]
                step = planted.before_step(engine.num_steps + 1, engine, window, task.loss)
                records.append(engine.step(*step))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Rehearsal(records=tuple(records), ended=_out_of_memory(error))
        return Rehearsal(records=tuple(records), ended=engine.ended)


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: value >= 1 must hold, but got {value!r}.")


def _require_within(num_steps: int, faults: Sequence[Fault]) -> None:
    for fault in faults:
        if first_step(fault.step) > num_steps:
            raise ValueError(
                f"{type(fault).__name__}: step must begin within num_steps={num_steps}, but got "
                f"{fault.step!r}. Rehearse longer, or plant it earlier."
            )


def _out_of_memory(error: Exception) -> tuple[Outcome, str]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Outcome.OUT_OF_MEMORY, text

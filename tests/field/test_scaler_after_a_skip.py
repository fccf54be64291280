"""A loop that skips a batch between `unscale_` and `update` crashes; the engine goes on.

Report 1: on an infinite gradient norm the team's loop called `unscale_`, then `continue`, and the
next `unscale_` raised. Their cure calls `update` and `zero_grad` on a skip. It does not see a NaN,
and crashes where nothing was unscaled. The loops are in `cases/teacher_scaler.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.clips import ClipBatch
from stability_search.tasks.teacher import Teacher
from tests.engine.plain import same
from tests.field.cases.plain_training import PlainTraining
from tests.field.cases.teacher_scaler import (
    CLIP_NORM,
    RATE,
    train_as_the_team,
    train_on_checked_losses,
)

pytestmark = pytest.mark.fault  # whole trainings

SCALE, NUM_STEPS = 1024.0, 6
INF, NAN = math.inf, math.nan


def planted(faults: Mapping[int, float]) -> PlainTraining:
    """Build a small teacher with a weight whose gradient breaks on cue.

    Args:
        faults: What the weight's gradient is filled with, by step.
    """
    training = PlainTraining(Teacher(hidden=8, heads=2, blocks=1), seed=0)

    def plant(gradient: torch.Tensor) -> torch.Tensor:
        fault = faults.get(training.step)
        return gradient if fault is None else torch.full_like(gradient, fault)

    training.model.get_parameter("classifier.2.weight").register_hook(plant)
    return training


def train_planted(training: PlainTraining, *, is_cured: bool, counts_nan: bool = False) -> str:
    """Return what the team's loop says of its steps: `x` for a skip it counted."""
    is_bad = (lambda norm: not math.isfinite(norm)) if counts_nan else math.isinf
    loop = train_as_the_team(training, is_cured=is_cured, is_bad=is_bad, init_scale=SCALE)
    return "".join("x" if step.is_skipped else "." for step in islice(loop, NUM_STEPS))


def train_guarded(training: PlainTraining) -> list[StepRecord]:
    settings = EngineSettings(
        learning_rate=RATE,
        precision="fp16",
        fp16_on_cpu="native",
        init_scale=SCALE,
        clip_norm=CLIP_NORM,
    )
    with GuardedEngine(training.model, settings) as engine:
        batches = islice(training.stream(), NUM_STEPS)
        return [engine.step([batch], training.task.loss) for batch in batches]


def test_skipping_after_unscale_crashes_at_the_next_batch() -> None:
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        train_planted(planted({1: INF}), is_cured=False)


def test_the_teams_cure_survives_an_infinite_norm() -> None:
    assert train_planted(planted({1: INF, 3: INF}), is_cured=True) == ".x.x.."


def test_the_teams_cure_does_not_count_a_nan_norm() -> None:
    """`math.isinf(nan)` is false: clipping spreads the NaN, and the scaler skips in silence."""
    assert train_planted(planted({1: NAN, 3: NAN}), is_cured=True) == "......"


@pytest.mark.parametrize("fault", [INF, NAN])
def test_the_engine_survives_and_counts_both(fault: float) -> None:
    """It trains to the bit as the team's loop would with both mistakes taken out."""
    faults = {1: fault, 3: fault}
    guarded = planted(faults)  # sets the random state too
    start = [p.detach().clone() for p in guarded.model.parameters()]
    records = train_guarded(guarded)
    by_hand = planted(faults)
    done = train_planted(by_hand, is_cured=True, counts_nan=True)

    assert "".join("." if record.is_applied else "x" for record in records) == done == ".x.x.."
    assert {record.label for record in records} == {StepLabel.OK, StepLabel.CALIBRATION}
    assert [record.scale for record in records] == [
        SCALE,
        SCALE,
        *[SCALE / 2] * 2,
        *[SCALE / 4] * 2,
    ]
    assert not same(start, [p.detach() for p in guarded.model.parameters()])
    assert same(list(guarded.model.parameters()), list(by_hand.model.parameters()))


# -- every micro-batch of a window skipped ---------------------------------------------------


def poison(index: int, batch: ClipBatch) -> ClipBatch:
    """Break the second window of two, so that its losses are NaN."""
    return replace(batch, frames=batch.frames * NAN) if index in {2, 3} else batch


def test_updating_after_a_window_of_skipped_micro_batches_crashes() -> None:
    loop = train_on_checked_losses(planted({}), accumulation=2, always_updates=True, spoil=poison)
    assert not next(loop).is_skipped
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        next(loop)


def test_calling_neither_step_nor_update_survives_it() -> None:
    """The twin: the crash is not the fault's."""
    loop = train_on_checked_losses(planted({}), accumulation=2, spoil=poison)
    assert [step.is_skipped for step in islice(loop, 3)] == [False, True, False]


def test_the_engine_survives_a_window_of_poisoned_micro_batches() -> None:
    training = planted({})
    batches = [poison(*item) for item in enumerate(islice(training.stream(), NUM_STEPS))]
    settings = EngineSettings(learning_rate=RATE, precision="fp16", init_scale=SCALE)
    with GuardedEngine(training.model, settings) as engine:
        records = [engine.step(batches[k : k + 2], training.task.loss) for k in (0, 2, 4)]
        assert engine.scale == SCALE  # a NaN input is no overflow of the loss scale
    assert [record.is_applied for record in records] == [True, False, True]
    assert [record.label for record in records] == [StepLabel.OK, StepLabel.DATA, StepLabel.OK]
    assert (records[1].batch_index, records[1].reason) == (2, "NaN in batch.frames")

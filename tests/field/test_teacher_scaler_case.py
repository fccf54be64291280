"""Report 1 with nothing planted: torch's own first loss scale overflows, and clips are broken."""

import math
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.tasks.teacher import Teacher
from tests.field.cases.plain_training import LoopStep, PlainTraining, play
from tests.field.cases.teacher_scaler import (
    CASE,
    CLIP_NORM,
    INIT_SCALE,
    RATE,
    TASK_ARGS,
    train_as_the_team,
    train_on_checked_losses,
)
from tests.field.guarded_teacher import first_configuration, train_guarded

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
NUM_STEPS = 25


@pytest.fixture(autouse=True)
def _leave_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def training(seed: int, **task_args: float) -> PlainTraining:
    return PlainTraining(Teacher(**{**TASK_ARGS, **task_args}), seed)  # type: ignore[arg-type]


def test_the_case_fails_under_the_first_configuration_of_its_space() -> None:
    config = first_configuration(CASE.space)
    assert config.task_args == {**TASK_ARGS, **config.task_args}
    assert config.engine.learning_rate == RATE
    assert config.engine.clip_norm == CLIP_NORM
    assert config.engine.init_scale == INIT_SCALE
    assert (config.batch_size, config.accumulation_steps) == (2, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_crashes_at_the_batch_after_the_first_overflow(seed: int) -> None:
    """Torch's first scale overflows at once with four seeds of five, at step 4 with the fifth."""
    end = CASE.unguarded(seed, NUM_STEPS)
    assert end.failure.startswith("RuntimeError: unscale_() has already been called")
    assert end.failed_at is not None
    assert end.failed_at <= 10
    said = list(islice(train_as_the_team(training(seed), is_cured=False), end.failed_at - 1))
    assert [step.is_skipped for step in said] == [False] * (end.failed_at - 2) + [True]


@pytest.mark.parametrize("seed", SEEDS)
def test_both_cures_survive(seed: int) -> None:
    for fix in (CASE.fix_as_written, CASE.fix_as_meant):
        end = fix(seed, NUM_STEPS)
        assert (end.failed_at, end.num_steps) == (None, NUM_STEPS)
        assert 1 <= end.num_skipped < NUM_STEPS / 2
        assert end.probe_loss is not None


def broken_and_counted(steps: list[LoopStep]) -> tuple[int, int]:
    broken = [step for step in steps if math.isinf(step.loss)]
    return len(broken), sum(step.is_skipped for step in broken)


def test_as_written_no_broken_clip_is_counted_and_as_meant_each_is() -> None:
    """An infinite CTC loss gives a NaN norm, which `math.isinf` lets pass."""
    loop = train_as_the_team(training(0, short_frac=0.2), is_cured=True)
    num_broken, num_counted = broken_and_counted(list(islice(loop, NUM_STEPS)))
    assert num_broken > 5
    assert num_counted == 0
    loop = train_on_checked_losses(training(0, short_frac=0.2))
    assert broken_and_counted(list(islice(loop, NUM_STEPS))) == (num_broken, num_broken)


def test_broken_clips_cost_the_cure_as_written_its_scale_and_the_engine_nothing() -> None:
    """The scaler takes the NaN for an overflow; the engine knows that the loss came first."""
    *_, last = islice(train_as_the_team(training(0, short_frac=0.5), is_cured=True), NUM_STEPS)
    assert last.scale < 1
    *_, last = islice(train_on_checked_losses(training(0, short_frac=0.5)), NUM_STEPS)
    assert last.scale >= 4096
    summary, _ = train_guarded(first_configuration(CASE.space, seed=0), short_frac=0.5)
    assert summary.outcome is Outcome.COMPLETED
    assert summary.final_scale is not None
    assert summary.final_scale >= 4096


def test_a_frame_of_nan_outlives_every_skip_of_the_loop_but_not_of_the_engine() -> None:
    """BatchNorm has averaged it before anything is checked; validation is NaN from then on."""
    poisoned = training(0, nan_frac=0.1)
    end = play(poisoned, train_on_checked_losses(poisoned), NUM_STEPS)
    assert "NaN in blocks.0.norm.running_mean" in end.failure
    assert end.probe_loss is None
    assert all(bool(p.isfinite().all()) for p in poisoned.model.parameters())
    summary, _ = train_guarded(first_configuration(CASE.space, seed=0), nan_frac=0.1)
    assert summary.outcome is Outcome.COMPLETED
    assert summary.num_data_steps > 1
    assert summary.probe_losses[-1] is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_survives_the_first_configuration_and_blames_nothing(seed: int) -> None:
    summary, records = train_guarded(first_configuration(CASE.space, seed=seed))
    assert summary.outcome is Outcome.COMPLETED
    assert summary.num_bad_steps == 0
    assert summary.num_calibration_steps >= 1
    assert summary.probe_losses[-1] is not None
    assert all(record.is_applied == (record.label is StepLabel.OK) for record in records)

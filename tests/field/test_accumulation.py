"""Unscaling on every micro-batch breaks torch's scaler under accumulation; the engine trains.

The team's loop called `unscale_` on every micro-batch for its NaN check and stepped every fourth.
With a handler that catches the error and starts over it fails at every odd batch, and no step is
ever taken.
"""

import dataclasses
from itertools import islice

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.detector import Detector
from tests.engine.plain import same
from tests.field.cases.detector import (
    ACCUMULATION,
    AS_WRITTEN,
    BATCH_SIZE,
    BEFORE,
    CASE,
    Training,
)

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
NUM_STEPS = 2
SCALE = 1024.0  # nothing overflows: what is looked at here is the order of calls


@pytest.mark.parametrize("seed", SEEDS)
def test_unscaling_every_micro_batch_crashes_at_the_second(seed: int) -> None:
    training = Training(BEFORE, seed)
    first, second = islice(training.task.batches(BATCH_SIZE, torch.Generator()), 2)
    training.micro_batch(first)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        training.micro_batch(second)


def test_the_case_counts_the_crash_as_its_first_step() -> None:
    for seed in SEEDS:
        end = CASE.unguarded(seed, NUM_STEPS)
        assert (end.failed_at, end.num_steps) == (1, 1)
        assert end.failure.startswith("RuntimeError: unscale_() has already been called")


@pytest.mark.parametrize("seed", SEEDS)
def test_with_their_handler_every_odd_batch_fails_and_no_step_is_taken(seed: int) -> None:
    training = Training(dataclasses.replace(BEFORE, catches=True), seed)
    before = training.weights().clone()
    for _ in range(NUM_STEPS):
        training.window()
    assert training.course.failed == list(range(1, NUM_STEPS * ACCUMULATION, 2))
    assert training.course.stepped == []
    assert torch.equal(before, training.weights())


@pytest.mark.parametrize("seed", SEEDS)
def test_unscaling_at_the_windows_end_trains(seed: int) -> None:
    """The twin: the crash is the loop's, not the model's."""
    training = Training(dataclasses.replace(AS_WRITTEN, init_scale=SCALE), seed)
    before = training.weights().clone()
    for _ in range(NUM_STEPS):
        training.window()
    assert training.course.failed == []
    last_ones = list(range(ACCUMULATION - 1, NUM_STEPS * ACCUMULATION, ACCUMULATION))
    assert training.course.stepped == last_ones
    assert not torch.equal(before, training.weights())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_trains_as_the_mended_loop_does_to_the_bit(seed: int) -> None:
    by_hand = Training(dataclasses.replace(AS_WRITTEN, init_scale=SCALE), seed)
    model = Training(AS_WRITTEN, seed).model
    task = Detector(**AS_WRITTEN.task_args)  # type: ignore[arg-type]
    stream = task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))
    settings = EngineSettings(
        learning_rate=AS_WRITTEN.rate,
        clip_norm=AS_WRITTEN.clip_norm,
        precision="fp16",
        fp16_on_cpu="native",
        init_scale=SCALE,
    )
    with GuardedEngine(model, settings) as engine:
        windows = (list(islice(stream, ACCUMULATION)) for _ in range(NUM_STEPS))
        records = [engine.step(window, task.loss) for window in windows]
    losses = [by_hand.window() for _ in range(NUM_STEPS)]

    assert [record.label for record in records] == [StepLabel.OK] * NUM_STEPS
    assert [record.loss for record in records] == pytest.approx(losses)
    assert same(list(model.state_dict().values()), list(by_hand.model.state_dict().values()))


@pytest.mark.parametrize("name", ["fix_as_written", "fix_as_meant"])
def test_both_forms_of_the_cure_survive_what_the_loop_before_did_not(name: str) -> None:
    for seed in SEEDS:
        end = getattr(CASE, name)(seed, NUM_STEPS)
        assert (end.failed_at, end.num_steps) == (None, NUM_STEPS)
        assert end.probe_loss is not None

"""A rehearsal takes the steps that a trial would take, and leaves no trace."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.testing import (
    Fault,
    NanBatch,
    OutOfMemory,
    Sleep,
    check_task,
    plant,
    rehearse,
)
from stability_search.trial import Clock, run_trial
from tests.testing.sound_task import Deep, Sound

SETTINGS = EngineSettings(learning_rate=0.01, num_planned_steps=6, precision="bf16")
CONFIG = TrialConfig(
    task=TaskReference(file=str(Path(__file__).with_name("sound_task.py")), class_name="Deep"),
    engine=SETTINGS,
    batch_size=4,
    accumulation_steps=2,
    num_planned_steps=6,
    timeout_s=10.0,
    seed=7,
)


def trial_of(
    *faults: Fault, clock: Clock = time.perf_counter
) -> tuple[list[StepRecord], TrialSummary]:
    generator = run_trial(
        CONFIG,
        constants=TrialConstants(probe_steps=(0,)),
        faults=plant(*faults) if faults else None,
        clock=clock,
    )
    records = []
    while True:
        try:
            records.append(next(generator).record)
        except StopIteration as end:
            return records, end.value


def comparable(record: StepRecord) -> StepRecord:
    return replace(record, step_s=0.0, evidence=None)


@pytest.mark.parametrize("faults", [(), (NanBatch(step=2, micro_batch=1),)], ids=["none", "nan"])
def test_its_steps_are_those_of_a_trial(faults: tuple[Fault, ...]) -> None:
    records, _ = trial_of(*faults)
    rehearsal = rehearse(
        Deep(), SETTINGS, *faults, num_steps=6, batch_size=4, accumulation_steps=2, seed=7
    )
    assert [comparable(r) for r in rehearsal.records] == [comparable(r) for r in records]
    other = rehearse(Deep(), SETTINGS, num_steps=1, batch_size=4, accumulation_steps=2, seed=8)
    assert other.records[0].loss != records[0].loss


def test_running_out_of_memory_ends_a_trial_by_name() -> None:
    records, summary = trial_of(OutOfMemory(step=3, micro_batch=1))
    assert (summary.outcome, len(records)) == (Outcome.OUT_OF_MEMORY, 2)
    assert trial_of()[1].outcome is Outcome.COMPLETED


def test_a_sleep_makes_a_trial_time_out() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for seconds, outcome, num_steps in (
        (60.0, Outcome.TIMED_OUT, 3),
        (6.0, Outcome.COMPLETED, 6),
    ):
        now[0] = 0.0
        fault = Sleep(step=3, seconds=seconds, sleep=sleep)
        records, summary = trial_of(fault, clock=lambda: now[0])
        assert (summary.outcome, len(records)) == (outcome, num_steps)


def test_the_random_states_are_left_as_they_were() -> None:
    def draw_after(act: Callable[[], object]) -> tuple[float, float, float]:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - the global states are what is shown
        random.seed(1)
        act()
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002, S311

    faults = (NanBatch(step=2), OutOfMemory(step=3))
    assert draw_after(lambda: rehearse(Deep(), SETTINGS, *faults)) == draw_after(lambda: None)
    assert draw_after(lambda: torch.rand(1)) != draw_after(lambda: None)


@pytest.mark.parametrize(
    "act",
    [lambda: check_task(Sound()), lambda: rehearse(Deep(), SETTINGS, num_steps=1)],
    ids=["check_task", "rehearse"],
)
def test_two_gpus_are_no_reason_for_a_warning_and_keep_their_random_states(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> None:
    """`torch.manual_seed` reaches every GPU, also where nothing is computed on one."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    seeds = []

    def seed_all(seed: int) -> None:
        seeds.append(seed)
        states.update(dict.fromkeys(states, torch.tensor([seed])))

    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states.update({device: state})
    )
    act()  # a warning would be an error
    assert seeds
    assert {device: state.item() for device, state in states.items()} == {0: 10, 1: 11}


def test_a_fault_behind_the_last_step_is_refused() -> None:
    with pytest.raises(
        ValueError, match="NanBatch: step must begin within num_steps=5, but got 6"
    ):
        rehearse(Deep(), SETTINGS, NanBatch(step=6), num_steps=5)
    assert len(rehearse(Deep(), SETTINGS, NanBatch(step=5), num_steps=5).records) == 5


@pytest.mark.parametrize("name", ["num_steps", "batch_size", "accumulation_steps"])
def test_nothing_to_train_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: value >= 1 must hold, but got 0"):
        rehearse(Deep(), SETTINGS, **{name: 0})  # type: ignore[arg-type]

"""A loop that skips a batch between `unscale_` and `update` crashes; the engine goes on.

The team's loop, on the teacher, in fp16 with torch's own scaler: on an infinite gradient norm it
called `unscale_`, then `continue`, and the next `unscale_` raised. Their cure calls `update` and
`zero_grad` on a skip. It does not see a NaN, and crashes where nothing was unscaled.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records import StepLabel, StepRecord
from stability_search.settings import EngineSettings
from stability_search.tasks.clips import ClipBatch
from stability_search.tasks.teacher import Teacher
from tests.engine.plain import same

pytestmark = pytest.mark.fault  # whole trainings

RATE, CLIP_NORM, BATCH_SIZE = 1e-5, 0.5, 2  # the team's
SCALE, NUM_STEPS = 1024.0, 6
INF, NAN = math.inf, math.nan


class Setting:
    """The teacher, its batches and a gradient that breaks on cue: the same for every loop.

    Args:
        faults: What a weight's gradient is filled with, by step.
    """

    def __init__(self, faults: Mapping[int, float]) -> None:
        torch.manual_seed(0)
        self.task = Teacher(hidden=8, heads=2, blocks=1)
        self.model = self.task.model()
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self._batches = self.task.batches(BATCH_SIZE, torch.Generator().manual_seed(0))
        self._faults = faults
        self._step = 0
        self.model.get_parameter("classifier.2.weight").register_hook(self._plant)

    def stream(self) -> Iterator[ClipBatch]:
        for self._step in range(NUM_STEPS):
            yield next(self._batches)

    def _plant(self, gradient: torch.Tensor) -> torch.Tensor:
        fault = self._faults.get(self._step)
        return gradient if fault is None else torch.full_like(gradient, fault)

    def has_moved(self) -> bool:
        return not same(self.start, [p.detach() for p in self.model.parameters()])


def train_as_the_team(
    setting: Setting, *, is_cured: bool, is_bad: Callable[[float], bool] = math.isinf
) -> list[str]:
    """Train with torch's scaler.

    Returns:
        What each step said it did: `stepped`, or `skipped` and counted as such.
    """
    model = setting.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    done = []
    for batch in setting.stream():
        with torch.autocast("cpu", dtype=torch.float16):
            loss = setting.task.loss(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if is_bad(norm.item()):
            done.append("skipped")
            if is_cured:
                scaler.update()
                optimizer.zero_grad()
            continue
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        done.append("stepped")
    return done


def train_guarded(setting: Setting) -> list[StepRecord]:
    settings = EngineSettings(
        learning_rate=RATE,
        precision="fp16",
        fp16_on_cpu="native",
        init_scale=SCALE,
        clip_norm=CLIP_NORM,
    )
    with GuardedEngine(setting.model, settings) as engine:
        return [engine.step([batch], setting.task.loss) for batch in setting.stream()]


def test_skipping_after_unscale_crashes_at_the_next_batch() -> None:
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        train_as_the_team(Setting({1: INF}), is_cured=False)


def test_the_teams_cure_survives_an_infinite_norm() -> None:
    done = train_as_the_team(Setting({1: INF, 3: INF}), is_cured=True)
    assert done == ["stepped", "skipped", "stepped", "skipped", "stepped", "stepped"]


def test_the_teams_cure_does_not_count_a_nan_norm() -> None:
    """`math.isinf(nan)` is false: clipping spreads the NaN, and the scaler skips in silence."""
    done = train_as_the_team(Setting({1: NAN, 3: NAN}), is_cured=True)
    assert done == ["stepped"] * NUM_STEPS


@pytest.mark.parametrize("fault", [INF, NAN])
def test_the_engine_survives_and_counts_both(fault: float) -> None:
    """It trains to the bit as the team's loop would with both mistakes taken out."""
    faults = {1: fault, 3: fault}
    guarded = Setting(faults)  # sets the random state too
    records = train_guarded(guarded)
    by_hand = Setting(faults)
    done = train_as_the_team(by_hand, is_cured=True, is_bad=lambda norm: not math.isfinite(norm))

    assert ["stepped" if record.is_applied else "skipped" for record in records] == done
    assert [record.step for record in records if not record.is_applied] == [2, 4]
    assert {record.label for record in records} == {StepLabel.OK, StepLabel.CALIBRATION}
    assert [record.scale for record in records] == [
        SCALE,
        SCALE,
        *[SCALE / 2] * 2,
        *[SCALE / 4] * 2,
    ]
    assert guarded.has_moved()
    assert same(list(guarded.model.parameters()), list(by_hand.model.parameters()))


# -- every micro-batch of a window skipped ---------------------------------------------------


def silent(batch: ClipBatch) -> ClipBatch:
    """Break a batch so that its loss is NaN."""
    return ClipBatch(
        frames=batch.frames * NAN,
        padding=batch.padding,
        frame_lengths=batch.frame_lengths,
        labels=batch.labels,
        label_lengths=batch.label_lengths,
    )


def train_on_checked_losses(setting: Setting, bad: set[int], *, always_updates: bool) -> list[str]:
    """Skip a batch for its loss, before anything was unscaled; accumulate over two batches."""
    optimizer = torch.optim.AdamW(setting.model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    done = []
    num_used = 0
    for index, batch in enumerate(setting.stream()):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = setting.task.loss(setting.model, silent(batch) if index in bad else batch)
        if math.isfinite(loss.item()):
            scaler.scale(loss / 2).backward()
            num_used += 1
        if index % 2 == 0:
            continue
        if num_used or always_updates:
            if num_used:
                scaler.step(optimizer)
            scaler.update()
        done.append("stepped" if num_used else "skipped")
        optimizer.zero_grad()
        num_used = 0
    return done


def test_updating_after_a_window_of_skipped_micro_batches_crashes() -> None:
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        train_on_checked_losses(Setting({}), {2, 3}, always_updates=True)


def test_calling_neither_step_nor_update_survives_it() -> None:
    """The twin: the crash is not the fault's."""
    done = train_on_checked_losses(Setting({}), {2, 3}, always_updates=False)
    assert done == ["stepped", "skipped", "stepped"]


def test_the_engine_survives_a_window_of_poisoned_micro_batches() -> None:
    setting = Setting({})
    batches = [
        silent(batch) if index in {2, 3} else batch for index, batch in enumerate(setting.stream())
    ]
    settings = EngineSettings(learning_rate=RATE, precision="fp16", init_scale=SCALE)
    with GuardedEngine(setting.model, settings) as engine:
        records = [engine.step(batches[k : k + 2], setting.task.loss) for k in (0, 2, 4)]
        assert engine.scale == SCALE  # a NaN input is no overflow of the loss scale
    assert [record.is_applied for record in records] == [True, False, True]
    assert [record.label for record in records] == [StepLabel.OK, StepLabel.DATA, StepLabel.OK]
    assert (records[1].batch_index, records[1].reason) == (2, "NaN in batch.frames")

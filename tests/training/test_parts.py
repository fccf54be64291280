"""The parts of a long training, one by one: data, checkpoints, step files, words, changes."""

import itertools
import random
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stability_search.alarms.epochs import EpochSummary
from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.training import checkpoint
from stability_search.training.first_steps import first_steps_line
from stability_search.training.history import EpochPoint, History
from stability_search.training.layout import TrainDirectory
from stability_search.training.standstill import (
    MOST_IDLE_STEPS,
    Standstill,
    is_untrained,
    rule_named,
    standstill,
)
from stability_search.training.state import (
    EndKind,
    Pending,
    Phase,
    TrainEnd,
    TrainState,
    read_state,
    write_state,
)
from stability_search.training.step_parts import StepParts, read_parts
from stability_search.training.stream import DataStream
from stability_search.training.wording import point_line, scale_line, step_line

OK = StepRecord(
    step=1,
    label=StepLabel.OK,
    loss=2.0,
    is_loss_finite=True,
    grad_norm=0.5,
    is_grad_finite=True,
    clipped=False,
    is_applied=True,
    learning_rate=0.1,
    scale=None,
)
POINT = EpochPoint(
    epoch=2,
    phase=1,
    step=10,
    num_steps=5,
    num_skipped=1,
    loss=1.5,
    grad_norm=0.25,
    probe_loss=None,
    metrics={"error": 0.5},
    learning_rate=0.1,
    scale=None,
)


class Shuffled:
    """Data whose place no generator's state holds."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
        while True:
            for row in torch.randperm(97, generator=generator).tolist():
                yield {"x": torch.full((batch_size, 1), float(row)), "mask": torch.ones(2) > 0}

    def probe(self) -> list[Any]:
        return []

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:  # noqa: ANN401
        return model(batch["x"]).mean()


def stream(seed: int = 0) -> DataStream:
    return DataStream(Shuffled(), batch_size=2, seed=seed, device=torch.device("cpu"))


def never() -> None:
    """No signal arrived."""


class TestStream:
    @pytest.mark.parametrize("drawn", [0, 1, 7])
    def test_put_back_it_goes_on_with_the_micro_batch_that_comes_next(self, drawn: int) -> None:
        first, second = stream(), stream()
        first.skip(drawn)
        assert second.put_back(first.state_dict(), never)
        assert second.num_drawn == drawn
        ahead = [[batch["x"][0].item() for batch in one.window(4)] for one in (first, second)]
        assert ahead[0] == ahead[1]

    def test_other_data_is_noticed(self) -> None:
        first = stream(seed=0)
        first.skip(7)
        assert not stream(seed=1).put_back(first.state_dict(), never)

    def test_a_signal_ends_the_drawing(self) -> None:
        first, calls = stream(), iter([None, KeyboardInterrupt()])

        def check() -> None:
            error = next(calls)
            if error is not None:
                raise error

        first.skip(7)
        second = stream()
        with pytest.raises(KeyboardInterrupt):
            second.put_back(first.state_dict(), check)
        assert second.num_drawn == 1


class TestCheckpoints:
    def save(self, folder: Path, step: int, probe: float | None, phase: int = 1) -> None:
        checkpoint.save(folder, {"step": step}, phase=phase, step=step, probe=probe)

    def kept(self, folder: Path, phase: int = 9) -> list[tuple[int, int]]:
        return [(one.phase, one.step) for one in checkpoint.found_in(folder, up_to_phase=phase)]

    def test_the_last_two_and_the_best_are_kept(self, tmp_path: Path) -> None:
        for step, probe in enumerate([3.0, 1.0, None, 2.0, 1.0, 2.5, None]):
            self.save(tmp_path, step, probe)
        assert self.kept(tmp_path) == [(1, 1), (1, 5), (1, 6)]
        assert checkpoint.choose(tmp_path, "best", up_to_phase=1).step == 1
        assert checkpoint.choose(tmp_path, "last", up_to_phase=1).step == 6

    def test_a_phase_that_never_began_is_left_out(self, tmp_path: Path) -> None:
        self.save(tmp_path, 8, 1.0)
        self.save(tmp_path, 5, 0.5, phase=2)
        assert self.kept(tmp_path, phase=1) == [(1, 8)]
        assert checkpoint.choose(tmp_path, "last", up_to_phase=2).phase == 2

    def test_those_of_a_phase_that_never_began_are_removed(self, tmp_path: Path) -> None:
        self.save(tmp_path, 8, 0.1)
        self.save(tmp_path, 5, 0.5, phase=2)
        self.save(tmp_path, 5, 0.5, phase=3)
        (tmp_path / "mine.pt").touch()
        checkpoint.remove_unbegun(tmp_path, last_phase=2)
        assert self.kept(tmp_path) == [(1, 8), (2, 5)]
        assert (tmp_path / "mine.pt").exists()

    def test_the_same_step_is_there_once(self, tmp_path: Path) -> None:
        self.save(tmp_path, 5, None)
        self.save(tmp_path, 5, 0.5)
        assert self.kept(tmp_path) == [(1, 5)]
        assert checkpoint.choose(tmp_path, "last", up_to_phase=1).probe == 0.5

    def test_an_unknown_one_is_refused_with_those_there_are(self, tmp_path: Path) -> None:
        self.save(tmp_path, 5, 0.25)
        with pytest.raises(
            UsageError, match=r"got 'worst'.*phase-1-step-00000005-probe-0\.25\.pt"
        ):
            checkpoint.choose(tmp_path, "worst", up_to_phase=1)

    def test_nothing_in_it_is_executed(self, tmp_path: Path) -> None:
        path = tmp_path / "phase-1-step-00000001-probe-none.pt"
        torch.save({"version": 1, "run": Path}, path)
        assert zipfile.is_zipfile(path)
        with pytest.raises(UsageError, match="damaged checkpoint"):
            checkpoint.load(path)

    def test_a_damaged_one_names_the_one_before_it(self, tmp_path: Path) -> None:
        for phase, step in ((9, 8), (10, 9), (10, 12)):
            self.save(tmp_path, step, 1.0, phase=phase)
        paths = [one.path for one in checkpoint.found_in(tmp_path, up_to_phase=10)]
        for path in paths:
            path.write_bytes(b"")
        for before, path in itertools.pairwise(paths):
            with pytest.raises(UsageError, match=f"before it: --from {before.name}$"):
                checkpoint.load(path)
        with pytest.raises(UsageError, match=r"damaged checkpoint.*Begin anew\.$"):
            checkpoint.load(paths[0])

    def test_a_full_disk_leaves_the_others_as_they_were(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.save(tmp_path, 1, 1.0)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(StoppedEarlyError, match="No space left on device"):
            self.save(tmp_path, 2, 0.5)
        assert [path.name for path in tmp_path.iterdir()] == ["phase-1-step-00000001-probe-1.pt"]

    def test_every_random_state_comes_back(self) -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 - the state a task may use
        random.gauss(0, 1)
        np.random.standard_normal()  # noqa: NPY002 - leaves half a pair behind
        states = checkpoint.random_states()
        drawn = [(random.gauss(0, 1), np.random.standard_normal()) for _ in range(3)]  # noqa: NPY002
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        checkpoint.set_random_states(states)
        again = [(random.gauss(0, 1), np.random.standard_normal()) for _ in range(3)]  # noqa: NPY002
        assert again == drawn


def test_step_files_of_a_stretch_given_up_stay_and_those_made_again_go(tmp_path: Path) -> None:
    for phase, steps in ((1, (1, 2, 3)), (2, (2, 3))):
        parts = StepParts(tmp_path, phase)
        for step in steps:
            parts.add(replace(OK, step=step))
            parts.write()
    parts.write()  # nothing new: no file
    again = StepParts(tmp_path, 2)
    again.drop_after(2)
    assert [record.step for record in read_parts(tmp_path, 1)] == [1, 2, 3]
    assert [record.step for record in read_parts(tmp_path, 2)] == [2]


def test_the_state_comes_back_from_its_file(tmp_path: Path) -> None:
    state = TrainState(
        name="tiny",
        epoch_steps=5,
        task={"task_sha256": ""},
        phases=(
            Phase(
                number=1,
                first_step=1,
                num_planned_steps=9,
                from_checkpoint="",
                changes={"fixed.eps": ("nothing", "1e-6")},
                space_sha256="ab",
                stream_seed=3,
                device="cpu",
                started_at="2026-03-01T12:00:00Z",
            ),
        ),
        pending=Pending(overrides=("fixed.eps=1e-5",), num_calm_epochs=2),
        num_tests=4,
        end=TrainEnd(kind=EndKind.DONE, exit_code=0, step=9, outcome="completed", lines=("a",)),
    )
    directory = TrainDirectory(path=tmp_path)
    write_state(directory, state, [{"epoch": 1}])
    write_state(directory, state)
    assert read_state(directory) == state
    assert '"epoch": 1' in directory.state.read_text()
    text = directory.state.read_text()
    for damaged in (text[:-20], text.replace('"version": 1', '"version": 2'), "[]"):
        directory.state.write_text(damaged)
        with pytest.raises(UsageError, match="damaged, or of another version"):
            read_state(directory)


class TestWords:
    def test_a_calm_step_is_not_worth_a_line(self) -> None:
        assert step_line(OK) is None
        assert step_line(replace(OK, label=StepLabel.CALIBRATION)) is None

    def test_a_bad_step_says_what_where_and_what_was_done(self) -> None:
        bad = replace(
            OK,
            step=12,
            label=StepLabel.BAD,
            reason="NaN in the loss",
            first_nonfinite_module="layers.0",
            first_nonfinite_phase="forward",
            batch_index=23,
            is_applied=False,
        )
        assert step_line(bad) == (
            "WARNING step 12: bad (NaN in the loss), first NaN or Inf in layers.0 (forward), "
            "batch 23, step skipped"
        )
        assert str(step_line(replace(bad, is_applied=True))).endswith("went on without it")

    @pytest.mark.parametrize(
        ("label", "before", "after", "line"),
        [
            (StepLabel.OK, 1024.0, 1024.0, None),
            (StepLabel.OK, None, None, None),
            (StepLabel.OK, 1024.0, 2048.0, "step 1: loss scale 1024 -> 2048"),
            (StepLabel.BAD, 2048.0, 1024.0, "WARNING step 1: loss scale 2048 -> 1024 (gradient"),
            (StepLabel.CALIBRATION, 4.0, 2.0, "step 1: loss scale 4 -> 2 (calibration"),
            (StepLabel.BAD, 1.0, 0.5, "CRITICAL step 1: loss scale 1 -> 0.5, below 1"),
        ],
    )
    def test_every_change_of_the_scale_is_said(
        self, label: StepLabel, before: float | None, after: float | None, line: str | None
    ) -> None:
        said = scale_line(replace(OK, label=label, scale=before), after)
        assert said is None if line is None else str(said).startswith(line)

    def test_an_epoch_says_what_the_probe_showed(self) -> None:
        summary = EpochSummary(epoch=2, num_steps=5, loss=1.5, grad_norm=0.25, num_skipped=1)
        assert point_line(summary, POINT) == (
            "epoch 2: loss 1.5, grad_norm 0.25, 1 of 5 steps skipped; probe loss NaN or Inf, "
            "error 0.5"
        )


def ten(
    losses: list[float | None],
    norm: float | None = 0.5,
    skipped: int = 0,
    start_probe: float | None = 6.0,
) -> History:
    history = History(start_probe=start_probe)
    for number, loss in enumerate(losses, start=1):
        history.add_step(
            replace(OK, step=number, loss=loss, grad_norm=norm, is_applied=number > skipped)
        )
    return history


@pytest.mark.parametrize(
    ("history", "line"),
    [
        (
            ten([5.0] * 5 + [3.0] * 5),
            (
                "first 10 steps: loss 5 to 3 (falls), grad_norm 0.5 (below 1), 0 of 10 skipped: "
                "healthy so far"
            ),
        ),
        (
            ten([5.0] * 5 + [3.0] * 5, norm=4.0),
            (
                "first 10 steps: loss 5 to 3 (falls), grad_norm 4 (not below 1), 0 of 10 skipped: "
                "healthy so far"
            ),
        ),
        (
            ten([3.0] * 5 + [5.0] * 5),
            (
                "WARNING first 10 steps: loss 3 to 5 (does not fall), grad_norm 0.5 (below 1), 0 "
                "of 10 skipped. Watch it: a warm-up may need longer, a learning_rate may be too "
                "high."
            ),
        ),
        (
            ten([3.0] * 5 + [2.0] * 5, skipped=6),
            (
                "WARNING first 10 steps: loss 3 to 2 (falls), grad_norm 0.5 (below 1), 6 of 10 "
                "skipped. Stop and look at the data, the precision and learning_rate."
            ),
        ),
        (
            ten([None] * 10, norm=None),
            (
                "WARNING first 10 steps: loss NaN or Inf to NaN or Inf (does not fall), grad_norm "
                "NaN or Inf, 0 of 10 skipped. Stop and look at the data, the precision and "
                "learning_rate."
            ),
        ),
        (
            ten([5.0] * 5 + [3.0] * 5, start_probe=None),
            (
                "WARNING first 10 steps: loss 5 to 3 (falls), grad_norm 0.5 (below 1), 0 of 10 "
                "skipped, the probe loss of the untrained model is NaN or Inf: look at what model "
                "and loss do in eval mode (running statistics, a branch on `training`) and at the "
                "batches of the probe."
            ),
        ),
    ],
)
def test_the_first_ten_steps_get_a_verdict(history: History, line: str) -> None:
    assert first_steps_line(history) == line


@pytest.mark.parametrize("label", [StepLabel.DATA, StepLabel.BAD])
def test_steps_that_change_nothing_are_counted_in_a_row_but_for_the_search_of_a_scale(
    label: StepLabel,
) -> None:
    idle = replace(OK, label=label, is_applied=False)
    search = replace(OK, label=StepLabel.CALIBRATION, is_applied=False)
    history = History()
    for one in [idle, OK, *[idle, search] * (MOST_IDLE_STEPS - 1)]:
        history.add_step(one)
    assert standstill(history) is None
    history = History.from_state(history.state_dict())
    history.add_step(idle)
    assert standstill(history) == (
        Standstill.NOTHING_TRAINED,
        "nothing was trained: the last 50 steps changed no parameter",
    )
    history.add_step(replace(idle, is_applied=True))  # went on without a micro-batch
    assert standstill(history) is None


@pytest.mark.parametrize("applied", [None, 3])
def test_a_training_of_which_no_step_was_applied_is_untrained(applied: int | None) -> None:
    history = History()
    for number in range(1, 9):
        label = StepLabel.CALIBRATION if number < 3 else StepLabel.DATA
        history.add_step(replace(OK, step=number, label=label, is_applied=number == applied))
    assert is_untrained(history, 8) is (applied is None)


def test_the_rule_that_ended_a_training_is_read_back_by_its_name() -> None:
    names = ["nothing_trained", "diverged", "alarm"]
    assert [rule_named(name) for name in names] == [
        Standstill.NOTHING_TRAINED,
        Outcome.DIVERGED,
        None,
    ]


def test_calm_epochs_are_counted_in_a_row() -> None:
    history = History()
    counts = []
    for alarms in (0, 0, 2, 0):
        history.num_alarms_in_epoch += alarms
        history.add_epoch(POINT)
        counts.append(history.num_calm_epochs)
    assert counts == [1, 2, 0, 1]
    assert History.from_state(history.state_dict()) == history

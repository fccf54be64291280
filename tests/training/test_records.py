"""What a long training leaves for people's eyes and tools: TensorBoard scalars, the picture."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from stability_search.errors import StoppedEarlyError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.training.history import EpochPoint, History
from stability_search.training.scalars import ScalarWriter
from stability_search.training.state import Phase

STEP = StepRecord(
    step=3,
    label=StepLabel.BAD,
    loss=None,
    is_loss_finite=False,
    grad_norm=0.5,
    is_grad_finite=True,
    clipped=False,
    is_applied=True,
    learning_rate=0.25,
    scale=1024.0,
    loss_terms={"box": 2.0, "class": None},
)
POINT = EpochPoint(
    epoch=1,
    phase=1,
    step=3,
    num_steps=3,
    num_skipped=0,
    loss=1.5,
    grad_norm=0.25,
    probe_loss=4.0,
    metrics={"error": 0.5, "other": None},
    learning_rate=0.25,
    scale=None,
)


def events_in(folder: Path) -> list[Event]:
    """Read event files as TensorBoard does: a length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def scalars_in(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events_in(folder)
        for value in event.summary.value
    ]


class TestScalars:
    def test_every_finite_number_can_be_read_back(self, tmp_path: Path) -> None:
        writer = ScalarWriter(tmp_path, next_step=1)
        writer.add_step(STEP)
        writer.add_epoch(POINT)
        writer.close()
        assert scalars_in(tmp_path) == [
            (3, "train/grad_norm", 0.5),
            (3, "train/learning_rate", 0.25),
            (3, "train/loss_scale", 1024.0),
            (3, "train/is_bad", 1.0),
            (3, "loss_terms/box", 2.0),
            (3, "probe/loss", 4.0),
            (3, "probe/error", 0.5),
        ]

    def test_a_resumed_run_tells_tensorboard_to_forget_what_is_made_again(
        self, tmp_path: Path
    ) -> None:
        ScalarWriter(tmp_path, next_step=1).close()
        ScalarWriter(tmp_path, next_step=8).close()
        assert len(list(tmp_path.iterdir())) == 2, "within one second too"
        starts = [event for event in events_in(tmp_path) if event.HasField("session_log")]
        assert [(event.step, event.session_log.status) for event in starts] == [(8, 1)]

    def test_a_disk_that_cannot_be_written_is_heard_of(self, tmp_path: Path) -> None:
        (tmp_path / "tensorboard").touch()
        with pytest.raises(StoppedEarlyError, match="could not be written"):
            ScalarWriter(tmp_path / "tensorboard", next_step=1)


def phase(number: int, first_step: int) -> Phase:
    return Phase(
        number=number,
        first_step=first_step,
        num_planned_steps=40,
        from_checkpoint="",
        changes={"fixed.learning_rate": ("0.1", "0.01"), "fixed.a$b": ("1", "2")},
        space_sha256="",
        stream_seed=0,
        device="cpu",
        started_at="",
    )


@pytest.mark.fault
@pytest.mark.usefixtures("real_picture")
class TestPicture:
    def size(self, png: bytes) -> tuple[int, int]:
        assert png.startswith(b"\x89PNG\r\n")
        width, height = struct.unpack(">II", png[16:24])
        return width, height

    def test_it_has_a_panel_more_where_there_are_metrics(self) -> None:
        from stability_search.training.curves import draw

        history = History(epochs=[replace(POINT, epoch=n, step=3 * n) for n in range(1, 4)])
        with_metrics = self.size(draw("a $title_", history, [phase(1, 1)]))
        history.epochs = [replace(point, metrics={}) for point in history.epochs]
        without = self.size(draw("a $title_", history, [phase(1, 1)]))
        assert with_metrics == (900, 920)
        assert without == (900, 690)

    def test_no_finite_value_and_hostile_names_are_drawn_too(self) -> None:
        from stability_search.training.curves import draw

        hostile = {"_hidden": None, r"$\frac{1$": 0.5, "\x1b[31m": 1e30, "$": -1.0}
        point = replace(POINT, loss=None, grad_norm=None, probe_loss=None, metrics=hostile)
        history = History(epochs=[point, replace(point, step=6)], bad_steps=[1, 2, 4])
        self.size(draw("\x00$", history, [phase(1, 1), phase(2, 4)]))

    def test_bad_steps_and_phases_leave_marks_and_given_up_phases_none(self) -> None:
        from stability_search.training import curves

        history = History(epochs=[replace(POINT, epoch=n, step=10 * n) for n in range(1, 4)])
        plain = curves.draw("", history, [phase(1, 1)])
        marked = curves.draw("", history, [phase(1, 1), phase(2, 11)])
        given_up = curves.draw("", history, [phase(1, 1), phase(3, 21), phase(2, 11)])
        assert plain != marked
        assert marked == given_up
        history.bad_steps = [15]
        assert curves.draw("", history, [phase(1, 1)]) != plain

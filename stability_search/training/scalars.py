"""Scalars for TensorBoard, through the writer that Ray Tune brings.

Written by this thread, not by the writer's own: an error of the disk must be heard here.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from stability_search.files import cannot_write
from stability_search.records.step import StepRecord
from stability_search.scalars import step_scalars
from stability_search.training.history import EpochPoint


class ScalarWriter:
    """Write one event file of a long training.

    Args:
        folder: Folder that TensorBoard is pointed at; a resumed run adds a file to it.
        next_step: The step to come: TensorBoard forgets what earlier files hold from it on.

    Raises:
        StoppedEarlyError: The file cannot be written.
    """

    def __init__(self, folder: Path, *, next_step: int) -> None:
        self._folder = folder
        # Two processes within a second would otherwise write to one name.
        suffix = f".{next_step}.{os.getpid()}"
        try:
            self._writer = EventsWriter(str(folder / "events"), suffix)
            if next_step > 1:
                restart = SessionLog(status=SessionLog.START)
                self._writer.write_event(
                    Event(wall_time=time.time(), step=next_step, session_log=restart)
                )
        except OSError as error:
            raise cannot_write(folder, error) from error

    def add_step(self, record: StepRecord) -> None:
        """Add what one step showed."""
        self._add(record.step, step_scalars(record))

    def add_epoch(self, point: EpochPoint) -> None:
        """Add what one epoch showed."""
        metrics = {f"probe/{name}": value for name, value in point.metrics.items()}
        self._add(point.step, {"probe/loss": point.probe_loss, **metrics})

    def _add(self, step: int, values: Mapping[str, float | None]) -> None:
        try:
            for tag, value in values.items():
                if value is not None:
                    summary = scalar(tag, value)
                    self._writer.write_event(
                        Event(wall_time=time.time(), step=step, summary=summary)
                    )
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def flush(self) -> None:
        """Make what was added readable.

        Raises:
            StoppedEarlyError: It could not be written.
        """
        try:
            self._writer.flush()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def close(self) -> None:
        """Close the file.

        Raises:
            StoppedEarlyError: It could not be written.
        """
        try:
            self._writer.close()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

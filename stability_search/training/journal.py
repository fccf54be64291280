"""Everything a long training leaves behind while it runs: log, scalars, step records, picture."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from stability_search.errors import StabilitySearchError
from stability_search.files import cannot_write, write_whole
from stability_search.inert import inert
from stability_search.records.step import StepRecord
from stability_search.training.history import EpochPoint, History
from stability_search.training.layout import TrainDirectory
from stability_search.training.scalars import ScalarWriter
from stability_search.training.state import TrainState, write_state
from stability_search.training.step_parts import StepParts

_PICTURE_S = 30.0  # a picture takes a third of a second

Listener = Callable[[str], None]


class Log:
    """Hand every line on, and append it to `train.log` with its time.

    Args:
        directory: The run.
        listener: Hears every line.
    """

    def __init__(self, directory: TrainDirectory, listener: Listener) -> None:
        self._path = directory.log
        self._listener = listener

    def say(self, line: str) -> None:
        """Say one line, or several in one text.

        Raises:
            StoppedEarlyError: The log cannot be written.
        """
        self._listener(line)
        self.write(line)

    def write(self, text: str) -> None:
        """Write to the log alone.

        Raises:
            StoppedEarlyError: The log cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                shown = inert(text, keeps="\n")
                file.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {shown}\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error


class Journal(AbstractContextManager["Journal"]):
    """The records of one phase in one process.

    Args:
        directory: The run.
        state: What it is.
        log: Where lines go.
        first_step: The step to come; what is there of this phase beyond it is made again.
        clock: Seconds of a clock that does not run backwards.
    """

    def __init__(
        self,
        directory: TrainDirectory,
        state: TrainState,
        log: Log,
        *,
        first_step: int,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._state = state
        self._log = log
        self._parts = StepParts(directory.steps, state.phase.number)
        self._parts.drop_after(first_step - 1)
        self._scalars = ScalarWriter(directory.scalars, next_step=first_step)
        self._has_failed_to_draw = False
        self._clock, self._drawn_at = clock, clock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what is open."""
        self._scalars.close()

    def say(self, line: str) -> None:
        """Say one line."""
        self._log.say(line)

    def add_step(self, record: StepRecord) -> None:
        """Take in one attempted step."""
        self._parts.add(record)
        self._scalars.add_step(record)

    def add_epoch(self, point: EpochPoint) -> None:
        """Take in one finished epoch."""
        self._scalars.add_epoch(point)
        self._scalars.flush()

    def write_steps(self) -> None:
        """Write the step records that are not on the disk yet; a checkpoint comes after them."""
        self._parts.write()
        self._scalars.flush()

    def count_tests(self, num_tests: int) -> None:
        """Note at once that a test of the kill rule has begun: its share of `false_kill` is spent.

        Args:
            num_tests: Its number.
        """
        most = max(self._state.num_tests, num_tests)
        self._state = dataclasses.replace(self._state, num_tests=most)
        write_state(self._directory, self._state)

    def write_curves(self, history: History, *, at_once: bool = False) -> None:
        """Write the curves, as numbers and as a picture.

        Args:
            history: What the training has shown.
            at_once: True draws the picture; else it is drawn once it is half a minute old.
        """
        write_state(self._directory, self._state, epoch_rows(history.epochs))
        now = self._clock()
        if not history.epochs or not (at_once or now - self._drawn_at >= _PICTURE_S):
            return
        self._drawn_at = now
        try:
            from stability_search.training.curves import draw

            title = f"{self._state.name}: {history.epochs[-1].step} steps"
            write_whole(self._directory.curves, draw(title, history, self._state.phases))
        except StabilitySearchError:
            raise
        except Exception as error:  # noqa: BLE001 - a picture never ends a training
            if not self._has_failed_to_draw:
                self.say(f"WARNING {self._directory.curves}: no picture: {error!r}")
            self._has_failed_to_draw = True


def epoch_rows(points: Sequence[EpochPoint]) -> list[dict[str, Any]]:
    """Return finished epochs as JSON rows."""
    return [dataclasses.asdict(point) for point in points]
